"""What self-enhancement takes from its neighbors: a selected pool, a reference between two policies, a reward model that is
trained anew in every round."""
import hashlib
import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_policy import make_start

from lire_nb import enhancement
from lire_nb.base.errors import LireError
from lire_nb.enhancement import Refit, self_enhance
from lire_nb.lists import load_lists, save_lists
from lire_nb.sampling import SamplingSettings

PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(4)]
SHOWN = [p | {"completions": [" a joy"], "rewards": [None], "sources": ["human"]} for p in PROMPTS]
PROMPTS_ALONE = [p | {"completions": [""], "rewards": [None], "sources": ["unknown"]} for p in PROMPTS]
PLAIN = dict(learning_rate=1e-2, bf16=False, use_cpu=True, per_device_train_batch_size=2)
OPTIONS = dict(num_candidates=3, settings=SamplingSettings(max_new_tokens=4), progress=False, training=PLAIN)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("start") / "start", dropout=0.0)


def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) - len(text) / 10 for text in completions]


def letters(texts):
    "An embedding that needs no model: how often each of four letters stands in a text."
    return [[float(t.count(c)) for c in "aeio"] for t in texts]


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"}


@pytest.mark.parametrize("how", ["random", "best_worst", "kmedoids", "category"])
def test_lists_hold_m_of_the_pool(tmp_path, start, monkeypatch, how):
    monkeypatch.setattr("lire_nb.selection.minilm", lambda: letters)
    asked = []
    learn = enhancement.learn_categories
    monkeypatch.setattr(enhancement, "learn_categories", lambda lists, **k: asked.append(len(lists)) or learn(lists, **k))
    self_enhance(start, SHOWN, vowels, tmp_path / "run", evolve=2, select=how, pool_size=6,
                 **(OPTIONS | {"training": PLAIN | {"demo_weight": 0.1}}))
    for k in (1, 2):
        folder = tmp_path / "run" / f"round-{k}"
        pools = {r["id"]: dict(r) for r in load_lists(folder / "pool.jsonl")}
        for r in map(dict, load_lists(folder / "lists.jsonl")):
            own, pool = list(zip(r["completions"], r["rewards"]))[1:], pools[r["id"]]
            assert r["completions"][0] == " a joy" and r["rewards"][0] is None and r["sources"][0] == "human"
            assert len(own) == 3 and len(pool["completions"]) == 6 and None not in pool["rewards"]
            assert set(own) <= set(zip(pool["completions"], pool["rewards"]))
            if how in ("best_worst", "kmedoids"):
                assert {max(pool["rewards"]), min(pool["rewards"])} <= {x for _, x in own}
    assert asked == ([4] if how == "category" else [])  # the second round learns from the first's pools


def test_without_the_options_nothing_new_is_written(tmp_path, start):
    self_enhance(start, PROMPTS, vowels, tmp_path / "run", evolve=1, **OPTIONS)
    claimed = json.loads((tmp_path / "run" / "enhancement.json").read_text())
    assert not {"select", "pool_size", "refit"} & set(json.dumps(claimed).replace('"', " ").split())
    assert not (tmp_path / "run" / "round-1" / "pool.jsonl").exists()
    settings = json.loads((tmp_path / "run" / "round-1" / "policy" / "lire_config.json").read_text())
    assert "reference_mix" not in settings


def test_a_mixture_through_the_loop(tmp_path, start):
    "Weight 0 is the last round's policy alone, bit for bit; weight 1 the start's, which round 2 notices."
    weights = {}
    for name, mix in (("plain", {}), ("last", {"reference_mix": 0.0}), ("start", {"reference_mix": 1.0})):
        policies = self_enhance(start, PROMPTS, vowels, tmp_path / name, evolve=2,
                                **(OPTIONS | mix | {"training": PLAIN | {"loss_type": "regression"}}))
        weights[name] = [(p / "model.safetensors").read_bytes() for p in policies]
    assert weights["plain"] == weights["last"] and weights["plain"][0] == weights["start"][0]
    assert weights["plain"][1] != weights["start"][1]


REFIT = dict(epochs=1, batch_size=2, max_length=32)


