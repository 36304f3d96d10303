"""The shared path: the same numbers as the plain way, or a fallback with its reason. About 60 seconds on two cores."""
import copy
import json

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lire_nb.base.errors import LireError
from lire_nb.logprobs import dataset_logps, list_logps, reference_logps, token_ratio
from lire_nb.losses import lire_loss
from lire_nb.path_check import check_paths
from lire_nb.shared_prompt import ListCollator, token_logps, tokenize_list

tf.logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 97
BASE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=96,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)
PLAIN = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=96, bos_token_id=1, eos_token_id=2)
SHARED = {
    "llama": lambda: tf.LlamaConfig(**BASE), "llama-tied": lambda: tf.LlamaConfig(**BASE, tie_word_embeddings=True),
    "mistral-window": lambda: tf.MistralConfig(**BASE, sliding_window=5),
    "mixtral": lambda: tf.MixtralConfig(**BASE, num_local_experts=4), "qwen2": lambda: tf.Qwen2Config(**BASE),
    "qwen2-window": lambda: tf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**BASE),
    "gemma": lambda: tf.GemmaConfig(**BASE),
    "gemma2": lambda: tf.Gemma2Config(**BASE, query_pre_attn_scalar=8, sliding_window=5, final_logit_softcapping=3.0,
                                      attn_logit_softcapping=2.0),
    "gemma3": lambda: tf.Gemma3TextConfig(**BASE, query_pre_attn_scalar=8, sliding_window=5, sliding_window_pattern=2),
    "phi3": lambda: tf.Phi3Config(**BASE, sliding_window=6),
    "gpt2": lambda: tf.GPT2Config(**GPT), "gpt-neox": lambda: tf.GPTNeoXConfig(**PLAIN),
    "opt": lambda: tf.OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                num_attention_heads=4, max_position_embeddings=96, word_embed_proj_dim=32,
                                pad_token_id=0),
    "stablelm": lambda: tf.StableLmConfig(**BASE), "cohere": lambda: tf.CohereConfig(**BASE, logit_scale=0.3),
    "cohere2": lambda: tf.Cohere2Config(**BASE, sliding_window=5, logit_scale=0.3),
    "granite": lambda: tf.GraniteConfig(**BASE, logits_scaling=4.0), "olmo2": lambda: tf.Olmo2Config(**BASE),
    "starcoder2": lambda: tf.Starcoder2Config(**BASE, sliding_window=6),
}
FALLBACK = {
    "gpt-j": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "gpt-neo": lambda: tf.GPTNeoConfig(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4,
                                       max_position_embeddings=96, window_size=4,
                                       attention_types=[[["global", "local"], 1]]),
    "falcon": lambda: tf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "codegen": lambda: tf.CodeGenConfig(**GPT, rotary_dim=4),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=96),
    "mamba": lambda: tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    "gpt-oss": lambda: tf.GptOssConfig(**BASE, num_local_experts=2, num_experts_per_tok=1, sliding_window=5),
    "lfm2": lambda: tf.Lfm2Config(**BASE, layer_types=["conv", "full_attention"]),
}


def tiny(config, **options):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, **options).eval()


def lists_of(sizes, seed=0):
    "[(prompt length, completion lengths)] as tokenized lists of random tokens."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    return [{"id": str(b), "prompt_ids": draw(p), "completion_ids": [draw(r) for r in rs],
             "rewards": torch.randn(len(rs), generator=generator).tolist()}
            for b, (p, rs) in enumerate(sizes)]


def one_by_one(model, lists):
    "The plain way: each candidate alone, full log-softmax."
    table = torch.zeros(len(lists), max(len(one["completion_ids"]) for one in lists),
                        dtype=torch.promote_types(model.dtype, torch.float32))
    for b, one in enumerate(lists):
        for j, ids in enumerate(one["completion_ids"]):
            logp = model(torch.tensor([one["prompt_ids"] + ids])).logits[0].to(table.dtype).log_softmax(-1)
            start = len(one["prompt_ids"])
            table[b, j] = torch.stack([logp[start + k - 1, i] for k, i in enumerate(ids)]).sum()
    return table


def loss_and_gradients(model, logps, batch):
    loss = lire_loss(logps, batch["rewards"], batch["mask"], temperature=5.0).sum()
    params = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, params, allow_unused=True)


