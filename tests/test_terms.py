"""Terms beside the list loss: optimism and demonstrations, against sums by hand, alone and in a training."""
import json
import math
from pathlib import Path

import pytest
import torch
from failing import FailAt, Failure
from tiny_policy import make_start

from lire_nb import training
from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.demonstrations import demo_loss, demonstration_pairs, self_play_loss
from lire_nb.enhancement import train_policy
from lire_nb.exploration import optimism_loss, term_beta
from lire_nb.lists import save_lists
from lire_nb.logprobs import dataset_logps
from lire_nb.losses import lire_loss
from lire_nb.models import load_policy
from lire_nb.records import demonstrated, make_record, own_candidates
from lire_nb.resume import last_checkpoint
from lire_nb.rivals import get_loss
from lire_nb.training import choose_candidates, LIREConfig, LIRETrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LISTS = [
    make_record("film 0 was", [" good", " bad", " fine"], [1.0, -0.5, 0.2], ["policy", "policy:round-1", "human"]),
    make_record("film 1 was", [" dull", " odd", " lovely"], [0.1, 0.6, None], ["policy", "unknown+policy", "human"]),
    make_record("film 2 was", [" so long", " short", " sweet", " sad"], [0.5, None, None, 0.5],
                ["policy", "policy", "human:anna", "gpt"]),  # tied
    make_record("film 3 was", [" a dream", " a bore"], [None, None], ["human", "policy"]),  # nothing is scored
    make_record("film 4 was", [" new", " old"], [1.0, 0.0], "gpt"),  # nothing of a policy's own
]
SCORED = [LISTS[n] for n in (0, 1, 2, 4)]
BASE = dict(learning_rate=5e-3, bf16=False, use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=1,
            save_strategy="no", lr_scheduler_type="linear", per_device_train_batch_size=2, num_train_epochs=2)
TERMS = {"optimism": dict(optimism=0.5, demo_weight=0.01), "likelihood": dict(demo_weight=0.3),
         "self_play": dict(demo_weight=0.7, demo_form="self_play"),
         "all": dict(optimism=0.2, demo_weight=0.7, demo_form="self_play", loss_type="dpo", beta=0.3)}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("policies")
    make_start(place / "start", dropout=0.0)
    make_start(place / "start-dropout")
    make_start(place / "other", dropout=0.0, seed=1)
    return place


def trainer(policy, folder, lists=LISTS, eval_lists=None, **settings):
    options = {name: settings.pop(name) for name in ("callbacks", "peft_config", "ref_model") if name in settings}
    model, tokenizer = load_policy(policy)
    return LIRETrainer(model, LIREConfig(**{"output_dir": str(folder), **BASE, **settings}), lists, eval_lists,
                       processing_class=tokenizer, **options)


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(one) -> tuple[list[dict], torch.Tensor]:
    one.train()
    timed = ("runtime", "per_second", "preparation", "total_flos")
    return [{k: v for k, v in h.items() if not any(t in k for t in timed)} for h in one.state.log_history
            if "loss" in h], flat(one.model)


# The terms alone.


def tables(seed: int = 0):
    """Random ragged lists; what is behind the mask is nan, as the batch has it."""
    torch.manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    logps = (10 * torch.randn(3, 4)).double().requires_grad_()
    ref = (10 * torch.randn(3, 4)).double().masked_fill(~mask, math.nan)
    own = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    demos = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    return logps, ref, own, demos, torch.randint(1, 9, (3, 4))


def test_the_gradient_of_optimism_is_a_constant():
    """d/ds of β · mean(s − r) is β / n at each of n own candidates, and 0 elsewhere."""
    logps, ref, own, _, _ = tables()
    optimism_loss(logps, ref, own, beta=0.3).sum().backward()
    assert logps.grad.tolist() == [[0.15, 0, 0.15, 0], [0, 0, 0, 0], [0.15, 0, 0.15, 0]]


