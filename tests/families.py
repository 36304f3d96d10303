"""Every causal family of transformers as a tiny random model, held against each candidate alone: `python
tests/families.py [NAME …]` prints a line each and writes data/results/families.jsonl; with names, these lines alone."""
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
import torch
import transformers as tf

from lire_nb.base.errors import LireError
from lire_nb.logprobs import list_logps
from lire_nb.path_check import check_paths
from lire_nb.shared_prompt import ListCollator

TABLE = Path(__file__).resolve().parent.parent / "data" / "results" / "families.jsonl"
VOCAB, LARGEST, TOLERANCE = 97, 2e7, 1e-4  # tokens; parameters of a model that counts as tiny; relative error
VERDICTS = ("exact", "fallback", "refused", "wrong", "not built")
# What makes a configuration small, whatever the family calls it; a nested configuration is made small in the same way.
SMALL = {
    VOCAB: "vocab_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_key_value_heads num_experts_per_tok "
       "num_experts_per_token moe_topk top_k moe_top_k "
       "num_kv_heads mamba_expand expand num_attention_groups",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts mamba_n_groups n_groups "
       "num_nextn_predict_layers moe_num_shared_experts num_key_value_groups",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
       "num_local_experts num_experts n_routed_experts moe_num_experts "
       "mamba_d_state state_size ssm_state_size mamba_d_conv conv_kernel linear_conv_kernel_dim rotary_dim "
       "conv_L_cache linear_num_key_heads linear_num_value_heads "
       "zero_expert_num index_n_heads mamba_num_heads mamba_n_heads n_mamba_heads time_step_rank",
    5: "sliding_window local_window_size window_size attention_window_size",
    8: "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim kv_lora_rank kv_channels linear_key_head_dim "
       "linear_value_head_dim index_topk attention_head_dim "
       "hidden_size_per_layer_input mamba_d_head mamba_head_dim chunk_size mamba_chunk_size query_pre_attn_scalar d_kv",
    16: "qk_head_dim index_head_dim moe_intermediate_size shared_expert_intermediate_size q_lora_rank "
        "expert_ffn_hidden_size moe_ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size",
    32: "hidden_size d_model n_embd word_embed_proj_dim embedding_size dim_model emb_dim mamba_d_ssm lru_width "
        "embed_dim",
    48: "intermediate_size ffn_dim d_ff dim_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
        "ffn_intermediate_size dff mlp_hidden_size dense_intermediate_size d_inner",
    64: "mamba_intermediate_size",
    96: "max_position_embeddings n_positions max_seq_len max_target_positions context_length max_sequence_length n_ctx",
    0: "pad_token_id num_kv_shared_layers",
}
VALUES = {name: value for value, names in SMALL.items() for name in names.split()}
VALUES |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1}
# that have no default
MAYBE = ("head_dim", "pad_token_id", "num_experts_per_tok", "moe_topk", "num_key_value_heads", "q_lora_rank")
# What a family needs besides.
EXTRA: dict[str, dict] = {
    "Bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "Dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}, "Dots1": {"n_routed_experts": 4},
    "Ernie4_5_Moe": {"moe_k": 2},
    "Gemma4Assistant": {"hidden_size_per_layer_input": 0}, "Gemma4UnifiedAssistant": {"hidden_size_per_layer_input": 0},
    "GraniteMoeHybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"]}, "Mamba2": {"num_heads": 8},
    "RoCBert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "Reformer": {"axial_pos_embds": False, "lsh_attn_chunk_length": 96, "local_attn_chunk_length": 96},
    "Xmod": {"default_language": "en_XX"}, "Zaya": {"num_experts_per_tok": 1},
}
# Tried one after the other until a model can be built: a family may tie the numbers of its heads, or of its layers,
# together.
VARIANTS = ({}, {"num_key_value_heads": 4}, {"layers": "as they are"},
            {"num_key_value_heads": 4, "layers": "as they are"})
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layer_types")


def shrunk(config: dict, layers: str | None = None) -> dict:
    "Small values for the settings of a configuration; its layers may stay as they are."
    found = {}
    for name, value in config.items():
        if layers and name in LAYERS:
            continue
        if name == "per_layer_config" and value:  # exceptions by number of layer
            found[name] = {1: {}}
        elif isinstance(value, dict) and name.endswith("_config"):
            found[name] = {**value, **shrunk(value, layers)}
        elif name in VALUES and (isinstance(value, int) and not isinstance(value, bool) or value is None
                                 and name in MAYBE):
            found[name] = VALUES[name]
        elif name == "intermediate_size" and isinstance(value, list):
            found[name] = VALUES[name]
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(value))
            found[name] = kinds + kinds[:1] * (2 - len(kinds))  # each kind once, two layers at least
    if found.get("layer_types"):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in found:
                found[name] = len(found["layer_types"])
    return found


def tiny(config_class) -> torch.nn.Module:
    "A random model of the family; raises `LireError` with the reason where none can be built in this way."
    reasons = []
    for variant in VARIANTS:
        try:
            return _tiny(config_class, **variant)
        except LireError as e:
            reasons.append(str(e))
    raise LireError(reasons[0])