def assert_same(found, expected, rtol=1e-4):
    "Loss and every gradient, relative; a gradient that is zero in theory (a key's bias) is held against the largest."
    assert_close(found[0], expected[0].to(found[0].dtype), rtol=rtol, atol=1e-6)
    floor = 1e-3 * max(float(g.norm()) for g in expected[1] if g is not None)
    for a, b in zip(found[1], expected[1]):
        assert (a is None) == (b is None)
        if b is not None:
            assert float((a - b).norm()) <= rtol * max(float(b.norm()), floor)


SIZES = st.lists(st.tuples(st.integers(1, 16), st.lists(st.integers(1, 12), min_size=1, max_size=5)), min_size=1,
                 max_size=3)
MODELS: dict = {}


@pytest.mark.parametrize("family", SHARED)
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(sizes=[(16, [12, 1, 7, 3])])
@example(sizes=[(1, [1])])
@given(sizes=SIZES)
def test_shared_is_exact(family, sizes):
    model = MODELS.setdefault(family, tiny(SHARED[family]()))
    check = check_paths(model)
    assert check.shared and check.head == "chunks" and check.reason == ""
    lists = lists_of(sizes)
    batch = ListCollator()(lists)
    plain = loss_and_gradients(model, one_by_one(model, lists), batch)
    for impl in ("padded", "shared"):
        assert_same(loss_and_gradients(model, list_logps(model, batch, impl=impl)[0], batch), plain)


@pytest.mark.parametrize("family", FALLBACK)
def test_other_families_fall_back_and_stay_right(family, caplog):
    model = tiny(FALLBACK[family]())
    before = model.config._attn_implementation
    lists = lists_of([(9, [3, 1, 9]), (2, [5]), (11, [4, 6])])
    batch = ListCollator()(lists)
    plain = loss_and_gradients(model, one_by_one(model, lists), batch)
    assert_same(loss_and_gradients(model, list_logps(model, batch)[0], batch), plain)
    check = check_paths(model)
    assert not check.shared and check.reason and model.config._attn_implementation == before
    assert len(caplog.records) == 1 and check.reason in caplog.text  # said once, with the reason
    with pytest.raises(LireError, match="not exact for this model"):
        list_logps(model, batch, impl="shared")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_both_attention_implementations(family, implementation):
    model = tiny(SHARED[family](), attn_implementation=implementation)
    lists = lists_of([(9, [3, 1, 9]), (14, [5, 5])])
    batch = ListCollator()(lists)
    plain = loss_and_gradients(model, one_by_one(model, lists), batch)
    assert check_paths(model).shared
    assert_same(loss_and_gradients(model, list_logps(model, batch, impl="shared")[0], batch), plain)
    # with our attention function in place
    assert_same(loss_and_gradients(model, list_logps(model, batch, impl="padded")[0], batch), plain)
    assert_same(loss_and_gradients(model, one_by_one(model, lists), batch), plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    config = SHARED[family]()
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = tiny(config)
    lists = lists_of([(12, [6, 2, 9])])
    batch = ListCollator()(lists)
    plain = loss_and_gradients(model, one_by_one(model, lists), batch)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        found = lire_loss(list_logps(model, batch, impl="shared")[0], batch["rewards"], batch["mask"],
                          temperature=5.0).sum()
        found.backward()  # the reentrant kind knows no autograd.grad
        assert_same((found.detach(), [p.grad for p in model.parameters()]), plain)
    else:
        assert_same(loss_and_gradients(model, list_logps(model, batch, impl="shared")[0], batch), plain)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ["q_proj", "lm_head"]])
