"""Log-probs that a check must not wave through: FAULTS 14, 15, the length parts of 29, and relatives. About 30 seconds
on one core."""
import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny_policy import make_start
from torch.testing import assert_close
from transformers.integrations.neftune import activate_neftune

from lire_nb import shared_prompt
from lire_nb.base.errors import LireError
from lire_nb.enhancement import train_policy
from lire_nb.logprobs import dataset_logps, list_logps, reference_logps
from lire_nb.models import context_of
from lire_nb.path_check import check_paths
from lire_nb.records import make_record
from lire_nb.shared_prompt import ListCollator
from lire_nb.training import LIREConfig, LIRETrainer

peft = pytest.importorskip("peft")
tf.logging.set_verbosity_error()
pytestmark = pytest.mark.usefixtures("one_thread")
BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8, max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
BERT = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LORA = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


def tiny(config=None, **options):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config or tf.LlamaConfig(**BASE), **options).eval()


def stronger(model):
    "Fresh weights hardly attend; here positions matter."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def lists_of(sizes, ending=()):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, 97, (n,), generator=generator).tolist()  # noqa: E731
    return [{"id": str(b), "prompt_ids": [*draw(p), *ending], "completion_ids": [draw(r) for r in rs],
             "rewards": [float(r) for r in rs]}
            for b, (p, rs) in enumerate(sizes)]


LISTS = lists_of([(9, [3, 1, 9]), (2, [5]), (11, [4, 6])])


def alone(model, lists):
    "Each candidate in a row of its own."
    sums = []
    for one in lists:
        for ids in one["completion_ids"]:
            logps = model(input_ids=torch.tensor([one["prompt_ids"] + ids])).logits[0].float().log_softmax(-1)
            start = len(one["prompt_ids"])
            sums.append(sum(logps[start - 1 + k, i] for k, i in enumerate(ids)))
    return torch.stack(sums)


def assert_right(model, lists=LISTS):
    "Every path that is offered agrees with each candidate alone; returns the paths."
    batch, truth = ListCollator()(lists), alone(model, lists).detach()
    paths = ["auto", "padded"]
    for impl in ("auto", "padded", "shared"):
        try:
            found = list_logps(model, batch, impl=impl)[0][batch["mask"]]
        except LireError as e:
            assert impl == "shared" and "not exact" in str(e), e
            continue
        assert_close(found.detach(), truth, rtol=1e-4, atol=1e-4)
        paths += [impl] * (impl == "shared")
    return paths


def refuses(call, match):
    with pytest.raises(LireError, match=match) as e:
        call()
    assert "\n" not in str(e.value)


# 14: a check that shared the flaw it should find


VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "context-aware": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1],
                                            cpt_tokens_type_mask=[1, 2, 2]),
}


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("config", [lambda: tf.LlamaConfig(**BASE), lambda: tf.GPT2Config(**GPT, n_positions=96)],
                         ids=["llama", "gpt2"])
def test_14_virtual_tokens_before_the_row_are_refused(kind, config):
    model = peft.get_peft_model(tiny(config()), VIRTUAL[kind]())
    for impl in ("auto", "padded", "shared"):
        refuses(lambda: list_logps(model, ListCollator()(LISTS), impl=impl),
                "11 positions of logits for a row of 8 tokens")


def test_14_a_prefix_is_right_or_refused():
    model = peft.get_peft_model(tiny(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    assert assert_right(model) == ["auto", "padded"]
    assert context_of(model) == 93  # the prefix takes room


def test_14_the_trainer_refuses_before_the_work(tmp_path):
    make_start(tmp_path / "start")
    for impl in ("auto", "padded"):
        refuses(lambda: LIRETrainer(str(tmp_path / "start"), config(tmp_path, logps_impl=impl), train_dataset=RECORDS,
                                    peft_config=VIRTUAL["prompt tuning"]()), "cannot be verified")


@pytest.mark.parametrize("asked", [
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, VIRTUAL["prompt tuning"](), VIRTUAL["p-tuning"]()])
def test_14_a_learned_prompt_is_refused_before_a_policy_is_trained(tmp_path, asked):
    """peft cannot load it to be trained again, so the folder would be no policy: said while nothing is there yet."""
    make_start(tmp_path / "start")
    refuses(lambda: train_policy(tmp_path / "start", RECORDS, tmp_path / "new", trainer_options={"peft_config": asked},
                                 use_cpu=True, bf16=False), "learns a prompt")
    assert {p.name for p in tmp_path.iterdir()} == {"start"}


@pytest.mark.parametrize("family", ["CpmAnt", "XLNet", "ProphetNet", "Bert"])
def test_14_a_model_that_looks_ahead_is_refused(family):
    configs = {
        "CpmAnt": lambda: tf.CpmAntConfig(vocab_size=97, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
                                          num_hidden_layers=2, prompt_length=4),
        "XLNet": lambda: tf.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48),
        "ProphetNet": lambda: tf.ProphetNetConfig(vocab_size=97, hidden_size=32, num_decoder_layers=2,
                                                  num_decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
                                                  is_encoder_decoder=False,
                                                  max_position_embeddings=96),
        "Bert": lambda: tf.BertConfig(**BERT, is_decoder=False)}
    model = tiny(configs[family]())
    refuses(lambda: list_logps(model, ListCollator()(LISTS)), "cannot be verified")


def test_14_an_encoder_with_a_decoder_is_refused_in_one_line():
    t5 = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1,
                                                   num_heads=4))
    bart = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1,
                                                         encoder_attention_heads=4, decoder_attention_heads=4,
                                                         encoder_ffn_dim=48, decoder_ffn_dim=48))
    for model in (t5, bart):
        refuses(lambda: list_logps(model, ListCollator()(LISTS)), "encoder with a decoder")


