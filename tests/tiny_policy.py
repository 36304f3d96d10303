"""A random policy of two layers that reads letters: small enough to be trained a hundred times in a test."""
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast


def make_start(folder: Path, dropout: float = 0.1, seed: int = 0) -> Path:
    """Write the policy and its tokenizer."""
    letters = [chr(c) for c in range(32, 127)]
    plain = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *letters])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, attention_dropout=dropout,
        bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
