"""Settings take effect or are refused in one line, and a training that would learn nothing says so before its first
step."""
import json
import logging
import math
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import warm
from tiny_policy import make_start
from transformers import TrainerCallback

from lire_nb import evaluation, sampling  # before a test puts something else in their place
from lire_nb.base.errors import LireError
from lire_nb.cli import main, settings_of
from lire_nb.enhancement import train_policy
from lire_nb.judges.verdicts import judge_pairs
from lire_nb.lists import save_lists
from lire_nb.logprobs import dataset_logps
from lire_nb.losses import lire_loss
from lire_nb.models import load_policy
from lire_nb.records import lists_dataset, make_record
from lire_nb.resume import last_checkpoint
from lire_nb.rewards import train_reward_model
from lire_nb.rivals import LOSSES
from lire_nb.temperature import suggest_temperature
from lire_nb.training import LIREConfig, LIRETrainer
from lire_nb.uncertain_rewards import train_reward_ensemble

HERE = Path(__file__).parent
WORDS = [" good", " bad", " dull and long", " fine", " odd"]
REWARDS = [1.0, -0.5, 0.25, 0.0, 0.7]
LISTS = [make_record(f"film {n} was", WORDS[: 2 + n % 4], rewards=REWARDS[: 2 + n % 4], id=f"film-{n:02}")
         for n in range(8)]
PAIRS = [{"prompt": f"film {n} was", "chosen": " good", "rejected": " bad"} for n in range(4)]
BASE = dict(learning_rate=5e-3, bf16=False, use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=1,
            save_strategy="no")