@pytest.mark.parametrize("part", ["padded_rows", "packed_rows", "_forward_logps", "token_logps", "logits_to_logps"])
def test_14_the_check_shares_no_code_with_what_it_checks(part, monkeypatch):
    "A mistake in any part that the paths have in common is found."
    original = getattr(shared_prompt, part)

    def wrong(*args, **kwargs):
        found = original(*args, **kwargs)
        return found | {"index": (found["index"] - 1).clamp(min=0)} if isinstance(found, dict) else found * 0.5

    model = tiny()
    monkeypatch.setattr(shared_prompt, part, wrong)
    batch = ListCollator()(LISTS)
    try:
        found = list_logps(model, batch)[0][batch["mask"]]
    except LireError:
        return  # refused
    if part == "packed_rows":  # the padded path needs no part of it
        assert not check_paths(model).shared
    monkeypatch.undo()
    assert_close(found, alone(model, LISTS), rtol=1e-4, atol=1e-4)


def test_14_a_wrong_gradient_is_found(monkeypatch):
    original = shared_prompt._forward_logps

    def blind(model, rows):  # right values, but the gradient of the first half is lost
        found = original(model, rows)
        half = len(found) // 2
        return torch.cat([found[:half].detach(), found[half:]])

    model = tiny()
    monkeypatch.setattr(shared_prompt, "_forward_logps", blind)
    check = check_paths(model)
    assert check.head == "full" and not check.shared


def test_14_the_answer_belongs_to_the_state_of_the_model():
    model = tiny()
    batch = ListCollator()(LISTS)
    assert check_paths(model).shared
    tuned = peft.get_peft_model(model, VIRTUAL["prompt tuning"]())  # an adapter that comes later
    refuses(lambda: list_logps(tuned, batch), "cannot be verified")
    with tuned.disable_adapter():
        assert_right(tuned)
    refuses(lambda: list_logps(tuned, batch), "cannot be verified")
    assert_right(model)  # the model below is as it was