def test_lora(targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(SHARED["llama"]()),
                                peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    lists = lists_of([(9, [3, 1, 9]), (2, [5])])
    batch = ListCollator()(lists)
    plain = loss_and_gradients(model, one_by_one(model, lists), batch)
    for impl in ("shared", "padded"):
        assert_same(loss_and_gradients(model, list_logps(model, batch, impl=impl)[0], batch), plain)
    with model.disable_adapter(), torch.no_grad():
        assert_close(list_logps(model, batch, impl="shared")[0], one_by_one(model, lists))


def test_bf16_autocast_is_no_less_precise_than_padding():
    model = tiny(SHARED["llama"]())
    lists = lists_of([(16, [12, 9, 10, 11]), (11, [8, 12])])
    batch = ListCollator()(lists)
    exact = copy.deepcopy(model).double()
    truth = one_by_one(exact, lists)[batch["mask"]]
    error = {}
    for impl in ("padded", "shared"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = list_logps(model, batch, impl=impl)[0]
        assert logps.dtype == torch.float32
        error[impl] = float((logps[batch["mask"]].double() - truth).detach().norm() / truth.detach().norm())
    assert error["shared"] < 2 * error["padded"] + 1e-4 < 0.02


def test_half_precision_weights_are_checked_in_float32_and_come_back_untouched():
    model = tiny(SHARED["llama"]()).bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check = check_paths(model)
    assert check.shared and max(check.errors["shared"].values()) < 1e-4
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_dropout_is_applied_and_the_mode_is_kept():
    config = SHARED["gpt2"]()
    config.attn_pdrop, config.embd_pdrop, config.resid_pdrop = 0.5, 0.0, 0.0
    model = tiny(config).train()
    batch = ListCollator()(lists_of([(9, [3, 1, 9])]))
    torch.manual_seed(0)
    a, b = (list_logps(model, batch, impl="shared")[0].detach() for _ in range(2))
    assert model.training and not torch.equal(a, b)
    torch.manual_seed(0)
    check_paths(model, again=True)  # takes nothing from the generator
    assert torch.equal(list_logps(model, batch, impl="shared")[0].detach(), a)


def test_a_model_that_shares_still_generates_and_saves_as_before(tmp_path):
    model = tiny(SHARED["mistral-window"]())
    prompt = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0)
    before = model.generate(prompt, **options)
    assert check_paths(model).shared and model.config._attn_implementation.startswith("lire_shared")
    assert torch.equal(model.generate(prompt, **options), before)
    model.save_pretrained(tmp_path)
    assert "lire_shared" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_batch_order_and_company_change_nothing():
    model = tiny(SHARED["llama"]())
    lists = lists_of([(9, [3, 1, 9]), (2, [5]), (14, [4, 6])])
    with torch.no_grad():
        together = list_logps(model, ListCollator()(lists), impl="shared")[0]
        for b, one in enumerate(lists):
            alone = list_logps(model, ListCollator()([one]), impl="shared")[0][0]
            assert_close(together[b, : len(alone)], alone, rtol=1e-5, atol=1e-5)
        swapped = [{**one, "completion_ids": one["completion_ids"][::-1]} for one in lists]
        reverse = list_logps(model, ListCollator()(swapped), impl="shared")[0]
    for b, one in enumerate(lists):
        m = len(one["completion_ids"])
        assert_close(reverse[b, :m].flip(0), together[b, :m], rtol=1e-5, atol=1e-5)


def test_auto_shares_where_it_saves_tokens(monkeypatch):
    from lire_nb import shared_prompt

    model = tiny(SHARED["llama"]())
    taken = []
    original = shared_prompt.packed_rows
    check_paths(model)
    monkeypatch.setattr(shared_prompt, "packed_rows", lambda batch: taken.append(1) or original(batch))
    long, alone = ListCollator()(lists_of([(16, [3, 3, 3])])), ListCollator()(lists_of([(16, [3])]))
    assert token_ratio(long) > 2 and token_ratio(alone) == 1
    list_logps(model, long)
    assert len(taken) == 1
    list_logps(model, alone)
    assert len(taken) == 1


def test_per_token_values_add_up():
    model = tiny(SHARED["gemma2"]())
    batch = ListCollator()(lists_of([(9, [3, 1, 9]), (2, [5])]))
    for impl in ("padded", "shared"):
        table, lengths, tokens = list_logps(model, batch, impl=impl, per_token=True)
        sums = torch.stack([part.sum() for part in tokens.split(batch["completion_lengths"].tolist())])
        assert_close(table[batch["mask"]], sums)
        assert lengths[batch["mask"]].tolist() == batch["completion_lengths"].tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), chunk=st.integers(1, 50), seed=st.integers(0, 9))