def run_refit(folder: Path, start: Path) -> None:
    self_enhance(start, SHOWN, None, folder, refit=Refit(backbone=start, **REFIT), evolve=2, pool="keep", **OPTIONS)


def test_the_reward_is_trained_anew_in_every_round(tmp_path, start):
    run_refit(tmp_path / "run", start)
    models = [(tmp_path / "run" / f"round-{k}" / "reward" / "model.safetensors").read_bytes() for k in (1, 2)]
    assert models[0] != models[1]
    for k in (1, 2):
        reward = enhancement.RewardModel.load(tmp_path / "run" / f"round-{k}" / "reward")
        for r in map(dict, load_lists(tmp_path / "run" / f"round-{k}" / "lists.jsonl")):
            own = [j for j, source in enumerate(r["sources"]) if source != "human"]
            assert [r["rewards"][j] for j, s in enumerate(r["sources"]) if s == "human"] == [None]
            scores = reward([r["prompt"]] * len(own), [r["completions"][j] for j in own])
            assert all(abs(r["rewards"][j] - s) < 1e-3 for j, s in zip(own, scores))  # this round's model, old ones too


@pytest.mark.parametrize("moment", ["round-1/reward", "round-2/candidates.jsonl", "round-2/reward", "round-2/lists.jsonl"])
def test_killed_while_the_reward_is_trained(tmp_path, start, moment):
    "SIGKILL as soon as something is there; gone on with, everything is as in a run that nobody disturbed."
    run_refit(tmp_path / "whole", start)
    child = os.fork()
    if not child:
        try:
            run_refit(tmp_path / "run", start)
        finally:
            os._exit(1)
    until = time.monotonic() + 60
    while not (tmp_path / "run" / moment).exists() and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "run" / "round-2" / "policy").exists()
    run_refit(tmp_path / "run", start)
    whole, again = contents(tmp_path / "whole"), contents(tmp_path / "run")
    assert whole == again and "round-2/reward/model.safetensors" in whole


def run_lire(*arguments) -> int:
    from lire_nb.cli import main

    return main(["enhance", "--policy", *map(str, arguments), "--max-new-tokens", "4", "--num-candidates", "3",
                 *(word for pair in ("loss_type=dpo", "learning_rate=1e-2", "bf16=no", "use_cpu=yes",
                                     "per_device_train_batch_size=2") for word in ("--set", pair))])