def test_14_another_active_adapter_is_checked_anew():
    model = peft.get_peft_model(tiny(), peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    lists = lists_of([(9, [3, 1, 9]), (4, [5, 2])], ending=(7, 8))
    assert "shared" in assert_right(model, lists)
    model.add_adapter("late", peft.LoraConfig(**LORA, alora_invocation_tokens=[7, 8], init_lora_weights=False))
    assert "shared" in assert_right(model, lists)  # not active yet
    model.set_adapter("late")
    assert "shared" not in assert_right(model, lists)  # begins at some tokens of a row, wherever they stand
    model.set_adapter("default")
    assert "shared" in assert_right(model, lists)


def test_14_an_adapter_that_begins_at_zero_is_checked_as_it_will_be():
    model = peft.get_peft_model(tiny(), peft.LoraConfig(**LORA, alora_invocation_tokens=[7, 8])).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check_paths(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert "shared" not in assert_right(model, lists_of([(9, [3, 1, 9]), (4, [5, 2])], ending=(7, 8)))


def test_14_other_changes_are_checked_anew():
    model = tiny()
    assert "shared" in assert_right(model)
    model.set_attn_implementation("eager")
    assert "shared" in assert_right(model)
    hook = model.model.layers[0].register_forward_hook(lambda m, a,
                                                       out: out.flip(1).cumsum(1).flip(1)
                                                       if torch.is_tensor(out) else out)  # looks ahead
    refuses(lambda: list_logps(model, ListCollator()(LISTS)), "cannot be verified")
    hook.remove()
    assert "shared" in assert_right(model)
    per_row = model.model.layers[0].register_forward_hook(lambda m, a,
                                                          out: out * out.shape[1])  # knows the row's length
    with pytest.raises(LireError):
        list_logps(model, ListCollator()(LISTS), impl="shared")
    per_row.remove()


def test_14_the_check_sees_the_wrapper():
    class Sharper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            out = self.module(**inputs)
            return type(out)(logits=out.logits * 2)

    assert_right(Sharper(tiny()))


def test_14_what_is_right_stays_shared():
    for c in (peft.LoraConfig(**LORA), peft.LoraConfig(**LORA, use_dora=True),
              peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
                             feedforward_modules=["down_proj"]),
              peft.LoraConfig(**LORA, trainable_token_indices=[5, 6])):
        model = peft.get_peft_model(tiny(), c).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        assert "shared" in assert_right(model), c


# 15 and relatives: what depends on the row


def noise_of(model, impl):
    "The largest noise on the embeddings of a batch, and the length of its rows."
    seen, embedding = [], model.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda m, args, out: seen.append((out - torch.nn.functional.embedding(args[0], m.weight)).detach())
    )
    batch = ListCollator()(LISTS)
    list_logps(model, batch, impl=impl)
    hook.remove()
    return float(seen[-1].abs().max()), seen[-1].shape[1]


def test_15_neftune_noise_does_not_depend_on_the_path(caplog):
    model = tiny()
    check_paths(model)  # before the noise, as the trainer does
    hook = activate_neftune(model, 5.0)
    model.train()
    for impl in ("auto", "padded"):
        noise, length = noise_of(model, impl)
        assert length == 18 and noise == pytest.approx(5 / (18 * 32) ** 0.5, rel=0.02)
    refuses(lambda: list_logps(model, ListCollator()(LISTS), impl="shared"), "NEFTune")
    said = [r.message for r in caplog.records if "NEFTune" in r.message]
    model.eval()
    assert "shared" in assert_right(model)
    hook.remove()
    model.train()
    assert "shared" in assert_right(model)
    assert len(said) == 1


def test_15_any_noise_on_the_embeddings_takes_the_padded_path():
    model = tiny().train()
    model.get_input_embeddings().register_forward_hook(lambda m, a,
                                                       out: out + torch.randn_like(out) / out.shape[1]
                                                       if m.training else out)
    refuses(lambda: list_logps(model, ListCollator()(LISTS), impl="shared"), "embeddings")


def test_15_the_trainer_says_so(tmp_path, caplog):
    make_start(tmp_path / "start", dropout=0.0)
    refuses(lambda: LIRETrainer(str(tmp_path / "start"), config(tmp_path, neftune_noise_alpha=5.0, logps_impl="shared"),
                                train_dataset=RECORDS), "NEFTune")
    trainer = LIRETrainer(str(tmp_path / "start"), config(tmp_path, neftune_noise_alpha=5.0), train_dataset=RECORDS)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert sum("NEFTune" in r.message for r in caplog.records) == 1


def longrope(limit):
    return dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0, rope_theta=1e4,
                original_max_position_embeddings=limit)


@pytest.mark.parametrize("limit", [6, 12, 70])
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Phimoe"])
def test_15_rope_that_switches_with_the_length_is_read_as_alone(family, limit):
    extra = {"Phimoe": {"num_local_experts": 4}, "Phi3": {"original_max_position_embeddings": limit}}.get(family, {})
    rope = longrope(limit) | ({"short_mscale": 1.1, "long_mscale": 1.3} if family == "Phimoe" else {})
    model = tiny(getattr(tf, f"{family}Config")(**BASE | extra | {"max_position_embeddings": 200,
                                                                  "rope_parameters": rope}))
    stronger(model)
    lists = lists_of([(9, [3, 1, 9]), (2, [5]), (11, [4, 6])]
                     if limit < 70 else [(66, [3, 9, 1]), (4, [5, 2]), (80, [2, 3])])
    assert "shared" in assert_right(model, lists)


def test_15_dynamic_rope_never_passes_its_limit():
    model = tiny(tf.LlamaConfig(**BASE | {"max_position_embeddings": 16,
                                          "rope_parameters": dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)}))
    refuses(lambda: list_logps(model, ListCollator()(LISTS)), "longer than the model can read")
    assert "shared" in assert_right(model, lists_of([(9, [3, 1, 7])]))


