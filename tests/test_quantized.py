"""QLoRA: an adapter on 4-bit weights. Where bitsandbytes is not installed this is skipped, and says so:
`pip install bitsandbytes`, then run this file."""
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from lire_nb import LIREConfig, LIRETrainer, load_policy, make_record
from lire_nb.adapters import keep_gradients
from lire_nb.models import load_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                                reason="bitsandbytes is not installed: 4-bit weights cannot be tried here")


def test_an_adapter_on_4_bit_weights_learns_and_is_loaded_back(tmp_path):
    """The 4-bit weights stay as they are, the adapter moves, the loss falls; the adapter loads on 4-bit weights again and
    computes what was trained."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2)).save_pretrained(tmp_path / "base")
    load_tokenizer("smollm2").save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model, tokenizer = load_policy(tmp_path / "base", quantization_config=nf4, device="cpu")
    kinds = {type(m).__name__ for m in model.modules()}
    assert "Linear4bit" in kinds
    with torch.no_grad():
        model(torch.arange(8)[None])  # read once: on some processors the weights are packed now, and pass no gradient
    keep_gradients(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lists = [make_record(f"The {what} was", [" good", " bad", " so so"], rewards=[1.0, 0.0, 0.4], meta={"chat": False})
             for what in ("film", "book", "concert", "meal")]
    args = LIREConfig(str(tmp_path / "out"), learning_rate=0.05, num_train_epochs=8, bf16=False, use_cpu=True,
                      lr_scheduler_type="constant", warmup_steps=0, report_to="none", save_strategy="no", temperature=5.0)
    trainer = LIRETrainer(model, args, lists, processing_class=tokenizer,
                          peft_config={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert losses[-1] < losses[0] - 0.01 and all(h["grad_norm"] > 0 for h in trainer.state.log_history if "loss" in h)
    after = dict(trainer.model.get_base_model().named_parameters())
    assert all(torch.equal(value, after[n.replace("q_proj", "q_proj.base_layer").replace("v_proj", "v_proj.base_layer")
                                        if n not in after else n]) for n, value in before.items())
    trainer.save_model(str(tmp_path / "adapter"))
    again, _ = load_policy(tmp_path / "adapter", quantization_config=nf4, device="cpu")
    keep_gradients(again)  # else it is read in bfloat16, and the difference is that of the rounding
    ids = torch.arange(100, 116)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