def test_terms_by_hand():
    logps, ref, own, demos, lengths = tables(1)
    s, r, o, d, n = (x.tolist() for x in (logps, ref, own, demos, lengths))

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    optimism = [0.3 * mean([s[b][j] - r[b][j] for j in range(4) if o[b][j]]) for b in range(3)]
    likely = [mean([-s[b][j] / n[b][j] for j in range(4) if d[b][j]]) for b in range(3)]
    play = [mean([-math.log(sigma(0.3 * (s[b][i] - r[b][i] - s[b][j] + r[b][j])))
                  for i in range(4) for j in range(4) if d[b][i] and o[b][j]]) for b in range(3)]
    assert optimism[1] == play[1] == 0 and likely[1] != 0
    for found, expected in ((optimism_loss(logps, ref, own, beta=0.3), optimism),
                            (demo_loss(logps, lengths, demos), likely),
                            (self_play_loss(logps, ref, demos, own, beta=0.3), play)):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gradients_of_demonstrations_against_differences():
    """Every log-prob moved a little, also with nan behind the mask."""
    logps, ref, own, demos, lengths = tables(2)
    for term in (lambda s: demo_loss(s, lengths, demos), lambda s: self_play_loss(s, ref, demos, own, beta=0.2)):
        grad, = torch.autograd.grad(term(logps).sum(), logps)
        for b in range(3):
            for j in range(4):
                step = torch.zeros_like(logps)
                step[b, j] = 1e-5
                slope = (term(logps + step) - term(logps - step)).sum() / 2e-5
                assert abs(slope - grad[b, j]) < 1e-8, (b, j)


@pytest.mark.parametrize("loss_type, settings, beta", [
    ("dpo", {"beta": 0.3}, 0.3), ("qrpo", {"beta": 1e-3}, 1e-3), ("lire", {"temperature": 7.0}, 0.1),
    ("simpo", {"beta": 2.0}, 0.1), ("awr", {"beta": 1.0}, 0.1), ("offline_pg", {"beta": 0.0}, 0.1)])
def test_beta_is_that_of_the_log_ratios(loss_type, settings, beta):
    assert term_beta(get_loss(loss_type), settings) == beta


@pytest.mark.parametrize("wrong", [
    lambda s, r, o, d, n: optimism_loss(s, r, o, beta=0), lambda s, r, o, d, n: optimism_loss(s, r, o, beta=math.nan),
    lambda s, r, o, d, n: optimism_loss(s, r[:, :2], o), lambda s, r, o, d, n: optimism_loss(s, r, o.float()),
    lambda s, r, o, d, n: optimism_loss(s, None, o), lambda s, r, o, d, n: optimism_loss([[0.0]], r, o),
    lambda s, r, o, d, n: demo_loss(s, n[:2], d), lambda s, r, o, d, n: demo_loss(s, n, d[:, :1]),
    lambda s, r, o, d, n: demo_loss(s, n, d.long()), lambda s, r, o, d, n: self_play_loss(s, r, d, o, beta="0.1"),
    lambda s, r, o, d, n: self_play_loss(s, r, d, o[:1])])
def test_wrong_tensors_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong(*tables())


# In a training.


def by_hand(model, tokenizer, start, lists, optimism=0.0, demo_weight=0.0, demo_form="likelihood", loss_type="lire",
            beta=0.1) -> float:
    """The mean over lists of loss and terms, from log-probs of each candidate, in loops."""
    total = 0.0
    for record, (s, n), (r, _) in zip(lists, dataset_logps(model, tokenizer, lists),
                                      dataset_logps(start, tokenizer, lists)):
        scored = [j for j, reward in enumerate(record["rewards"]) if reward is not None]
        own, shown = ([j for j, yes in enumerate(of(record)) if yes] for of in (own_candidates, demonstrated))
        if scored and loss_type == "lire":
            total += lire_loss(torch.tensor([[s[j] for j in scored]]),
                               torch.tensor([[record["rewards"][j] for j in scored]])).item()
        elif scored and len({record["rewards"][j] for j in scored}) > 1:
            best, worst = (pick(scored, key=lambda j: record["rewards"][j]) for pick in (max, min))
            total += math.log1p(math.exp(-beta * (s[best] - r[best] - s[worst] + r[worst])))
        if own:
            total += optimism * beta * sum(s[j] - r[j] for j in own) / len(own)
        if shown and demo_form == "likelihood":
            total += demo_weight * sum(-s[j] / n[j] for j in shown) / len(shown)
        if shown and own and demo_form == "self_play":
            total += demo_weight * sum(math.log1p(math.exp(-beta * (s[i] - r[i] - s[j] + r[j])))
                                       for i in shown for j in own) / len(shown) / len(own)
    return total / len(lists)