def test_refit_demonstrations_and_mixture_on_the_command_line(tmp_path, start, capsys):
    "The weights of self_enhance with the same arguments; what does not fit is one line before any folder is made."
    save_lists(PROMPTS_ALONE, tmp_path / "p.jsonl")
    save_lists(SHOWN[:3], tmp_path / "d.jsonl")
    save_lists([SHOWN[0] | {"id": "other"}], tmp_path / "strange.jsonl")
    save_lists([SHOWN[0] | {"prompt": "another film"}], tmp_path / "changed.jsonl")
    given = [start, "--prompts", tmp_path / "p.jsonl", "--reference-mix", "0.5", "--refit", start]
    shown = ["--demonstrations", tmp_path / "d.jsonl"]
    for words, wrong in (("one of both", [*given, *shown, "--reward", "length"]), ("of no prompt here", [
            *given, "--demonstrations", tmp_path / "strange.jsonl"]), ("another prompt under this id", [
            *given, "--demonstrations", tmp_path / "changed.jsonl"]), ("nothing to fit", given),
            ("without --refit", [*given[:5], "--reward", "length", "--refit-lists", tmp_path / "d.jsonl"]),
            ("has no effect with --refit", [*given, *shown, "--scorer", "reward=http://127.0.0.1:1"])):
        assert run_lire(*wrong, "--out", tmp_path / "wrong") == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said and not (tmp_path / "wrong").exists(), said
    assert run_lire(*given, *shown, "--out", tmp_path / "cli") == 0
    self_enhance(start, SHOWN[:3] + PROMPTS[3:], None, tmp_path / "python", refit=Refit(backbone=start),
                 reference_mix=0.5, **(OPTIONS | {"training": PLAIN | {"loss_type": "dpo"}}))
    for name in ("round-1/reward/model.safetensors", "round-2/policy/model.safetensors"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()


def test_every_round_has_a_baseline_on_the_scale_of_its_own_reward_model(tmp_path, start, monkeypatch):
    "The start's samples, scored by this round's model: what the policy is trained on has their mean at zero."
    trained = []
    train = enhancement.train_policy
    monkeypatch.setattr(enhancement, "train_policy", lambda p, lists, *a, **k: trained.append(
        [dict(r) for r in lists]) or train(p, lists, *a, **k))
    quick = Refit(backbone=start, epochs=4, lr=2e-2, batch_size=2, max_length=32)
    self_enhance(start, SHOWN, None, tmp_path / "run", refit=quick, evolve=3, contrastive=True, **OPTIONS)
    sampled = [dict(r) for r in load_lists(tmp_path / "run" / "round-1" / "candidates.jsonl")]
    means = []
    for k, lists in enumerate(trained, 1):
        folder = tmp_path / "run" / f"round-{k}"
        reward = enhancement.RewardModel.load(folder / "reward")
        scored = {r["id"]: r["rewards"] for r in load_lists(folder / "lists.jsonl")}
        for own in lists:
            [record] = [r for r in sampled if r["id"] == own["id"]]
            texts = [c for c in dict.fromkeys(record["completions"]) if k > 1 or c != " a joy"]
            mean = sum(reward([record["prompt"]] * len(texts), texts)) / len(texts)
            means.append(mean)
            for x, r in zip(own["rewards"], scored[own["id"]]):
                assert (x is None) == (r is None) and (x is None or abs(x - (r - mean)) < 2e-3)
    assert max(means) - min(means) > 0.05  # the scales of the models differ, so that this can fail


def test_the_watched_loss_has_the_mixed_reference_too(tmp_path, start, monkeypatch):
    "Weight 1: the references of the held-out lists are those of the start policy, in every round."
    seen = []

    class Looked(enhancement.LIRETrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
            seen.append({name: part["ref_logps"][:] for name, part in held_out.items()})

    monkeypatch.setattr(enhancement, "LIRETrainer", Looked)
    lists = [p | {"completions": [" a joy", " dull"], "rewards": [1.0, 0.0], "sources": ["x", "x"]} for p in PROMPTS]
    for name, held_out in (("one", lists), ("two", {"first": lists[:2], "last": lists[2:]})):
        self_enhance(start, PROMPTS, vowels, tmp_path / name, evolve=2, reference_mix=1.0,
                     trainer_options={"eval_dataset": held_out}, **(OPTIONS | {"training": PLAIN | {"loss_type": "dpo"}}))
    assert seen[0] == seen[1] and seen[2] == seen[3]  # the second round's reference is the first's
    assert {*seen[2]} == {"first", "last"}


def test_samples_that_are_the_demonstration_do_not_stop_a_round(tmp_path, start):
    "Where a policy says what was shown, nothing is left to score in that list; the others go on."
    greedy = SamplingSettings(max_new_tokens=4, temperature=0.0)
    self_enhance(start, PROMPTS, vowels, tmp_path / "first", evolve=1, **(OPTIONS | {"settings": greedy}))
    said = {r["id"]: r["completions"][0] for r in load_lists(tmp_path / "first" / "round-1" / "candidates.jsonl")}
    same = [p | {"completions": [said[p["id"]]], "rewards": [None], "sources": ["human"],
                 "meta": {"finish_reasons": ["length"]}} for p in PROMPTS[:1]]
    self_enhance(start, [*same, *SHOWN[1:]], vowels, tmp_path / "run", evolve=1, pool="keep",
                 **(OPTIONS | {"settings": greedy, "training": PLAIN | {"demo_weight": 0.1}}))
    [record] = [r for r in load_lists(tmp_path / "run" / "round-1" / "lists.jsonl") if r["id"] == PROMPTS[0]["id"]]
    assert record["completions"] == [said[PROMPTS[0]["id"]]] and record["rewards"] == [None]


def test_what_a_killed_sampling_kept_belongs_to_its_prompts(tmp_path, start, monkeypatch):
    "Other prompts under the same ids are sampled anew, as in a folder of their own."
    import lire_nb.base.ranks as ranks

    keep, left = ranks._Kept.add, [2]

    def add(self, *rows):
        keep(self, *rows)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ranks._Kept, "add", add)
    monkeypatch.setattr(enhancement, "sample_lists", partial(enhancement.sample_lists, batch_size=1))
    with pytest.raises(KeyboardInterrupt):
        self_enhance(start, PROMPTS, vowels, tmp_path / "run", evolve=1, **OPTIONS)
    assert not (tmp_path / "run" / "round-1" / "candidates.jsonl").exists()
    others = [p | {"prompt": f"another {p['prompt']}"} for p in PROMPTS]
    for name in ("run", "own"):
        self_enhance(start, others, vowels, tmp_path / name, evolve=1, **OPTIONS)
    one, two = ((tmp_path / name / "round-1" / "candidates.jsonl").read_bytes() for name in ("run", "own"))
    assert one == two


class Abstains:
    "The first text of every prompt gets no score."

    name, abstains = "abstains", True

    def __call__(self, prompts, completions):
        seen = set()
        return [None if p not in seen and not seen.add(p) else float(len(c)) for p, c in zip(prompts, completions)]

    def identity(self):
        return "abstains"


def test_contrastive_with_a_reward_that_abstains(tmp_path, start):
    self_enhance(start, PROMPTS, Abstains(), tmp_path / "run", evolve=1, contrastive=True, **OPTIONS)
    baseline = json.loads((tmp_path / "run" / "round-1" / "baseline.json").read_text())
    for r in load_lists(tmp_path / "run" / "round-1" / "lists.jsonl"):
        assert r["rewards"][0] is None and baseline[r["id"]] == sum(r["rewards"][1:]) / 2


@pytest.mark.parametrize("change, words", [
    ({"select": "best"}, "unknown way"), ({"select": "random", "pool_size": 2}, "too few"),
    ({"pool_size": 8}, "has no effect"), ({"select": "random", "pool_size": 4.5}, "too few"),
    ({"reward": None, "refit": Refit()}, "nothing to fit"), ({"reward": None}, "cannot be called"),
    ({"refit": Refit(), "prompts": SHOWN}, "no effect"), ({"reference_mix": 0.5}, "no effect"),
    ({"reference_mix": 1.5, "training": PLAIN | {"loss_type": "dpo"}}, "not a weight"),
    ({"training": PLAIN | {"demo_weight": 0.1}}, "no demonstration"),
    ({"reference_mix": 0.5, "evolve": 1, "training": PLAIN | {"loss_type": "dpo"}}, "single round"),
])
def test_what_cannot_be_run_is_said_first(tmp_path, start, change, words):
    change = dict(change)
    prompts, reward = change.pop("prompts", PROMPTS), change.pop("reward", vowels)
    with pytest.raises(LireError, match=words):
        self_enhance(start, prompts, reward, tmp_path / "run", **(OPTIONS | change))
    assert not (tmp_path / "run").exists()


# numbers that a stop rule and a callback can use


@pytest.mark.parametrize("name, value", [
    ("max_kl", math.inf), ("max_kl", math.nan), ("max_kl", True), ("max_kl", "2"), ("max_kl", 0),
    ("num_samples", 2.5), ("num_samples", 0), ("num_samples", True), ("num_samples", "2"),
    ("patience", 1.5), ("patience", True), ("patience", 0)])
def test_a_number_that_no_rule_can_use_is_refused(name, value):
    """A limit that nothing passes, half a sample: said when the rule is made, before any work."""
    from lire_nb.enhancement import StopRule
    from lire_nb.watching import EvaluationCallback

    prompts = [{"id": f"p{i}", "prompt": f"film {i}", "meta": {}} for i in range(2)]
    reward = lambda p, c: [0.0] * len(c)  # noqa: E731
    makers = {"rule": lambda **kw: StopRule(prompts, gold=reward, **kw)} if name != "patience" else {}
    makers["callback"] = lambda **kw: EvaluationCallback(prompts, {"own": reward}, **kw)
    for make in makers.values():
        with pytest.raises(LireError, match=f"{name}: cannot be used"):
            make(**{name: value})
        make(**{name: 2})