@pytest.mark.parametrize("config", [
    lambda: tf.Ministral3Config(**BASE,
                                rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4,
                                                     original_max_position_embeddings=6, llama_4_scaling_beta=0.5,
                                                     mscale=1.0, mscale_all_dim=1.0)),
    lambda: tf.Llama4TextConfig(**BASE | {"num_local_experts": 2}, intermediate_size_mlp=48, attention_chunk_size=5,
                                floor_scale=4, attn_scale=0.5, no_rope_layers=[0, 1]),
    lambda: tf.MistralConfig(**BASE, sliding_window=5),
], ids=["scaled by position", "scaled and in chunks", "window"])
def test_15_scales_and_windows_are_read_as_alone(config):
    model = tiny(config())
    stronger(model)
    assert_right(model)


# 29: how long a row may be


class Letters:
    "A tokenizer of letters, without a pad token."
    eos_token_id, pad_token_id, bos_token_id, chat_template, name_or_path = 2, None, 1, None, ""
    all_special_tokens, all_special_ids = ["<end>"], [2]

    def __len__(self):
        return 97

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def get_vocab(self):
        return {chr(i): i for i in range(97)}

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids)

    def convert_ids_to_tokens(self, i):
        return chr(i)


RECORDS = [make_record("a prompt of words", [" good", " bad ones"], rewards=[1.0, 0.0], id="a"),
           make_record("another one", [" good", " bad"], rewards=[1.0, 0.0], id="b")]
LONG = [make_record("ask " * 5, [" good" * 4, " bad"], rewards=[1.0, 0.0], id="a")]


def config(folder, **options):
    return LIREConfig(output_dir=str(folder / "out"), max_steps=1, use_cpu=True, bf16=False, report_to=[],
                      disable_tqdm=True, save_strategy="no", **options)


@pytest.mark.parametrize("model",
                         [lambda n: tf.GPT2Config(**GPT, n_positions=n),
                          lambda n: tf.LlamaConfig(**BASE | {"max_position_embeddings": n})],
                         ids=["absolute", "rotary"])
def test_29_rows_beyond_the_context_are_said_or_cut(model):
    model = tiny(model(17))
    for impl in ("auto", "padded"):
        refuses(lambda: list_logps(model, ListCollator()(LISTS), impl=impl),
                "longer than the model can read.*18 tokens.*at most 17")
    [(_, lengths)] = dataset_logps(model, Letters(), LONG, max_prompt_length=12)
    assert lengths == [5, 5]  # cut to the 17 - 12 tokens that are left
    assert reference_logps(model, Letters(), LONG,
                           max_prompt_length=12)[0] == dataset_logps(model, Letters(), LONG, max_prompt_length=12)[0][0]
    refuses(lambda: dataset_logps(model, Letters(), LONG, max_prompt_length=17), "no room")


def test_29_some_places_of_a_table_are_never_used():
    model = tiny(tf.RobertaConfig(**BERT, max_position_embeddings=19, is_decoder=True, pad_token_id=1))
    assert context_of(model) == 17  # two stand before the first position
    refuses(lambda: list_logps(model, ListCollator()(LISTS)), "at most 17")
    assert_right(model, lists_of([(9, [3, 1, 8])]))
    assert context_of(tiny(tf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                        num_attention_heads=4, max_position_embeddings=18,
                                        word_embed_proj_dim=32))) == 18


def test_29_two_models_read_the_same_tokens():
    from lire_nb.evaluation import text_kl

    small, large = (tiny(tf.GPT2Config(**GPT, n_positions=n)) for n in (17, 64))
    kl = text_kl((large, Letters()), (small, Letters()), LONG, max_prompt_length=12)
    assert [len(part) for part in kl[0]] == [5, 5]
    kl = text_kl((small, Letters()), (large, Letters()), LONG, max_prompt_length=12)
    assert [len(part) for part in kl[0]] == [5, 5]


def test_29_exact_kl_of_a_model_that_cannot_be_verified_is_refused():
    from lire_nb.evaluation import text_kl

    start = tiny()
    tuned = peft.get_peft_model(tiny(), VIRTUAL["prompt tuning"]())
    refuses(lambda: text_kl((tuned, Letters()), (start, Letters()), RECORDS), "cannot be verified")