@pytest.mark.parametrize("name", TERMS)
def test_the_loss_of_a_training_is_the_sum_by_hand(place, tmp_path, name):
    """Under a policy that is not its reference; the tied list, the unscored one and the one without own candidates."""
    start, _ = load_policy(place / "start")
    one = trainer(place / "other", tmp_path, eval_lists=LISTS, ref_model=None if name == "likelihood" else start,
                  per_device_eval_batch_size=3, **TERMS[name])
    found = one.evaluate()
    assert abs(found["eval_loss"] - by_hand(one.model, one.processing_class, start, LISTS, **TERMS[name])) < 1e-5
    assert "eval_demo_loss" in found and ("eval_optimism" in found) == ("optimism" in TERMS[name])


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_the_slope(place, tmp_path, name):
    """Of the loss of a batch through a whole model, along its own gradient and along a random direction."""
    ref = {} if name == "likelihood" else {"ref_model": load_policy(place / "start")[0]}
    fixed = {} if "loss_type" in TERMS[name] else {"temperature": 10.0}  # "auto" moves with the weights
    one = trainer(place / "other", tmp_path, **ref, **fixed, **TERMS[name])
    model = one.model.double().eval()
    batch = one.data_collator([{**row, "filler": False} for row in one.train_dataset])
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(one.list_losses(model, batch)[0].sum(), weights)
    torch.manual_seed(0)
    for direction in (grads, [torch.randn_like(p) for p in weights]):
        ends = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                for p, v in zip(weights, direction):
                    p.add_(v, alpha=step)
                ends.append(one.list_losses(model, batch)[0].sum().item())
                for p, v in zip(weights, direction):
                    p.add_(v, alpha=-step)
        slope = sum((g * v).sum().item() for g, v in zip(grads, direction))
        assert abs((ends[0] - ends[1]) / 2e-4 - slope) < 2e-3 * max(1.0, abs(slope))


@pytest.mark.parametrize("name", TERMS)
def test_paths_parts_and_layouts_agree(place, tmp_path, name):
    """Padding, the shared prompt, two candidates at a time, and batches of one: the same losses and weights."""
    settings = TERMS[name] | {"num_candidates": 2}
    log, weights = trained(trainer(place / "start", tmp_path, logps_impl="padded", **settings))
    moved = (weights - flat(load_policy(place / "start")[0])).norm()
    for other in ({"logps_impl": "shared"}, {"candidates_at_once": 2},
                  {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}):
        again, found = trained(trainer(place / "start", tmp_path, **settings | other))
        assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(log, again, strict=True)), other
        assert (found - weights).norm() < 1e-3 * moved, other
        assert log[0].keys() == again[0].keys()


def test_without_a_weight_it_is_the_old_training_bit_for_bit(place, tmp_path, monkeypatch):
    """And no reference pass is made."""
    lists = [LISTS[0], LISTS[1], LISTS[4]]
    log, weights = trained(trainer(place / "start", tmp_path, lists))
    monkeypatch.setattr(training, "reference_logps", None)  # whoever asks fails
    again, same = trained(trainer(place / "start", tmp_path, lists, optimism=0, demo_weight=0))
    assert torch.equal(weights, same) and log == again
    with pytest.raises(TypeError):
        trainer(place / "start", tmp_path, lists, optimism=1e-9)


def test_unused_settings_are_not_written_down(tmp_path):
    plain = LIREConfig(output_dir=str(tmp_path), use_cpu=True).to_dict()
    assert not {"optimism", "demo_weight", "demo_form"} & plain.keys()
    used = LIREConfig(output_dir=str(tmp_path), use_cpu=True, optimism="0.001", demo_weight=1).to_dict()
    assert {name: used[name] for name in used.keys() - plain.keys()} == {"optimism": 0.001, "demo_weight": 1.0}


def test_optimism_lowers_what_the_old_policy_says(place, tmp_path):
    """Against the same training without it: own candidates become less probable."""
    lists, means = [LISTS[0], LISTS[1]], []
    for alpha in (None, 20.0):
        one = trainer(place / "start", tmp_path, lists, optimism=alpha, num_train_epochs=8)
        one.train()
        logps = [s for s, _ in dataset_logps(one.model, one.processing_class, lists)]
        means.append(sum(s[0] + s[1] for s in logps) / 4)
    assert means[1] < means[0] - 1