def _tiny(config_class, layers: str | None = None, **more) -> torch.nn.Module:
    try:
        default = config_class().to_dict()
        options = {**shrunk(default, layers), **({"is_decoder": True} if "is_decoder" in default else {})}
        config = config_class(**{**options, **{k: v for k, v in more.items() if k in default},
                                 **EXTRA.get(name_of(config_class), {})})
        with torch.device("meta"):
            size = sum(p.numel() for p in tf.AutoModelForCausalLM.from_config(config).parameters())
    except Exception as e:
        raise LireError(f"configuration: {first_line(e)}") from e
    if size > LARGEST:
        raise LireError(f"{size / 1e6:,.0f} million parameters, its size has other names")
    try:
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for p in model.parameters():  # gates and biases that begin at zero would hide what they do
                p.add_(torch.randn_like(p) * 0.05)
            out = model(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]))
        if not torch.isfinite(out.logits).all():
            raise ValueError("its logits are not finite")
        return model
    except Exception as e:
        raise LireError(f"forward pass: {first_line(e)}") from e


def name_of(config_class) -> str:
    return config_class.__name__.removesuffix("Config")


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split()) or '-'}"[:240]


def lists_of(sizes: list, seed: int = 0) -> list[dict]:
    "[(prompt length, completion lengths)] as tokenized lists of random tokens."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [{"id": str(b), "prompt_ids": draw(p), "completion_ids": [draw(r) for r in rs], "rewards": [0.0] * len(rs)}
            for b, (p, rs) in enumerate(sizes)]


LISTS = lists_of([(9, [3, 1, 9]), (2, [5]), (11, [4, 6])])


def alone(model, lists: list[dict]) -> torch.Tensor:
    "The oracle: each candidate in a row of its own, the whole softmax, tokens picked one by one."
    sums = []
    for one in lists:
        for ids in one["completion_ids"]:
            row = one["prompt_ids"] + ids
            logits = model(torch.tensor([row[:-1]])).logits[0].double()  # the last token predicts nothing that counts
            start = len(one["prompt_ids"]) - 1
            sums.append(sum(logits[start + k, i] - logits[start + k].exp().sum().log() for k, i in enumerate(ids)))
    return torch.stack(sums)


def gradients(model, sums: torch.Tensor) -> list:
    mix = torch.linspace(-1, 1, len(sums), dtype=sums.dtype)
    return torch.autograd.grad((sums * mix).sum(), [p for p in model.parameters() if p.requires_grad],
                               allow_unused=True)


def error(model, sums: torch.Tensor, truth: torch.Tensor, right: list) -> float:
    "Relative, over the values and each parameter's gradient."
    total = torch.stack([g.norm() for g in right if g is not None]).norm()
    found = gradients(model, sums)
    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-2 * total)) if a is not None else float("inf")
                for a, b in zip(found, right) if b is not None)
    return max(float((sums.double() - truth).detach().norm() / truth.detach().norm()), worst)


def verdict(model) -> dict:
    "One family's line: verdict, reason, the largest relative error."
    batch = ListCollator()(LISTS)
    truth, oracle = None, ""
    for training in (False, True):  # some have no gradients in eval mode
        try:
            model.train(training)
            truth = alone(model, LISTS)
            right = gradients(model, truth)
            break
        except Exception as e:
            truth, oracle = None, first_line(e)
            for m in model.modules():
                m.__dict__.update({"p": 0.0} if isinstance(m, torch.nn.Dropout) else {})
    try:
        check = check_paths(model)
        found = {impl: list_logps(model, batch, impl=impl)[0][batch["mask"]]
                 for impl in ("auto", "padded", *(["shared"] if check.shared else []))}
    except LireError as e:
        return {"verdict": "refused", "reason": e.reason.removeprefix("its log-probs cannot be verified: ")[:240],
                "error": None}
    except Exception as e:
        return {"verdict": "wrong", "reason": f"fails: {first_line(e)}", "error": None}
    if truth is None:
        return {"verdict": "wrong", "reason": f"no truth ({oracle})", "error": None}
    worst = max(error(model, sums, truth, right) for sums in found.values())
    kind = "wrong" if not worst < TOLERANCE else "exact" if check.shared else "fallback"
    return {"verdict": kind, "reason": check.reason, "error": float(f"{worst:.1e}")}


class Late(BaseException):
    "Not an error that a check may take for an answer."


def family(config_class, seconds: int = 300) -> dict:
    "A family's line of the table."
    def late(*_):
        raise Late(f"not done after {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        model = tiny(config_class)
        found = verdict(model)
    except (LireError, Late) as e:
        found = {"verdict": "not built", "reason": str(e), "error": None}
    finally:
        signal.alarm(0)
    return {"family": name_of(config_class), **found}


def classes() -> list:
    "The configurations of transformers' causal models, each once, by name."
    return sorted({c for c in tf.MODEL_FOR_CAUSAL_LM_MAPPING}, key=lambda c: c.__name__.lower())


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for c in classes():
        if not names or name_of(c) in names:
            rows.append(family(c))
            print("{family:24} {verdict:10} {error!s:8} {reason}".format(**rows[-1]), flush=True)
    print({v: sum(r["verdict"] == v for r in rows) for v in VERDICTS})
    known = [json.loads(line) for line in TABLE.read_text().splitlines()] if names else []
    rows = sorted({r["family"]: r for r in [*known, *rows]}.values(), key=lambda r: r["family"].lower())
    TABLE.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return int(any(r["verdict"] == "wrong" for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