def test_29_exact_kl_beside_a_switch_of_the_rope_is_that_of_each_row_alone():
    from lire_nb.evaluation import token_kl

    rope = {"rope_parameters": longrope(14)}
    policy, start = tiny(tf.LlamaConfig(**BASE | rope)), tiny(tf.LlamaConfig(**BASE | rope))
    with torch.no_grad():
        for model in (policy, start):
            stronger(model)
    together = token_kl(policy, start, ListCollator()(LISTS))
    single = [{**one, "completion_ids": [ids], "rewards": [0.0]} for one in LISTS for ids in one["completion_ids"]]
    assert_close(together, torch.cat([token_kl(policy, start, ListCollator()([one])) for one in single]), rtol=1e-4,
                 atol=1e-5)


def test_29_a_reference_sees_the_tokens_that_the_policy_trains_on(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    policy, reference = (tiny(tf.LlamaConfig(**BASE | {"max_position_embeddings": n})) for n in (24, 96))
    options = dict(loss_type="dpo", max_prompt_length=18)
    trainer = LIRETrainer(policy, config(tmp_path, **options), train_dataset=LONG, processing_class=tokenizer,
                          ref_model=reference)
    row = trainer.train_dataset[0]
    batch = ListCollator()([row | {"ref_logps": None}])
    with torch.no_grad():
        assert_close(torch.tensor([row["ref_logps"]]), list_logps(reference, batch)[0], rtol=1e-4, atol=1e-4)
    assert max(map(len, row["completion_ids"])) <= 6


def make_tokenizer(folder):
    return tf.AutoTokenizer.from_pretrained(make_start(folder / "letters"))


def test_29_a_generator_is_read_once_with_a_reference(tmp_path):
    start = str(make_start(tmp_path / "start"))
    trainer = LIRETrainer(start, config(tmp_path, loss_type="dpo"), train_dataset=(r for r in RECORDS),
                          eval_dataset={"held": (r for r in RECORDS)})
    assert all(row["ref_logps"] is not None and len(row["ref_logps"]) == 2
               for data in (trainer.train_dataset, trainer.eval_dataset["held"]) for row in data)
    assert len(trainer.train_dataset) == 2
    model = tiny()
    assert reference_logps(model, Letters(), iter(RECORDS)) == [logps
                                                                for logps, _ in dataset_logps(model, Letters(),
                                                                                   (r for r in RECORDS))]


def test_29_a_reference_by_name(tmp_path):
    start, other = (str(make_start(tmp_path / name, seed=seed)) for name, seed in (("start", 0), ("other", 1)))
    for given in (other, Path(other)):
        trainer = LIRETrainer(start, config(tmp_path, loss_type="dpo"), train_dataset=RECORDS, ref_model=given)
        own = LIRETrainer(start, config(tmp_path, loss_type="dpo"), train_dataset=RECORDS)
        assert trainer.train_dataset[0]["ref_logps"] != own.train_dataset[0]["ref_logps"]
        trainer.train()
    refuses(lambda: LIRETrainer(start, config(tmp_path, loss_type="dpo"), train_dataset=RECORDS, ref_model=tiny()),
            "another vocabulary")


def test_29_a_pad_is_never_read_whatever_it_is():
    model = tiny()
    lists = [{**one} for one in LISTS]
    assert_close(*(list_logps(model, ListCollator(pad)(lists), impl="padded")[0].detach()
                   for pad in (0, 32000)))  # 32000 has no embedding
    assert dataset_logps(model, Letters(), RECORDS)  # a tokenizer without a pad token


# All families


def test_the_stored_table_of_families_has_nothing_wrong():
    table = Path(__file__).parent.parent / "data/results/families.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    verdicts = {row["family"]: row["verdict"] for row in rows}
    assert len(verdicts) == len(rows) and "wrong" not in verdicts.values()
    built = [v for v in verdicts.values() if v != "not built"]
    assert len(built) > 150 and sum(v == "exact" for v in built) > 80
    assert all(row["reason"] for row in rows if row["verdict"] != "exact")
    assert all(row["error"] < 1e-4 for row in rows if row["verdict"] in ("exact", "fallback"))


REPRESENTATIVE = ("Llama Mistral Mixtral Qwen2 Qwen3 Qwen3Moe Gemma2 Gemma3Text Phi3 Phimoe GPT2 GPTNeoX OPT Cohere2 "
                  "Granite Olmo2 SmolLM3 DeepseekV3 Starcoder2 StableLm Falcon Bloom "
                  "Mamba GptOss Roberta XLNet CpmAnt").split()


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parent / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = [json.loads(line) for line in module.TABLE.read_text().splitlines()]
    return module, {row["family"]: row["verdict"] for row in stored}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_family_is_what_the_table_says(name, families):
    module, stored = families
    found = module.family(getattr(tf, f"{name}Config"))
    assert found["verdict"] == stored[name] != "wrong", found