ARGS = dict(output_dir="unused", use_cpu=True, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("policies")
    make_start(place / "start", dropout=0.0)
    make_start(place / "start-dropout")
    return place


def trainer(policy, folder, lists=LISTS, eval_lists=None, dtype=torch.float32, **settings):
    names = ("callbacks", "peft_config", "ref_model", "compute_metrics", "preprocess_logits_for_metrics",
             "compute_loss_func")
    options = {name: settings.pop(name) for name in names if name in settings}
    model, tokenizer = load_policy(policy, dtype=dtype) if isinstance(policy, Path) else policy
    return LIRETrainer(model, LIREConfig(**{"output_dir": str(folder), **BASE, **settings}), lists, eval_lists,
                       processing_class=tokenizer, **options)


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def refused(call, *words) -> str:
    with pytest.raises(LireError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text and len(text) < 900, text
    for word in words:
        assert word in text, (word, text)
    return text


def logs(one) -> list[dict]:
    one.train()
    return [h for h in one.state.log_history if "loss" in h]


def warnings_of(caplog, call) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lire_nb"):
        call()
    return [r.getMessage() for r in caplog.records if r.name.startswith("lire_nb")]


# 23: a setting takes effect, or is refused.


@pytest.mark.parametrize("loss", ["rrhf", "slic", "pro"])
def test_23_sft_weight_reaches_the_losses_that_take_it(place, tmp_path, loss):
    without, much = (logs(trainer(place / "start", tmp_path, loss_type=loss, sft_weight=w, max_steps=1))[0]["loss"]
                     for w in (0.0, 3.0))
    usual, other = (LIREConfig(**ARGS, loss_type=loss, **extra).loss_settings()["sft_weight"]
                    for extra in ({}, {"loss_kwargs": {"sft_weight": 0.3}}))
    assert much > without + 0.5 and usual == {"rrhf": 1.0, "slic": 0.0, "pro": 0.05}[loss] and other == 0.3


@pytest.mark.parametrize("loss, setting", [
    ("dpo", {"temperature": 20.0}), ("dpo", {"sft_weight": 1.0}), ("sft", {"temperature": 5.0}),
    ("rrhf", {"temperature": 5.0}), ("pro", {"length_normalize": True}),
    ("slic", {"reward_transform": "rank"}), ("lire", {"beta": 0.5}),
    ("plackett_luce_dpo", {"reward_transform": "zscore"}), ("sft", {"temperature": "auto"}),
    ("lire", {"beta": 0.1}),
])
def test_23_a_setting_that_the_loss_does_not_take_is_refused(loss, setting):
    refused(lambda: LIREConfig(**ARGS, loss_type=loss, **setting), *setting, loss)


def test_23_a_default_that_is_given_twice_is_refused_too():
    refused(lambda: LIREConfig(**ARGS, temperature="auto", loss_kwargs={"temperature": 2.0}), "temperature",
            "given twice")


def test_23_defaults_are_quiet_for_every_loss(recwarn):
    for loss in LOSSES:
        config = LIREConfig(**ARGS, loss_type=loss, sft_weight=None if loss in ("rrhf", "pro") else 0.0)
        again = LIREConfig(**{k: v
                              for k, v in config.to_dict().items()
                              if k in ("loss_type", "temperature", "sft_weight", "beta", "loss_kwargs")}, **ARGS)
        assert again.loss_settings() == config.loss_settings()
    assert LIREConfig(**ARGS).temperature == "auto"


def test_23_what_a_loss_takes_but_does_not_read_is_refused():
    """Every setting that `LossSpec.only` names changes nothing where it says so, and something where it is read."""
    torch.manual_seed(0)
    lp, R = -torch.rand(3, 4, dtype=torch.float64) * 20 - 5, torch.rand(3, 4, dtype=torch.float64)
    tables, real = {"ref_logps": lp + torch.randn(3, 4), "lengths": torch.randint(3, 9, (3, 4))}, torch.ones_like(lp) > 0
    other_value = {"sft_normalize": ("token", "sum"), "reward_transform": ("rank",), "beta": (0.7,), "clip": (0.3,),
                   "delta": (1.5,)}
    switch = {"variant": ("clip", "topr", "asymre"), "weights": ("lambda", "equal"), "sft_weight": (0.0, 0.5)}
    tried = 0
    for spec in LOSSES.values():
        for name, by, values in spec.only:
            new = next(v for v in other_value[name] if v != spec.settings[name])
            for at in switch[by]:
                both = [spec.call(lp, R, real, tables, {by: at, **more}) for more in ({}, {name: new})]
                reads = at in values if values else at > 0
                assert torch.equal(*both) is not reads, (spec.name, name, at)
                given = {name: new, by: at}
                if reads:
                    LIREConfig(**ARGS, loss_type=spec.name, loss_kwargs=given)
                else:
                    refused(lambda: LIREConfig(**ARGS, loss_type=spec.name, loss_kwargs=given),  # noqa: B023
                            name, "would have no effect", by)
                tried += 1
    assert tried == 4 * 2 + 2 + 3 * 3
    refused(lambda: LIREConfig(**ARGS, loss_type="offline_pg", variant="topr", beta=0.3), "beta", "variant=clip")
    config = LIREConfig(**ARGS, loss_type="offline_pg", variant="topr")  # its own defaults ask for nothing
    assert LIREConfig(**ARGS, loss_type="offline_pg", variant="topr", beta=config.beta).beta == config.beta == 0.01


def test_23_equal_pairs_of_lipo_read_the_order_alone():
    lp, far = torch.tensor([[-3.0, -4.0, -9.0]]), torch.tensor([[5.0, -2.0, 0.5]])
    spec = LOSSES["lipo"]
    ours = spec.fn(lp, far, ref_logps=lp - 1, weights="equal")
    assert torch.equal(ours, LOSSES["dpo"].fn(lp, far, ref_logps=lp - 1, pairs="all", beta=0.05))
    with pytest.raises(ValueError, match="must lie in"):
        spec.fn(lp, far, ref_logps=lp - 1)


@pytest.mark.parametrize("loss, name, text, value", [
    ("lire", "length_normalize", "no", False), ("lire", "length_normalize", "yes", True), ("pro", "reward_gaps", "no", False),
    ("slic", "margin", "2.5", 2.5), ("kto", "threshold", "0.5", 0.5), ("kto", "threshold", "mean", "mean"),
    ("regression", "huber", "none", None), ("plackett_luce_dpo", "top_k", "1", 1)])
def test_23_loss_kwargs_are_read_by_the_types_of_the_loss(loss, name, text, value):
    config = LIREConfig(**ARGS, loss_type=loss, loss_kwargs={name: text})
    for found in (config.loss_settings(), config.loss_kwargs, LIREConfig(**ARGS, loss_type=loss, loss_kwargs={
            name: value}).loss_settings()):
        assert found.get(name) == value and type(found.get(name)) is type(value)


@pytest.mark.parametrize("given", [{"reward_transform": "none"}, {"loss_kwargs": {"reward_transform": "none"}},
                                   {"loss_kwargs": '{"reward_transform": "none"}'}, "--set", "saved"])
def test_23_none_is_a_word_where_a_loss_has_it(place, tmp_path, given):
    """The paper's own equation, on its rewards as they are: the first loss is -sum P R by plain arithmetic."""
    values = [5.0, -3.0, 1.0]
    lists = [make_record("film 1 was", ["good", "bad news", "a day"], values)]
    given = settings_of(["reward_transform=none"]) if given == "--set" else given
    if given == "saved":  # as a trainer keeps it
        told = LIREConfig(**ARGS, reward_transform="none").to_json_string()
        given = {"reward_transform": json.loads(told)["reward_transform"]}
    one = trainer(place / "start", tmp_path / "out", lists, temperature=20.0, max_steps=1, logging_steps=1, **given)
    logps = dataset_logps(one.model, one.processing_class, lists)[0][0]
    weights = [math.exp(x / 20.0) for x in logps]
    right = -sum(w * value for w, value in zip(weights, values)) / sum(weights)
    assert one.args.loss_settings()["reward_transform"] == "none"
    assert logs(one)[0]["loss"] == pytest.approx(right, abs=1e-3)
    assert abs(right) > 0.3, "z-scores would give less"


def test_23_none_is_nothing_where_a_loss_has_no_such_word():
    assert LIREConfig(**ARGS, temperature="none", run_name="None").loss_settings()["temperature"] == "auto"
    refused(lambda: LIREConfig(**ARGS, score="none"), "score", "ratio")
    refused(lambda: LIREConfig(**ARGS, reward_transform="None"), "reward_transform", "zscore")


def test_23_loss_kwargs_that_do_not_fit_are_refused():
    for loss, name, value, allowed in (("lire", "length_normalize", "perhaps", "yes or no"), ("pro", "reward_gaps", 2, "yes"),
                                       ("slic", "margin", "wide", "a finite number"), ("slic", "margin", True, "number"),
                                       ("plackett_luce_dpo", "top_k", 1.5, "whole number")):
        refused(lambda: LIREConfig(**ARGS, loss_type=loss, loss_kwargs={name: value}), name, allowed)  # noqa: B023

    def own(logps, rewards, mask=None, *, gaps: "bool" = True, bare=True, odd: "nowhere" = 1):  # noqa: F821
        return -(logps * rewards).sum(-1)

    read = LIREConfig(**ARGS, loss_type=own, loss_kwargs={"gaps": "off", "bare": "no", "odd": "x"}).loss_settings()
    assert read == {"gaps": "off", "bare": False, "odd": "x"}  # one text that is no annotation: none is read
    own.__annotations__.pop("odd")
    refused(lambda: LIREConfig(**ARGS, loss_type=own, loss_kwargs={"gaps": "perhaps"}), "gaps", "yes or no")


def test_23_a_clock_without_checkpoints_and_a_cache_without_a_reference(place, tmp_path, caplog):
    refused(lambda: LIREConfig(**ARGS, save_strategy="no", save_minutes=5), "save_minutes", "save_strategy=no")
    policy = train_policy(place / "start", LISTS, tmp_path / "policy", max_steps=1, **BASE)  # our own 10 minutes
    assert '"save_minutes": 0' in (policy / "lire_config.json").read_text()
    with caplog.at_level(logging.INFO, logger="lire_nb"):
        trainer(place / "start", tmp_path, reference_cache=str(tmp_path / "cache"))
    assert any("reference_cache is not read: the loss lire" in r.getMessage() for r in caplog.records)


def test_23_a_function_gets_the_settings_that_it_names(place, tmp_path):
    seen = []

    def own(logps, rewards, mask=None, *, temperature=10.0, lengths=None):
        seen.append((temperature, lengths is not None))
        return lire_loss(logps, rewards, mask, temperature=temperature)

    logs(trainer(place / "start", tmp_path, loss_type=own, max_steps=1))
    logs(trainer(place / "start", tmp_path, loss_type=own, temperature=7.0, max_steps=1))
    assert set(seen) == {(10.0, True), (7.0, True)}
    refused(lambda: LIREConfig(**ARGS, loss_type=own, reward_transform="rank"), "reward_transform", "own")
    refused(lambda: LIREConfig(**ARGS, loss_type=own, loss_kwargs={"margin": 2}), "margin", "own")


@pytest.mark.parametrize("setting", [
    {"label_smoothing_factor": 0.1}, {"include_for_metrics": ["inputs"]}, {"batch_eval_metrics": True},
    {"eval_do_concat_batches": False}, {"include_num_input_tokens_seen": True},
    {"label_names": ["x"]}, {"remove_unused_columns": True}, {"save_only_model": True}, {"ignore_data_skip": True},
    {"use_liger_kernel": True}, {"eval_accumulation_steps": 2},
])
def test_23_inherited_settings_without_effect_are_refused(setting):
    refused(lambda: LIREConfig(**ARGS, **setting), *setting, "no effect")


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_23_arguments_of_the_trainer_without_effect_are_refused(place, tmp_path, name):
    refused(lambda: trainer(place / "start", tmp_path, **{name: lambda *_: {}}), name)


def test_23_booleans_and_numbers_are_read_by_the_type_of_their_field():
    words = {"no": False, "off": False, "0": False, "False": False, "yes": True, "on": True, "1": True, "TRUE": True}
    assert {w: settings_of([f"length_normalize={w}"])["length_normalize"] for w in words} == words
    assert settings_of(["bf16=off", "gradient_checkpointing=on", "max_steps=2.0", "learning_rate=1e-5",
                        "run_name=5"]) == {
        "bf16": False, "gradient_checkpointing": True, "max_steps": 2, "learning_rate": 1e-5, "run_name": "5"}
    for wrong in ("length_normalize=maybe", "num_train_epochs=two", "max_prompt_length=100.5", "learning_rate=nan",
                  "seed=none", "max_steps=yes"):
        refused(lambda: settings_of([wrong]), wrong.split("=")[0])
    config = LIREConfig(**ARGS, length_normalize="no", num_train_epochs="2", per_device_train_batch_size=2.0)
    assert config.length_normalize is False and config.num_train_epochs == 2.0
    assert type(config.per_device_train_batch_size) is int


@pytest.mark.parametrize("setting", [
    {"temperature": 0}, {"per_device_train_batch_size": 0}, {"per_device_eval_batch_size": 0},
    {"gradient_accumulation_steps": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1e-5},
    {"num_train_epochs": 0}, {"max_steps": 0}, {"max_prompt_length": 0}, {"max_completion_length": -1},
    {"warmup_steps": float("inf")}, {"adam_beta2": 1.0}, {"max_grad_norm": -1},
    {"lr_scheduler_type": "cosinus"}, {"report_to": "nowhere"}, {"optim": "adamm"}, {"loss_kwargs": "margin"},
    {"save_steps": 0},
    {"log_level": "loud"}, {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"foo": 1}},
    {"temperature": "warm"}, {"loss_type": "simpo", "score": "tokens"},
    {"loss_type": "plackett_luce_dpo", "top_k": 0}, {"loss_type": "infonca", "alpha": 0},
    {"loss_type": "lire", "gamma": 2.0},
])
def test_23_nonsense_is_refused_before_a_policy_is_loaded(tmp_path, setting):
    text = refused(lambda: train_policy("no-such-policy", LISTS, tmp_path / "out", **{**BASE, **setting}))
    assert "no-such-policy" not in text and any(name in text or str(value) in text for name, value in setting.items())


def test_23_what_is_decided_elsewhere_is_refused(tmp_path, capsys):
    save_lists(LISTS, tmp_path / "lists.jsonl")
    for setting, word in (("output_dir=elsewhere", "output_dir"), ("seed=3", "--seed"),
                          ("group_by_length=true", "train_sampling_strategy"),
                          ("label_smoothing_factor=0.1", "no effect")):
        assert main(["train", "--lists", str(tmp_path / "lists.jsonl"), "--out", str(tmp_path / "p"), "--set",
                     setting]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_23_low_precision_weights_that_lose_updates_are_said(place, tmp_path, caplog):
    low = trainer(place / "start", tmp_path, max_steps=1, learning_rate=2e-5, warmup_steps=0, dtype=torch.bfloat16)
    before = flat(low.model)
    said = warnings_of(caplog, low.train)
    moved = (flat(low.model) != before).float().mean().item()
    assert len(said) == 1 and "bfloat16" in said[0] and "float32" in said[0] and "bf16=True" in said[0]
    share = int(said[0].split("about ")[1].split(" %")[0]) / 100
    # gradients that are exactly zero move nothing either
    assert moved < 0.4 and abs((1 - moved) - share) < 0.15, (moved, share)
    assert warnings_of(caplog,
                       trainer(place / "start", tmp_path, max_steps=1, warmup_steps=0, learning_rate=2e-5).train) == []


# 30: going on exactly.


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise InterruptedError


def test_30_persistent_workers_go_on_exactly(place, tmp_path):
    settings = dict(num_train_epochs=3, save_strategy="steps", save_steps=2, per_device_train_batch_size=4,
                    dataloader_num_workers=1, dataloader_persistent_workers=True,
                    eval_strategy="epoch", eval_lists=LISTS[:2])
    whole = trainer(place / "start-dropout", tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(InterruptedError):
        trainer(place / "start-dropout", tmp_path / "broken", callbacks=[Fail()], **settings).train()
    again = trainer(place / "start-dropout", tmp_path / "broken", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(flat(whole.model), flat(again.model))


# 36: the first contact.


def far_apart(count=8, tied=0):
    "Lists whose answers differ by tens of nats under a random policy that reads letters."
    lists = [make_record(f"film {n} was", [" ok", " a very long answer that says much", " a long answer"],
                         rewards=[0.0, 1.0, 0.5], id=str(n)) for n in range(count)]
    return lists + [make_record(f"play {n} was", [" ok", " fine"], rewards=[1.0, 1.0], id=f"tied-{n}")
                    for n in range(tied)]


def test_36_a_one_hot_P_is_said_before_the_first_step_with_a_temperature_that_works(place, tmp_path, caplog):
    lire_nb = pytest.importorskip("lire_nb")
    lists = far_apart()
    said = warnings_of(caplog, lambda: logs(trainer(place / "start", tmp_path, lists, max_steps=2, temperature=2.0)))
    assert len(said) == 1 and "one-hot on 8 of 8 lists at T = 2" in said[0] and "set temperature=" in said[0]
    T = lire_nb.suggest_temperature(lists, place / "start")
    assert f"T ≈ {T:g}" in said[0] and T >= 10
    cold, warm = (logs(trainer(place / "start", tmp_path, lists, max_steps=2, temperature=t)) for t in (2.0, T))
    assert cold[0]["saturated"] == 1.0 and cold[0]["no_signal"] == 0.0 and warm[0]["saturated"] == 0.0
    assert cold[0]["grad_norm"] < 1e-3 < 1e-2 < warm[0]["grad_norm"]
    assert warnings_of(caplog,
                       lambda: logs(trainer(place / "start", tmp_path, lists, max_steps=2, temperature=T))) == []


def test_36_the_suggestion_is_the_smallest_round_one_by_an_own_count(place):
    from lire_nb import suggest_temperature

    pair, lists = load_policy(place / "start"), far_apart(tied=3)
    rows = [logps for logps, _ in dataset_logps(*pair, lists[:8])]
    middle = lambda T: sorted(max(torch.softmax(torch.tensor(r) / T, 0)) for r in rows)[3:5]  # noqa: E731
    T = suggest_temperature(lists, pair)
    below = {1: 2, 2: 2, 5: 2.5}[int(f"{T:e}"[0])]
    assert sum(middle(T)) / 2 < 0.7 <= sum(middle(T / below)) / 2 and T == suggest_temperature(lists[:8], logps=rows)
    per_token = suggest_temperature(lists, pair, length_normalize=True)
    assert per_token < 1 < T
    refused(lambda: suggest_temperature(lists[8:], pair), "no list can teach")


def test_36_the_look_changes_nothing(place, tmp_path, monkeypatch):
    settings = dict(num_train_epochs=2, save_strategy="steps", save_steps=2, num_candidates=2, temperature=0.01)
    looked = trainer(place / "start-dropout", tmp_path / "a", **settings)
    looked.model.model.layers[0].eval()
    looked.train()
    monkeypatch.setattr(LIRETrainer, "_first_look", lambda self: None, raising=False)
    blind = trainer(place / "start-dropout", tmp_path / "b", **settings)
    blind.train()
    assert torch.equal(flat(looked.model), flat(blind.model))


@pytest.mark.parametrize("settings", [
    dict(temperature=1e10), dict(temperature=1e10, max_grad_norm=0.0, optim="adamw_torch"),
    dict(loss_type="dpo", beta=1e-11), dict(temperature=20.0, adam_epsilon=1.0)])
def test_36_a_gradient_that_the_epsilon_swallows_is_said_once(place, tmp_path, caplog, settings):
    own = dict(max_steps=3, learning_rate=1e-3, warmup_steps=0)
    still = trainer(place / "start", tmp_path / "still", **{**own, **settings})
    before = flat(still.model).clone()
    said = [line for line in warnings_of(caplog, still.train) if "epsilon" in line]
    assert len(said) == 1 and "look at temperature" in said[0]
    assert (flat(still.model) - before).abs().mean() < 3e-3 * 0.1  # three steps would move it by 3e-3 at most
    live = trainer(place / "start", tmp_path / "live", **own, temperature=20.0)
    assert not [line for line in warnings_of(caplog, live.train) if "epsilon" in line]
    assert (flat(live.model) - before).abs().mean() > 1e-3


@pytest.mark.parametrize("settings", [
    dict(temperature=1e10, optim="sgd"), dict(loss_type="slic", loss_kwargs={"margin": 0.0}),
    dict(temperature=20.0, learning_rate=1e-12), dict(temperature=1e10, optim="sgd", max_steps=2)])
def test_36_weights_that_have_not_moved_are_said_once(place, tmp_path, caplog, settings):
    own = dict(max_steps=12, learning_rate=1e-3, warmup_steps=0, num_train_epochs=20)
    lists = [dict(record, rewards=[1.0, 0.0, 0.5]) for record in far_apart()]  # the shortest is likeliest, and best
    still = trainer(place / "start", tmp_path / "still", lists, **{**own, **settings})
    before = flat(still.model).clone()
    said = [line for line in warnings_of(caplog, still.train) if "left the weights where they were" in line]
    assert len(said) == 1 and said[0].startswith(f"{min(10, settings.get('max_steps', 12))} steps")
    assert (flat(still.model) - before).norm() < 1e-6 * before.norm()
    live = trainer(place / "start", tmp_path / "live", lists, **own, temperature=20.0)
    assert not [line for line in warnings_of(caplog, live.train) if "left the weights" in line]


def test_36_a_rate_that_float32_rounds_away_is_said_before_the_first_step(place, tmp_path, caplog):
    tiny = trainer(place / "start", tmp_path, max_steps=1, learning_rate=1e-12, warmup_steps=0, temperature=20.0)
    said = [line for line in warnings_of(caplog, tiny.train) if "round to nothing" in line]
    assert len(said) == 1 and "float32" in said[0] and "raise learning_rate" in said[0]


def test_36_a_run_that_goes_on_does_not_look_again(place, tmp_path, caplog):
    settings = dict(num_train_epochs=2, save_strategy="steps", save_steps=2, temperature=0.01,
                    per_device_train_batch_size=2)
    assert warnings_of(caplog, trainer(place / "start", tmp_path, **settings).train)
    assert warnings_of(caplog,
                       lambda: trainer(place / "start", tmp_path,
                                       **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))) == []


def test_36_with_an_adapter_and_with_a_length_normalized_P(place, tmp_path, caplog):
    said = warnings_of(caplog,
                       trainer(place / "start", tmp_path, far_apart(), max_steps=1, warmup_steps=0, temperature=2.0,
                               peft_config={"r": 2, "target_modules": ["q_proj"]}).train)
    assert len(said) == 1 and "one-hot" in said[0]
    assert warnings_of(caplog,
                       trainer(place / "start", tmp_path, far_apart(), max_steps=1, warmup_steps=0, temperature=2.0,
                               length_normalize=True).train) == []


@pytest.mark.parametrize("kind", ["one candidate", "tied", "fewer than two scored"])
def test_36_a_file_without_a_list_that_can_teach_is_refused(place, tmp_path, caplog, monkeypatch, kind):
    texts, rewards = {"one candidate": ([" ok"], [1.0]), "tied": ([" ok", " no"], [0.5, 0.5]),
                      "fewer than two scored": ([" ok", " no"], [None, 0.5])}[kind]
    mute = [make_record(f"film {n} was", texts, rewards=rewards, id=f"mute-{n}") for n in range(3)]
    for loss in ("lire", "dpo", "slic"):
        refused(lambda: trainer(place / "start", tmp_path, mute, loss_type=loss), "no list can teach", kind)
    with monkeypatch.context() as patch:
        patch.setattr("lire_nb.models.load_policy", lambda *_: pytest.fail("the policy was loaded first"))
        refused(lambda: train_policy(place / "start", mute, tmp_path / "out", **BASE), "no list can teach")
    assert logs(trainer(place / "start", tmp_path, mute, loss_type="sft", max_steps=1))[0]["grad_norm"] > 0
    assert logs(trainer(place / "start", tmp_path, mute, sft_weight=1.0, max_steps=1))[0]["grad_norm"] > 0
    said = warnings_of(caplog, lambda: trainer(place / "start", tmp_path, LISTS + mute))
    assert len(said) == 1 and "3 of 11 lists cannot teach" in said[0] and kind in said[0]


# 39: what a user may bring.


def test_39_a_TRL_data_set_is_taken(place, tmp_path):
    raw = datasets.Dataset.from_list(PAIRS)
    one = trainer(place / "start", tmp_path, raw, raw, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert logs(one)[0]["grad_norm"] > 0 and "eval_loss" in one.evaluate(raw) and len(one.train_dataset) == 4
    assert len(trainer(place / "start", tmp_path,
                       [{k: r[k] for k in ("prompt", "completions", "rewards")}
                        for r in LISTS]).train_dataset) == len(LISTS)
    assert train_policy(place / "start", raw, tmp_path / "policy", max_steps=1, **BASE).is_dir()
    # a generator is read once
    assert logs(trainer(place / "start", tmp_path, (r for r in LISTS), loss_type="dpo", max_steps=1))


def test_39_one_line_for_what_cannot_be_used(place, tmp_path):
    refused(lambda: trainer(place / "start", tmp_path, datasets.Dataset.from_list([{"text": "a"}])), "train_dataset")
    refused(lambda: trainer(place / "start", tmp_path, {"train": LISTS}), "split")
    refused(lambda: trainer(place / "start", tmp_path, peft_config={"target_modules": ["query"]}), "peft_config",
            "q_proj")
    refused(lambda: trainer(place / "start", tmp_path, peft_config={"rank": 3}), "peft_config")
    refused(lambda: trainer(place / "start", tmp_path, eval_strategy="steps"), "eval_dataset")
    refused(lambda: trainer(place / "start", tmp_path, ref_model=load_policy(place / "start")[0]), "ref_model", "lire")
    model, tokenizer = load_policy(place / "start")
    refused(lambda: LIRETrainer(model, LIREConfig(output_dir=str(tmp_path), **BASE), LISTS), "processing_class")
    refused(lambda: LIRETrainer(model, LIREConfig(output_dir=str(tmp_path), **BASE), LISTS, processing_class=tokenizer,
                                beta=0.3), "beta")
    tokenizer.eos_token = tokenizer.pad_token = None
    refused(lambda: trainer((model, tokenizer), tmp_path), "end token")


def test_39_encoder_decoder_models_are_refused(place, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    refused(lambda: trainer((t5, load_policy(place / "start")[1]), tmp_path), "T5", "causal")


def test_39_a_reference_by_its_name_and_an_adapter_by_a_dict(place, tmp_path):
    named, loaded = (logs(trainer(place / "start", tmp_path, loss_type="dpo", max_steps=2, ref_model=ref))
                     for ref in (str(place / "start-dropout"), load_policy(place / "start-dropout")[0]))
    assert [h["loss"] for h in named] == [h["loss"] for h in loaded]
    one = trainer(place / "start", tmp_path, peft_config={"r": 2, "target_modules": ["q_proj"]})
    assert sum(p.numel() for p in one.model.parameters() if p.requires_grad) == 2 * 2 * 2 * 16


# 40: trackers and Ctrl-C.


class Tracker(TrainerCallback):
    "What TensorBoard's callback does: a folder in output_dir."

    def on_train_begin(self, args, state, control, **kwargs):
        Path(args.output_dir, "runs", "now").mkdir(parents=True)
        Path(args.output_dir, "runs", "now", "events.out.tfevents.1").write_text("scalars")


def test_40_what_a_tracker_writes_is_kept(place, tmp_path):
    policy = train_policy(place / "start", LISTS, tmp_path / "policy", max_steps=1, callbacks=[Tracker()],
                          **{k: v for k, v in BASE.items() if k != "save_strategy"})
    assert (policy / "runs" / "now" / "events.out.tfevents.1").read_text() == "scalars" and load_policy(policy)
    assert not (tmp_path / "policy.partial").exists()


def test_40_a_tracker_that_is_not_installed_is_one_line(tmp_path):
    import importlib.util

    name = next(n for n in ("neptune", "comet_ml", "clearml", "wandb") if importlib.util.find_spec(n) is None)
    refused(lambda: LIREConfig(**ARGS, report_to=name), name, "installed")


class Press(TrainerCallback):
    "Ctrl-C, at the beginning of the third step, once or twice."

    def __init__(self, times):
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)


@pytest.mark.parametrize("times", [1, 2])
def test_40_ctrl_c_writes_a_checkpoint_and_a_second_one_stops_at_once(place, tmp_path, times):
    settings = {k: v for k, v in BASE.items() if k != "save_strategy"} | {"max_steps": 5}
    whole = flat(load_policy(train_policy(place / "start", LISTS, tmp_path / "whole", **settings))[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as e:
            train_policy(place / "start", LISTS, tmp_path / "policy", callbacks=[Press(times)], **settings)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    kept = last_checkpoint(tmp_path / "policy.partial")
    if times == 1:
        assert kept.name == "checkpoint-3" and "after step 3 of 5; a checkpoint is kept" in str(e.value)
    else:
        assert kept is None and "nothing was saved yet" in str(e.value)
    again = train_policy(place / "start", LISTS, tmp_path / "policy", **settings)
    assert torch.equal(flat(load_policy(again)[0]), whole)


def test_40_ctrl_c_on_the_command_line(place, tmp_path):
    save_lists(LISTS, tmp_path / "lists.jsonl")
    script = tmp_path / "lire.py"
    script.write_text("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                      "from lire_nb.cli import main; sys.exit(main(sys.argv[1:]))")
    command = [script, "train", "--lists", str(tmp_path / "lists.jsonl"), "--policy", str(place / "start"), "--out",
               str(tmp_path / "policy"), "--set", "max_steps=100000", "--set", "save_steps=20"]
    env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with warm.start(*command, cwd=tmp_path, env=env) as run:
        end = time.monotonic() + 120
        while time.monotonic() < end and run.poll() is None:
            if list(tmp_path.glob("policy.partial/checkpoint-*/manifest.json")):
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=60)
        _, error = run.said()
    step = int(last_checkpoint(tmp_path / "policy.partial").name.split("-")[1])
    wanted = f"stopped by Ctrl-C after step {step} of 100000; a checkpoint is kept"
    assert run.returncode == 130 and wanted in error, error[-500:]


# 43: logs that say what the loss saw.


def test_43_pairs_have_accuracies_and_margins(place, tmp_path):
    pairs = datasets.Dataset.from_list(PAIRS)
    one = trainer(place / "start", tmp_path, pairs, loss_type="dpo", beta=0.2, max_steps=6, num_train_epochs=99,
                  ref_model=str(place / "start-dropout"), learning_rate=0.0)
    log = logs(one)[-1]
    assert not {"expected_reward", "best_weight", "entropy"} & log.keys()
    model, ref = (load_policy(place / name) for name in ("start", "start-dropout"))
    lists = [make_record(p["prompt"], [p["chosen"], p["rejected"]], rewards=[1, 0]) for p in PAIRS]
    (own, base) = (torch.tensor([logps for logps, _ in dataset_logps(*m, lists)]) for m in (model, ref))
    implicit = 0.2 * (own - base)
    margins = implicit[:, 0] - implicit[:, 1]
    assert log["margins"] == pytest.approx(margins.mean().item(), abs=1e-5) and log["accuracies"] == pytest.approx(
        (margins > 0).float().mean().item()
    )
    evaluated = one.evaluate(pairs)
    assert {"eval_accuracies", "eval_margins"} <= evaluated.keys() and "eval_expected_reward" not in evaluated


def test_43_lire_keeps_its_expected_reward(place, tmp_path):
    log = logs(trainer(place / "start", tmp_path, max_steps=1))[0]
    assert {"expected_reward", "best_weight", "entropy", "kendall", "no_signal",
            "saturated"} <= log.keys() and "margins" not in log


@pytest.mark.parametrize("words", [("A", "B"), ("first", "second"), ("First", "Second")])
def test_43_a_function_judge_may_say_first_and_second(words):
    def rows(word: str) -> list[dict]:
        return [{"id": f"p{i}", "prompt": f"Question {i}?", "completions": [f"{word} {i}"]} for i in range(4)]

    verdicts = judge_pairs(lambda prompt, first, second: words[0] if first.startswith("new") else words[1],
                           {"start": rows("old"), "LIRE": rows("new")})
    assert {v["verdict"] for v in verdicts} == {"first",
                                                "second"} and {v["preference"] for v in verdicts
                                                               if v["system_a"] == "start"} <= {0.0, 1.0}
    assert len({(v["preference"], v["system_a"]) for v in verdicts}) == 1


def test_readme_states_a_temperature():
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    code = [block for block in text.split("```python")[1:] if "LIREConfig(" in block]
    assert code and all("suggest_temperature" in block.split("```")[0] or "temperature=" in block.split("```")[0]
                        for block in code)
    assert "temperature=2.0" not in text


# What is wrong is said before the work, and what is said when a run is stopped is true.


def said_by(capsys, *command, code=2) -> str:
    capsys.readouterr()
    assert main(list(map(str, command))) == code
    text = capsys.readouterr().err.strip()
    assert "\n" not in text and "Traceback" not in text, text
    return text


@pytest.mark.parametrize("options, word",
                         [(("--lora-rank", "0"), "--lora-rank"), (("--lora-rank", "-3"), "--lora-rank"),
                          (("--lora-alpha", "8"), "--lora-alpha"), (("--lora-targets", "q_proj"), "--lora-targets"),
                                           (("--lora-rank", "2", "--lora-alpha", "0"), "--lora-alpha"),
                          (("--lora-rank", "2", "--lora-targets", ","), "--lora-targets")])
def test_an_adapter_that_cannot_be_is_not_full_training(place, tmp_path, capsys, options, word):
    save_lists(LISTS, tmp_path / "lists.jsonl")
    (tmp_path / "prompts.txt").write_text("a film\nanother\n")
    assert word in said_by(capsys, "train", "--lists", tmp_path / "lists.jsonl", "--policy", place / "start", "--out",
                           tmp_path / "out", *options)
    assert word in said_by(capsys, "enhance", "--prompts", tmp_path / "prompts.txt", "--policy", place / "start",
                           "--reward", "length", "--out", tmp_path / "run", *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lists.jsonl", "prompts.txt"]


def test_the_ending_of_a_file_is_looked_at_before_the_work(place, tmp_path, capsys, monkeypatch):
    save_lists(LISTS, tmp_path / "lists.jsonl")
    (tmp_path / "prompts.txt").write_text("a film\n")
    for name in ("lire_nb.sampling.sample_lists", "lire_nb.rewards.score_lists"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the work was done first"))
    assert ".jsonl" in said_by(capsys, "sample", "--prompts", tmp_path / "prompts.txt", "--policy", place / "start",
                               "--out", tmp_path / "x.txt")
    assert ".jsonl" in said_by(capsys, "score", "--lists", tmp_path / "lists.jsonl", "--reward", "length", "--out",
                               tmp_path / "x.txt")


def test_ctrl_c_says_what_is_kept(place, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    save_lists(LISTS, tmp_path / "lists.jsonl")
    (tmp_path / "prompts.txt").write_text("a film\nanother\n")
    for name in ("lire_nb.sampling.sample_lists", "lire_nb.enhancement.train_policy",
                 "lire_nb.evaluation.evaluate_systems"):
        monkeypatch.setattr(name, stop)
    sample = ("sample", "--prompts", tmp_path / "prompts.txt", "--policy", place / "start", "--out",
              tmp_path / "c.jsonl")
    train = ("train", "--lists", tmp_path / "lists.jsonl", "--policy", place / "start", "--out", tmp_path / "policy")
    assert "nothing was saved" in said_by(capsys, *sample, code=130)
    assert "nothing was saved" in said_by(capsys, *train, code=130)
    (tmp_path / "policy.partial" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "policy.partial" / "checkpoint-3" / "manifest.json").write_text("{}")
    assert "checkpoint is kept" in said_by(capsys, *train, code=130)
    assert "stages that are finished are kept" in said_by(capsys, "evaluate", "--prompts", tmp_path / "prompts.txt",
                                                          "--system", f"start={place / 'start'}", "--judge",
                                                          "length=length", "--out", tmp_path / "e", code=130)


def test_the_suggestion_reads_what_the_trainer_reads(place):
    from lire_nb import suggest_temperature

    pairs = [{"prompt": f"film {n} was", "chosen": " good", "rejected": " bad"} for n in range(3)]
    own = [make_record(r["prompt"], [r["chosen"], r["rejected"]], rewards=[1.0, 0.0]) for r in pairs]
    assert suggest_temperature(pairs, place / "start") == suggest_temperature(own, place / "start")
    refused(lambda: suggest_temperature(own), "policy")
    refused(lambda: suggest_temperature([{"text": "a"}], place / "start"), "lists")


def test_an_evaluation_says_first_what_it_cannot_use(place, tmp_path, capsys, monkeypatch):
    start, prompts = place / "start", [{"id": f"p{n}", "prompt": f"film {n}"} for n in range(2)]
    judges = {"length": lambda prompt, texts: [float(len(t)) for t in texts]}

    def run(systems=None, ask=prompts, by=judges, **options):
        systems = {"start": start} if systems is None else systems
        return evaluation.evaluate_systems(tmp_path / "run", systems, ask, by, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "sample_lists", lambda *_, **__: pytest.fail("sampled first"))
        refused(lambda: run({}), "systems")
        refused(lambda: run({"start": start, "served": "http://localhost:1/v1#m"}), "served", "local")
        refused(lambda: run(num_sample=1), "num_sample", "unknown")
        refused(lambda: run(num_samples=1.5), "num_samples")
        refused(lambda: run(settings={"temperature": 1}), "settings")
        refused(lambda: run(by={"length": None}), "judges")
        refused(lambda: run(ask=[*prompts, prompts[0]]), "twice", "p0")
        (tmp_path / "prompts.txt").write_text("a film\nanother\n")
        assert "local" in said_by(capsys, "evaluate", "--prompts", tmp_path / "prompts.txt", "--system",
                                  f"start={start}", "--system", "n=http://localhost:1/v1#m", "--judge", "length=length",
                                  "--out", tmp_path / "e")
        assert not (tmp_path / "run").exists() and not (tmp_path / "e").exists()
    options = dict(num_samples=1, settings=sampling.SamplingSettings(max_new_tokens=4), progress=False)
    figures = run(ask=(p for p in prompts), **options)
    assert run(**options) == figures
    for content in ("not rows\n", "[1, 2]\n", '{"id": "p0"}\n', ""):
        (tmp_path / "run" / "evaluation" / "start.jsonl").write_text(content)
        refused(lambda: run(**options), "start.jsonl", "delete")


def test_a_training_of_one_step_changes_the_policy(place, tmp_path, caplog):
    for schedule, count in (("cosine", 1), ("linear", 1), ("constant", 0)):
        one = trainer(place / "start", tmp_path, max_steps=1, temperature=20.0, lr_scheduler_type=schedule)
        before = flat(one.model)
        said = warnings_of(caplog, one.train)
        assert not torch.equal(flat(one.model),
                               before) and sum("warm-up" in line for line in said) == count, (schedule, said)
        assert one.args.warmup_steps == 0.03
    two = trainer(place / "start", tmp_path, max_steps=2, temperature=20.0)  # any other run keeps its schedule
    assert [h["learning_rate"] for h in logs(two)] == [0.0, BASE["learning_rate"]]
    assert train_policy(place / "start", LISTS, tmp_path / "policy", max_steps=1, temperature=20.0, **BASE)
    assert not torch.equal(flat(load_policy(tmp_path / "policy")[0]), flat(load_policy(place / "start")[0]))


@pytest.mark.parametrize("setting, word", [
    ({"optim": "lomo"}, "optim"), ({"optim": "adamw_bnb_8bit"}, "optim"), ({"optim_args": "nonsense"}, "optim_args"),
    ({"optim_args": "momentum=2"}, "optim_args"),
    ({"lr_scheduler_kwargs": {"nonsense": 1}}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs"),
    ({"gradient_checkpointing_kwargs": {"nonsense": 1}}, "checkpointing_kwargs"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": "x"}}, "checkpointing_kwargs"),
    ({"torch_compile_backend": "nonsense"}, "torch_compile_backend"), ({"deepspeed": "/nope.json"}, "deepspeed"),
    ({"accelerator_config": "/nope.json"}, "nope.json"),
    ({"length_column_name": "rewards"}, "length_column_name"),
    ({"length_column_name": "prompt_ids"}, "length_column_name")])
def test_settings_that_cannot_work_are_one_line(setting, word):
    refused(lambda: LIREConfig(**ARGS, **setting), word)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_settings_that_work_are_taken(place, tmp_path):
    for setting in ({"lr_scheduler_kwargs": {"num_cycles": 0.5}},
                    {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"optim": "sgd"},
                    {"optim": "adafactor"},
                    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}},
                    {"torch_compile_backend": None},
                    {"optim": "lion_32bit"} if __import__("importlib").util.find_spec("bitsandbytes") else {}):
        LIREConfig(**ARGS, **setting)


def test_arguments_of_the_trainer_that_cannot_work_are_one_line(place, tmp_path):
    refused(lambda: trainer(place / "start", tmp_path, peft_config="lora"), "peft_config")
    refused(lambda: trainer(place / "start", tmp_path, None).train(), "train_dataset")


def test_an_enhancement_says_first_what_it_cannot_use(place, tmp_path, capsys, monkeypatch):
    from lire_nb import enhancement

    monkeypatch.setattr(enhancement, "sample_lists", lambda *_, **__: pytest.fail("sampled first"))
    monkeypatch.setattr(enhancement, "load_policy", lambda *_, **__: pytest.fail("loaded first"))
    prompts, length = [{"id": f"p{n}", "prompt": f"film {n}"}
                       for n in range(2)], lambda prompts, texts: [float(len(t)) for t in texts]

    def run(*words, reward=length, **options):
        refused(lambda: enhancement.self_enhance(place / "start", prompts, reward, tmp_path / "run", progress=False,
                                                 **options), *words)
        assert not (tmp_path / "run").exists()

    run("eval_strategy", training={"eval_strategy": "steps"})
    run("peft_config", "q_proj", trainer_options={"peft_config": {"target_modules": ["query"]}})
    run("peft_config", trainer_options={"peft_config": "lora"})
    run("NEFTune", training={"neftune_noise_alpha": 5, "logps_impl": "shared"})
    run("compute_metrics", trainer_options={"compute_metrics": len})
    run("nonsense", "unknown", trainer_options={"nonsense": 1})
    run("callbacks", trainer_options={"callbacks": []})
    run("ref_model", "lire", trainer_options={"ref_model": str(place / "start")})
    run("trainer_options", trainer_options=["peft_config"])
    for reward in (None, "vader"):
        run("reward", reward=reward)
    for name in ("num_candidates", "evolve", "iterate"):
        for value in (2.5, "3", True):
            run(name, "whole", **{name: value})
    run("settings", settings={"temperature": 1.0})
    (tmp_path / "prompts.txt").write_text("a film\nanother\n")
    save_lists(LISTS, tmp_path / "lists.jsonl")
    for command in (("enhance", "--prompts", tmp_path / "prompts.txt", "--reward", "length"),
                    ("train", "--lists", tmp_path / "lists.jsonl")):
        for options, word in ((("--lora-rank", "2", "--lora-targets", "query"), "q_proj"),
                              (("--set", "eval_strategy=steps"), "eval_strategy")):
            assert word in said_by(capsys, *command, "--policy", place / "start", "--out", tmp_path / "out", *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lists.jsonl", "prompts.txt"]


def test_the_look_at_an_adapter_draws_no_random_number(place):
    from lire_nb.enhancement import check_options

    before = torch.get_rng_state()
    check_options(place / "start", {}, {"peft_config": {"r": 2, "target_modules": ["q_proj"]}})
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- defaults and the losses' own settings
def test_defaults_learn_where_the_papers_setting_cannot(place, tmp_path, caplog):
    far = far_apart()
    papers = {"temperature": 2.0, "reward_transform": "softmax", "sft_weight": 0.0}
    assert LIREConfig(**ARGS).temperature == "auto"
    assert LIREConfig.paper(**ARGS).loss_settings().items() >= papers.items()
    assert LIREConfig.paper(**ARGS).learning_rate == 2e-5
    assert LIREConfig.paper(**ARGS, num_train_epochs=1).num_train_epochs == 1
    assert warnings_of(caplog, lambda: logs(trainer(place / "start", tmp_path, far, max_steps=2))) == []
    paper = LIREConfig.paper(**ARGS, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True)
    model, tokenizer = load_policy(place / "start")
    said = warnings_of(caplog, LIRETrainer(model, paper, far, processing_class=tokenizer).train)
    assert len(said) == 1 and "one-hot" in said[0] and "T = 2" in said[0]


def test_every_loss_is_trained_by_its_name_and_its_fields(place, tmp_path):
    from lire_nb.rivals import LOSSES

    settings = {"infonca": {"alpha": 0.5}, "lipo": {"reward_transform": "rank"}, "simpo": {"gamma": 0.5},
                "odpo": {"variant": "linear"}, "offline_pg": {"variant": "topr"}}
    for name in LOSSES:
        seen = logs(trainer(place / "start", tmp_path, max_steps=1, loss_type=name, **settings.get(name, {})))
        assert all(math.isfinite(row["loss"]) for row in seen if "loss" in row), name
    for field, value in (("top_k", 1), ("rho", 0.1)):
        assert LIREConfig(**ARGS, loss_type="plackett_luce_dpo", **{field: value}).loss_settings()[field] == value


def test_rewards_that_a_loss_refuses_are_said_before_the_policy_is_loaded(place, tmp_path, monkeypatch):
    lists = [{**r, "rewards": [(j + 1) / 8 for j in range(len(r["completions"]))]} for r in LISTS]
    lists[3]["rewards"][1] = 5.0
    with monkeypatch.context() as patch:
        patch.setattr("lire_nb.models.load_policy", lambda *_: pytest.fail("the policy was loaded first"))
        refused(lambda: train_policy(place / "start", lists, tmp_path / "out", **{**BASE, "loss_type": "lipo"}),
                lists[3]["id"], "[0, 1]", "minmax")
    refused(lambda: trainer(place / "start", tmp_path, lists, loss_type="lipo"), lists[3]["id"], "[0, 1]")


# Rewards that differ by less than float32 can tell.


def graded(*rows):
    return [make_record(f"film {n} was", WORDS[: len(row)], rewards=list(row), id=f"g{n}") for n, row in enumerate(rows)]


@pytest.mark.parametrize("row", [(1e9 + 2, 1e9, 1e9 + 1), (1 - 1e-9, 1 - 2e-8, 1 - 1e-8), (2.0**24 + 1, 2.0**24)])
def test_rewards_that_float32_does_not_tell_apart_are_refused_as_ties_are(place, tmp_path, row):
    assert len(set(np.float32(row))) == 1 < len(set(row))
    for call in (lambda: trainer(place / "start", tmp_path, graded(row, row)),
                 lambda: trainer(place / "start", tmp_path, graded(row, (1.0, 1.0)), loss_type="dpo"),
                 lambda: train_reward_model(graded(row, row), place / "start", progress=False),
                 lambda: train_reward_ensemble(graded(row, row), place / "start", progress=False),
                 lambda: suggest_temperature(graded(row, row), place / "start")):
        with pytest.raises(LireError, match="float32 can tell|no list can teach"):
            call()
    with pytest.raises(LireError, match="no list can teach: 2 whose rewards differ by less than float32 can tell.*mean"):
        trainer(place / "start", tmp_path, graded(row, row))
    with pytest.raises(LireError, match="no list holds two different rewards, as far as float32 can tell.*mean"):
        train_reward_model(graded(row, row), place / "start", progress=False)


def test_it_is_said_once_in_how_many_lists_rewards_count_as_equal(place, tmp_path, caplog):
    sums = (0.1 + 0.2, 0.3, 1.0)  # the rounding of a sum is no opinion
    rows = [(2.0**24 + 1, 2.0**24, 0.0), (1.0, 0.0), sums, (1 - 1e-9, 1 - 2e-8)]
    count = lambda said: [s for s in said if "count as equal" in s]  # noqa: E731
    for settings, number in (({}, 1), ({"loss_type": "sft"}, 2), ({"loss_type": "rrhf"}, 2)):
        said = count(warnings_of(caplog, lambda s=settings: trainer(place / "start", tmp_path, graded(*rows), **s)))
        assert len(said) == 1 and f"{number} of 4 lists hold different rewards" in said[0] and "rescale" in said[0]
    said = count(warnings_of(caplog, lambda: train_reward_model(graded(*rows), place / "start", progress=False)))
    assert len(said) == 1 and "2 of 4 lists" in said[0]
    fine = graded((1.0, 0.0, 0.5), sums, (1e9, 2e9))
    for call in (lambda: trainer(place / "start", tmp_path, fine, loss_type="sft"),
                 lambda: train_reward_model(fine, place / "start", progress=False)):
        assert not count(warnings_of(caplog, call))


# Answers that are the same token ids, with different rewards.

SAME = [make_record(f"film {n} was", ["é", "ü"], [1.0, 0.0], id=f"s{n}") for n in range(3)]  # ASCII letters know neither


def same_ids(said):
    return [s for s in said if "the same token ids" in s]


@pytest.mark.parametrize("loss", ["lire", "dpo", "simpo"])
def test_answers_that_are_the_same_ids_teach_nothing_and_are_refused(place, tmp_path, caplog, loss):
    tied = make_record("play was", [" ok", " fine"], [1.0, 1.0], id="tied")
    for lists in (SAME, [*SAME, tied]):
        refused(lambda lists=lists: trainer(place / "start", tmp_path, lists, loss_type=loss), "no list can teach",
                "same token ids", "3 lists", "tokenizer", "merge_lists")
    with pytest.raises(LireError, match="the same token ids"):
        train_policy(place / "start", SAME, tmp_path / "out", **{**BASE, "loss_type": loss})
    with pytest.raises(LireError, match="the same token ids"):
        train_reward_model(SAME, place / "start", progress=False)
    seen = warnings_of(caplog, lambda: trainer(place / "start", tmp_path, SAME, loss_type=loss, on_mute_lists="warn"))
    assert len(same_ids(seen)) == 1 and "in 3 of 3 lists" in seen[-1]


def test_some_lists_of_the_same_ids_are_told_once(place, tmp_path, caplog, monkeypatch):
    many = [*SAME, make_record("book was", ["ö", "good", "ß"], [1.0, 0.5, 0.0], id="some"), *LISTS]
    calls = {"lire": lambda: trainer(place / "start", tmp_path, many),
             "sft": lambda: trainer(place / "start", tmp_path, many, loss_type="sft"),
             "reward model": lambda: train_reward_model(many, place / "start", progress=False),
             "on the disk": lambda: trainer(place / "start", tmp_path, lists_dataset(many))}
    for name, call in calls.items():
        with monkeypatch.context() as patch:
            patch.setattr("lire_nb.training.MANY", 1)
            said = same_ids(warnings_of(caplog, call))
        assert len(said) == 1 and "in 4 of 12 lists" in said[0] and "tokenizer" in said[0], name
    one = make_record("film was", [" good", " good", " bad"], [0.5, 0.5 + 2**-10, 0.0], id="noise")  # of bfloat16
    cut = make_record("film was", [" good and a", " good and b"], [1.0, 0.0], id="cut")
    assert not same_ids(warnings_of(caplog, lambda: trainer(place / "start", tmp_path, [*LISTS, one, cut])))
    short = lambda: trainer(place / "start", tmp_path, [*LISTS, cut], max_completion_length=9)  # noqa: E731
    assert "in 1 of 9 lists" in same_ids(warnings_of(caplog, short))[0]
    held = lambda: trainer(place / "start", tmp_path, LISTS, SAME, eval_strategy="epoch")  # noqa: E731
    assert "in 3 of 3 lists" in same_ids(warnings_of(caplog, held))[0]  # held-out lists need not teach