def test_chunks_do_not_matter(tokens, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
                            for shape in ((tokens, 6), (11, 6), (11,)))
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    bend = lambda x: torch.tanh(x / 2) * 2  # noqa: E731
    ours = token_logps(hidden, weight, targets, bias, chunk, bend)
    oracle = bend(hidden @ weight.T + bias).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert_close(ours, oracle)
    for a, b in zip(*(torch.autograd.grad((v * v).sum(), (hidden, weight, bias)) for v in (ours, oracle))):
        assert_close(a, b)


class Letters:
    "A tokenizer of letters, for the tiny vocabulary."
    eos_token_id, pad_token_id, bos_token_id, chat_template = 2, 0, 1, None

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def get_vocab(self):
        return {}


def records(n):
    return [{"id": f"r{i}", "prompt": "abcdefgh"[: 2 + i % 6] + str(i), "completions": ["xy" * (1 + i % 3), "z"],
             "rewards": [1.0, 0.0], "sources": ["a", "b"], "meta": {}} for i in range(n)]


def test_reference_log_probs_do_not_depend_on_the_order_of_the_lists(tmp_path):
    model, lists = tiny(SHARED["llama"]()), records(23)
    shuffled = [lists[i] for i in torch.randperm(23, generator=torch.Generator().manual_seed(1)).tolist()]
    by_id = [dict(zip((r["id"] for r in some), dataset_logps(model, Letters(), some, batch_size=4)))
             for some in (lists, shuffled)]
    assert by_id[0] == by_id[1]
    kept = [dict(zip((r["id"] for r in some), reference_logps(model, Letters(), some, tmp_path / str(k), batch_size=4)))
            for k, some in enumerate((lists, shuffled))]
    assert kept[0] == kept[1] == {k: v[0] for k, v in by_id[0].items()}
    files = [next((tmp_path / str(k)).iterdir()) for k in range(2)]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_an_edited_answer_is_computed_anew_and_the_rest_is_not(tmp_path, monkeypatch):
    from lire_nb import logprobs

    model, lists = tiny(SHARED["llama"]()), records(8)
    first = reference_logps(model, Letters(), lists, tmp_path)
    asked = []
    original = logprobs.dataset_logps

    def spy(model, tokenizer, some, **options):  # they come one at a time
        some = list(some)
        asked.extend(r["id"] for r in some)
        return original(model, tokenizer, some, **options)

    monkeypatch.setattr(logprobs, "dataset_logps", spy)
    lists[3] = lists[3] | {"completions": ["changed", "z"]}
    second = reference_logps(model, Letters(), lists, tmp_path)
    assert asked == ["r3"] and second[3] != first[3] and second[:3] == first[:3]


@pytest.mark.parametrize(("limits", "kept"),
                         [({"max_prompt_length": 3}, (3, 5)), ({"max_completion_length": 2}, (6, 2)),
                          ({"context": 8}, (6, 2)), ({"context": 7, "max_prompt_length": 4}, (4, 3))])
def test_cuts_are_made_where_they_are_said(limits, kept):
    record = {"id": "r", "prompt": "abcdef", "completions": ["uvwx"], "rewards": [1.0]}
    whole, tokens = tokenize_list(record, Letters()), tokenize_list(record, Letters(), **limits)
    assert (len(tokens["prompt_ids"]), len(tokens["completion_ids"][0])) == kept
    assert tokens["prompt_ids"] == whole["prompt_ids"][-kept[0] :]
    assert tokens["completion_ids"][0] == whole["completion_ids"][0][: kept[1]]
    assert tokens["cut"] == (int(kept[0] < 6), int(kept[1] < 5))


@pytest.mark.parametrize(("change", "limits", "words"), [
    ({"completions": [""], "meta": {"finish_reasons": ["length"]}}, {}, ["no token", "completions[0]", "'the-list'"]),
    ({}, {"context": 6}, ["no room", "'the-list'", "6 tokens"]),
    ({}, {"max_completion_length": 0}, ["no room", "'the-list'"]),
    ({}, {"max_prompt_length": 0}, ["no room", "'the-list'"])])
def test_errors_name_the_record(change, limits, words):
    with pytest.raises(LireError) as e:
        tokenize_list({"id": "the-list", "prompt": "abcdef", "completions": ["uvwx"], "rewards": [1.0]} | change,
                      Letters(), **limits)
    assert all(word in str(e.value) for word in words), str(e.value)
