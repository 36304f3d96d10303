"""Eight kinds of tokenizers, trained here on a few sentences."""
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["The film opens in a small town, and it never leaves.", "Yes. No. Sure, it is: a prime!",
         "\n\nHuman: hi\n\nAssistant: Hello there.\n\nSystem: Be brief.",
         "user system assistant model INST turn one two three", "  two  spaces,\ttabs\nand lines\n",
         "été élan déjà vu 0123456789", "zx" * 3]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PHI = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% "
         "endif %}"
         "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ "
         "m['content'] | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
          "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
          "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
FORGETS = ("{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
           "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")


def _bytes(vocab: int = 330, prefix_space: bool = False) -> Tokenizer:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), decoders.ByteLevel()
    plain.train_from_iterator(WORDS,
                              trainers.BpeTrainer(vocab_size=vocab,
                                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                  show_progress=False))
    return plain


def _framed(plain: Tokenizer, template: str, **tokens: str) -> Tokenizer:
    plain.add_special_tokens(list(tokens.values()))
    plain.post_processor = processors.TemplateProcessing(single=template,
                                                         special_tokens=[(t, plain.token_to_id(t))
                                                                         for t in tokens.values() if t in template])
    return plain


def _fast(plain: Tokenizer, template: str | None = None, **options) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False, **options)
    tokenizer.chat_template = template
    return tokenizer


def letters() -> PreTrainedTokenizerFast:
    "No start token, no template."
    alphabet = sorted({c for w in WORDS for c in w} | {chr(c) for c in range(32, 127)})
    plain = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return _fast(plain, eos_token="<end>", pad_token="<end>")


def bytes_chatml() -> PreTrainedTokenizerFast:
    "GPT-2's kind with ChatML, as Qwen and SmolLM."
    tokenizer = _fast(_bytes(), CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def bytes_bos() -> PreTrainedTokenizerFast:
    "A start token, no template: the paper's LLaMA and Alpaca."
    return _fast(_framed(_bytes(), "<s> $A", bos="<s>", eos="</s>"), bos_token="<s>", eos_token="</s>",
                 pad_token="</s>")


def bytes_bos_eos() -> PreTrainedTokenizerFast:
    "Ends every text."
    return _fast(_framed(_bytes(prefix_space=True), "<s> $A </s>", bos="<s>", eos="</s>"), bos_token="<s>",
                 eos_token="</s>", pad_token="</s>")


def metaspace_llama2() -> PreTrainedTokenizerFast:
    "SentencePiece's kind with Llama-2's template, which writes its own start tokens."
    plain = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    fallback = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    plain.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=420, special_tokens=fallback, show_progress=False))
    return _fast(_framed(plain, "<s> $A", bos="<s>", eos="</s>"), LLAMA2, bos_token="<s>", eos_token="</s>",
                 unk_token="<unk>")


def unigram_eos() -> PreTrainedTokenizerFast:
    "Metaspace and Unigram, an end token added, as T5."
    plain = Tokenizer(models.Unigram())
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    plain.decoder = decoders.Metaspace(prepend_scheme="always")
    plain.train_from_iterator(
        WORDS,
        trainers.UnigramTrainer(
            vocab_size=120,
            unk_token="<unk>",
            special_tokens=["<unk>"],
            show_progress=False,
            initial_alphabet=sorted({c for w in WORDS for c in w} - {" "}),
        ),
    )
    return _fast(_framed(plain, "$A </s>", eos="</s>"), eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def gemma() -> PreTrainedTokenizerFast:
    """A template that writes the start token, refuses a system turn and ends turns with a token that is not the end of
    text."""
    tokenizer = _fast(_framed(_bytes(), "<bos> $A", bos="<bos>", eos="<eos>"), GEMMA, bos_token="<bos>",
                      eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer


def phi_left() -> PreTrainedTokenizerFast:
    """Pads on the left with a token beyond the model's vocabulary; the turn end is an added token that is not called
    special."""
    tokenizer = _fast(_bytes(), PHI, eos_token="<|endoftext|>", padding_side="left")
    tokenizer.add_tokens([AddedToken(t, normalized=False)
                          for t in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


KINDS = {f.__name__: cache(f)
         for f in (letters, bytes_chatml, bytes_bos, bytes_bos_eos, metaspace_llama2, unigram_eos, gemma, phi_left)}