def test_a_reference_of_an_adapter(place, tmp_path):
    """The policy without its adapter: at the first step s = r; lists that come later are measured alike."""
    from peft import LoraConfig

    one = trainer(place / "start", tmp_path, SCORED, SCORED, optimism=5.0, max_steps=6, learning_rate=0.1,
                  peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    log, _ = trained(one)
    assert abs(log[0]["optimism"]) < 1e-5 and log[-1]["optimism"] < -1e-3
    assert one.evaluate(SCORED, metric_key_prefix="late")["late_loss"] == one.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", ["likelihood", "all"])
def test_resumed_is_exact(place, tmp_path, name):
    """Fails in the first and in the second epoch, goes on from the last checkpoint: the same weights and log, with
    dropout and drawn candidates."""
    settings = TERMS[name] | dict(save_strategy="steps", save_steps=1, num_candidates=2)
    log, weights = trained(trainer(place / "start-dropout", tmp_path / "whole", **settings))
    for step in (2, 4):
        with pytest.raises(Failure):
            trainer(place / "start-dropout", tmp_path / str(step), callbacks=[FailAt(step)], **settings).train()
        one = trainer(place / "start-dropout", tmp_path / str(step), **settings)
        one.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / str(step))))
        assert torch.equal(flat(one.model), weights)
        assert [h["loss"] for h in one.state.log_history if "loss" in h] == [h["loss"] for h in log]


def test_a_reference_cache_is_used(place, tmp_path):
    settings = dict(optimism=0.5, reference_cache=str(tmp_path / "kept"))
    first, weights = trained(trainer(place / "start", tmp_path, SCORED, **settings))
    kept, = (tmp_path / "kept").iterdir()
    assert len(kept.read_text().splitlines()) == len(SCORED)
    again, same = trained(trainer(place / "start", tmp_path, SCORED, **settings))
    assert again == first and torch.equal(weights, same)


# Which candidates a step reads.


def test_demonstrations_stay_beside_the_chosen():
    rewards = [0.1, None, 0.9, None, 0.5, None, -1.0, 0.3]
    plain = [choose_candidates([r for r in rewards if r is not None], 3, "seed", k) for k in range(40)]
    places = [0, 2, 4, 6, 7]  # of the scored
    for k in range(40):
        kept = choose_candidates(rewards, 3, "seed", k, beside=[1, 5])
        assert kept == sorted([1, 5, *(places[j] for j in plain[k])])  # the draw of the others is the old one
        assert choose_candidates(rewards, 3, "seed", k) == [places[j] for j in plain[k]]
    drawn = {j for k in range(40) for j in choose_candidates(rewards, 3, "seed", k, also=[3])}
    assert 3 in drawn and not {1, 5} & drawn
    assert choose_candidates([None] * 4, 2, 0, also=[1, 2, 3], beside=[0])[0] == 0
    assert len(choose_candidates([None] * 4, 2, 0, also=[1, 2, 3], beside=[0])) == 3


# What cannot work.


class NoModel:
    """Whatever is asked of it is too late."""

    def __getattr__(self, name):
        raise AssertionError("the model was touched")


@pytest.mark.parametrize("settings, lists, words", [
    (dict(demo_weight=0.1), [LISTS[0], LISTS[4]], ("demo_weight", "no demonstration", "human")),
    (dict(demo_weight=0.1, demo_form="self_play"), [LISTS[4], make_record("x", [" a", " b"], [1.0, 0.0], "gpt"),
                                                    make_record("y", [" a", " b", " c"], [1.0, 0.0, None],
                                                                ["gpt", "gpt", "human"])],
     ("demo_form", "own candidate", "sample")),
    (dict(optimism=0.1), [LISTS[4]], ("optimism", "no effect", "policy")),
    ({}, [LISTS[0], LISTS[3]], ("nothing is scored",)),
    (dict(optimism=0.1), [LISTS[0], LISTS[3]], ("nothing is scored",)),
])
def test_lists_that_do_not_fit_are_refused_before_the_model(tmp_path, settings, lists, words):
    args = LIREConfig(output_dir=str(tmp_path), **BASE | settings)
    with pytest.raises(LireError) as e:
        LIRETrainer(NoModel(), args, lists, processing_class=NoModel())
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("settings, word", [
    (dict(optimism=-1), "optimism"), (dict(optimism="much"), "optimism"), (dict(optimism=math.nan), "optimism"),
    (dict(optimism=[1]), "optimism"), (dict(demo_weight=-0.1), "demo_weight"), (dict(demo_weight=True), "demo_weight"),
    (dict(demo_form="self_play"), "demo_weight"), (dict(demo_weight=1, demo_form="play"), "likelihood or self_play"),
    (dict(demo_weight=1, demo_form=3), "demo_form")])
def test_settings_that_cannot_be(tmp_path, settings, word):
    with pytest.raises(LireError, match=word):
        LIREConfig(output_dir=str(tmp_path), **settings)


def test_a_demonstration_teaches_where_rewards_are_tied(place, tmp_path, caplog):
    tied = [LISTS[2], LISTS[3]]
    with pytest.raises(LireError, match="nothing is scored"):
        trainer(place / "start", tmp_path, tied)
    with pytest.raises(LireError, match="no list can teach"):
        trainer(place / "start", tmp_path, tied[:1])
    before = flat(load_policy(place / "start")[0])
    log, after = trained(trainer(place / "start", tmp_path, tied, demo_weight=1.0, num_train_epochs=5))
    assert not torch.equal(before, after) and "cannot teach" not in caplog.text
    assert log[-1]["demo_loss"] < log[0]["demo_loss"] and log[0]["no_signal"] == 1


def test_lists_prepared_without_the_terms_are_refused(place, tmp_path):
    scored = [LISTS[0], LISTS[1]]
    old = trainer(place / "start", tmp_path, scored).train_dataset
    with pytest.raises(LireError, match="prepared without own"):
        trainer(place / "start", tmp_path, scored, old, optimism=0.1)
    new = trainer(place / "start", tmp_path, scored, optimism=0.1).train_dataset
    assert new["own"] == [[True, True, False], [True, True, False]] and "demos" not in new.column_names
    trainer(place / "start", tmp_path, new, optimism=0.1).train()


def test_pairs_for_a_reward_model():
    pairs = demonstration_pairs(LISTS)
    assert [(p["completions"], p["rewards"]) for p in pairs] == [
        ([" lovely", " dull", " odd"], [1.0, 0.0, 0.0]), ([" sweet", " so long", " short"], [1.0, 0.0, 0.0]),
        ([" a dream", " a bore"], [1.0, 0.0])]
    same = make_record("x", ["a", "a", "b"], [None, 0.5, None], ["human", "policy", "policy"], meta={"n": [1, 2, 3]})
    assert demonstration_pairs([same])[0]["completions"] == ["a", "b"]
    assert demonstration_pairs([same])[0]["meta"] == {"n": [1, 3]}
    assert demonstration_pairs([]) == demonstration_pairs([LISTS[0]]) == []


# At the command line.


def test_the_command_line_takes_terms(place, tmp_path, capsys):
    save_lists(LISTS, tmp_path / "lists.jsonl")
    save_lists(LISTS[:1], tmp_path / "plain.jsonl")

    def train(lists, out, **settings):
        settings = {name: value for name, value in {**BASE, **settings}.items() if name != "save_strategy"}
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        return main(["train", "--policy", str(place / "start"), "--lists", str(tmp_path / lists), "--out",
                     str(tmp_path / out), *sets])

    assert not train("lists.jsonl", "policy", optimism="0.01", demo_weight="0.1", demo_form="self_play")
    settings = json.loads((tmp_path / "policy" / "lire_config.json").read_text())
    assert (settings["optimism"], settings["demo_weight"], settings["demo_form"]) == (0.01, 0.1, "self_play")
    rows = [json.loads(line) for line in (tmp_path / "policy" / "training.jsonl").read_text().splitlines()]
    # in each epoch one list of two batches at least has own candidates and a demonstration
    assert sum("optimism" in row for row in rows) >= 4 and any("demo_loss" in row for row in rows)
    capsys.readouterr()
    assert train("plain.jsonl", "other", demo_weight="0.1") == 2
    said = capsys.readouterr().err
    assert "no demonstration" in said and "Traceback" not in said and not (tmp_path / "other").exists()


def test_a_training_with_other_terms_is_another_one(place, tmp_path):
    """What was begun without optimism is not gone on with it."""
    settings = {**BASE, "save_strategy": "steps", "save_steps": 1}
    settings.pop("report_to")
    with pytest.raises(Failure):
        train_policy(place / "start", LISTS[:2], tmp_path / "out", callbacks=[FailAt(2)], **settings)
    with pytest.raises(LireError, match="optimism"):
        train_policy(place / "start", LISTS[:2], tmp_path / "out", optimism=0.1, **settings)
