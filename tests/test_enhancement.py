"""A self-enhancement run survives: killed anywhere, stopped politely, out of disk, with damaged files. The runs are
forks of one process, see killed_runs.py."""
import json
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import warm
from safetensors.torch import load_file
from tiny_policy import make_start

from lire_nb.base.errors import LireError
from lire_nb.enhancement import self_enhance, train_policy
from lire_nb.lists import load_lists, save_lists
from lire_nb.records import make_record
from lire_nb.sampling import SamplingSettings

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
STAGES = {"sampling", "fitting", "scoring", "selecting", "training", "checkpointing", "saving", "evaluation"}
PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(4)]
OPTIONS = dict(num_candidates=3, settings=SamplingSettings(max_new_tokens=4), progress=False,
               training=dict(learning_rate=1e-2, bf16=False, use_cpu=True, per_device_train_batch_size=2))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    with warm.start(HERE / "killed_runs.py", tmp_path_factory.mktemp("killed"), "30", "0", cwd=HERE, env=ENV) as fork:
        code, (out, err) = fork.wait(timeout=400), fork.said()
    assert code == 0, err[-4000:]
    return json.loads(out)


def test_two_undisturbed_runs_leave_the_same_files(report):
    assert report["again"] and {"run/enhancement.json", "run/round-2/policy/model.safetensors",
                                "run/round-2/policy/training.jsonl", "run/round-2/lists.jsonl",
                                "run/round-2/pool.jsonl", "run/round-2/reward/model.safetensors",
                                "run/evaluation/round-2.jsonl", "run/round-1/manifest.json"
                                } <= set(report["files"]["refit"])
    assert "run/round-2/reward/model.safetensors" not in report["files"]["ensemble"]
    assert not [f for files in report["files"].values() for f in files if "partial" in f or "/." in f]


def test_killed_thirty_times_and_started_again_leaves_the_same_files(report):
    """Bit for bit: weights, pool, logs, evaluation, manifests; nothing hidden, nothing partial."""
    assert len(report["hits"]) >= 30 and not report["different"], report["different"]
    assert STAGES <= set(report["hits"]), report["hits"]
    assert report["resumed"] >= 3, "too few kills left a checkpoint to go on from"
    assert min(report["ways"].count(way) for way in ("refit", "ensemble")) >= 10


@pytest.mark.parametrize("stage", ["sampling", "scoring", "training"])
def test_sigterm(report, stage):
    case = report["cases"][f"term-{stage}"]
    assert case["code"] == 128 + signal.SIGTERM and not case["left"] and case["wrong"] is None, case
    assert (case["checkpoints"] > 0) == (stage == "training")


@pytest.mark.parametrize("what, words",
                         [("lists", "enhancement.json"), ("reward", "round-1/reward"), ("weights", "checkpoint-1"),
                          ("optimizer", "checkpoint-1")])
def test_full_disk(report, what, words):
    case = report["cases"][f"disk-{what}"]
    assert case["code"] == 3 and not case["left"] and case["wrong"] is None, case
    assert (words in case["error"] and "cannot be written" in case["error"] and "remedy" in case["error"]
            and "\n" not in case["error"])


@pytest.mark.parametrize("what, file, word, remedy", [
    ("cut-candidates", "round-1/candidates.jsonl", "truncated", "delete round-1/candidates.jsonl"),
    ("cut-lists", "round-2/lists.jsonl", "truncated", "delete round-2/lists.jsonl"),
    ("flipped-weights", "round-1/policy/model.safetensors", "altered", "delete round-1/policy"),
    ("cut-manifest", "round-2/manifest.json", "cannot be read", "delete round-2"),
])
def test_damaged_file_is_named_and_the_remedy_mends_it(report, what, file, word, remedy):
    case = report["cases"][what]
    assert case["code"] == 3 and file in case["error"] and word in case["error"] and remedy in case["error"], case
    assert case["wrong"] is None, case


def test_drafts_and_locks_of_killed_processes_are_swept(report):
    case = report["cases"]["left-over"]
    assert len(case["left"]) == 3 and case["wrong"] is None


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("policy") / "start")


def short(prompts, completions):
    return [-float(len(c)) for c in completions]


def codes(prompts, completions):
    "Hardly ever the same for two texts."
    return [sum(map(ord, c)) / 100 for c in completions]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_order_of_prompts_and_lists_does_not_matter(tmp_path, start):
    for name, prompts in (("a", PROMPTS), ("b", PROMPTS[::-1] + PROMPTS[:1])):
        self_enhance(start, prompts, short, tmp_path / name, evolve=1, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    lists = load_lists(tmp_path / "a" / "round-1" / "lists.jsonl")
    # as long as each other, they would tie
    lists = [{**r, "rewards": [float(j) for j in range(len(r["rewards"]))]} for r in lists]
    for name, order in (("c", lists), ("d", list(lists)[::-1])):
        train_policy(start, load_lists(save_lists(order, tmp_path / f"{name}.jsonl")), tmp_path / name, loss_type="dpo",
                     max_steps=2, **OPTIONS["training"])
    assert files(tmp_path / "c") == files(tmp_path / "d")  # the reference log-probs are in the loss


def test_a_moved_run_goes_on(tmp_path, start):
    self_enhance(start, PROMPTS, short, tmp_path / "here", evolve=2, **OPTIONS)
    (tmp_path / "here").rename(tmp_path / "there")
    before = files(tmp_path / "there")
    self_enhance(start, PROMPTS, short, tmp_path / "there", evolve=2, **OPTIONS)
    assert files(tmp_path / "there") == before


def test_the_same_policy_under_another_path_goes_on(tmp_path):
    make_start(tmp_path / "start")
    self_enhance(tmp_path / "start", PROMPTS, short, tmp_path / "run", evolve=1, **OPTIONS)
    before = files(tmp_path / "run")
    (tmp_path / "start").rename(tmp_path / "moved")
    self_enhance(tmp_path / "moved", PROMPTS, short, tmp_path / "run", evolve=1, **OPTIONS)
    changed = {name for name, content in files(tmp_path / "run").items() if before[name] != content}
    assert changed <= {"round-1/manifest.json"}  # where the policy lay


def test_another_policy_under_the_same_path_is_refused(tmp_path):
    make_start(tmp_path / "start")
    self_enhance(tmp_path / "start", PROMPTS, short, tmp_path / "run", evolve=1, **OPTIONS)
    make_start(tmp_path / "start", seed=1)
    with pytest.raises(LireError, match="fingerprint"):
        self_enhance(tmp_path / "start", PROMPTS, short, tmp_path / "run", evolve=1, **OPTIONS)


def test_a_policy_exchanged_between_rounds_is_refused(tmp_path, start):
    self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=2, **OPTIONS)
    shutil.rmtree(tmp_path / "run" / "round-1" / "policy")
    (tmp_path / "run" / "round-1" / "manifest.json").unlink()
    make_start(tmp_path / "run" / "round-1" / "policy", seed=1)
    with pytest.raises(LireError, match="round-2.*sampled by another policy.*delete round-2"):
        self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=2, **OPTIONS)


def test_a_partial_training_of_something_else_is_refused(tmp_path, start):
    lists = [make_record(f"film {i} was", [" good", " bad"], rewards=[1.0, 0.0], id=str(i)) for i in range(4)]
    (tmp_path / "policy.partial").mkdir()
    training = OPTIONS["training"]

    class Failure(Exception):
        pass

    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Failure

    with pytest.raises(Failure):
        train_policy(start, lists, tmp_path / "policy", callbacks=[Fail()], save_steps=1, num_train_epochs=2,
                     **training)
    assert [p.name for p in (tmp_path / "policy.partial").glob("checkpoint-*")] == ["checkpoint-1"]
    for change, word in (({"seed": 1}, "seed: 0 there, 1 now"), ({"temperature": 3.0}, "temperature"),
                         ({"lists": lists[:3]}, "lists:")):
        with pytest.raises(LireError, match="another configuration") as e:
            train_policy(start, change.pop("lists", lists), tmp_path / "policy",
                         **({"save_steps": 1, "num_train_epochs": 2} | training | change))
        assert word in str(e.value) and "delete policy.partial" in str(e.value)
    train_policy(start, lists, tmp_path / "policy", save_steps=1, num_train_epochs=2, **training)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]


def test_the_pool_keeps_its_origin(tmp_path, start):
    """Round 2 holds candidates of both rounds and of people, each text once, with the policy of each round in its
    manifest."""
    prompts = [{**p, "completions": [" by hand"], "rewards": [0.5], "sources": ["human"]} for p in PROMPTS]
    self_enhance(start, prompts, short, tmp_path / "run", evolve=2, pool="keep", max_candidates=5, **OPTIONS)
    first, second = (load_lists(tmp_path / "run" / f"round-{n}" / "lists.jsonl") for n in (1, 2))
    assert {s for r in second for s in r["sources"]} == {"human", "policy:round-1", "policy:round-2"}
    for old, new in zip(first, second):
        assert new["completions"][0] == " by hand" and new["rewards"][0] == 0.5
        assert (len(new["completions"]) == len(set(new["completions"])) <= 5
                and len(new["meta"]["finish_reasons"]) == len(new["completions"]))
        assert max(new["rewards"]) >= max(old["rewards"]) and min(new["rewards"]) <= min(old["rewards"])
    sampled = [json.loads((tmp_path / "run" / f"round-{n}" / "manifest.json").read_text())["sampled_by"]
               for n in (1, 2)]
    assert (sampled[1]["policy"] == "round-1/policy" and sampled[0]["fingerprint"] != sampled[1]["fingerprint"]
            and sampled[0]["seed"] != sampled[1]["seed"])


def test_contrastive_rewards_train_the_same_policy(tmp_path, start):
    """A constant a prompt cannot change the LIRE loss; what is logged is relative to the start policy."""
    import torch
    from safetensors.torch import load_file

    for name, contrastive in (("plain", False), ("contrastive", True)):
        self_enhance(start, PROMPTS, short, tmp_path / name, evolve=1, contrastive=contrastive, **OPTIONS)
    a, b = (load_file(tmp_path / name / "round-1" / "policy" / "model.safetensors")
            for name in ("plain", "contrastive"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    baseline = json.loads((tmp_path / "contrastive" / "round-1" / "baseline.json").read_text())
    for record in load_lists(tmp_path / "contrastive" / "round-1" / "lists.jsonl"):
        assert baseline[record["id"]] == pytest.approx(sum(record["rewards"]) / len(record["rewards"]))
    logs = [json.loads((tmp_path / name / "round-1" / "policy"
                        / "training.jsonl").read_text().splitlines()[0])["expected_reward"]
            for name in ("plain", "contrastive")]
    assert logs[0] < -1 and abs(logs[1]) < abs(logs[0])


def test_a_stop_rule_is_asked_once(tmp_path, start):
    asked = []

    def stop(number, policy):
        asked.append(number)
        return "enough" if number == 2 else None

    for _ in range(2):
        assert len(self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=4, stop=stop, **OPTIONS)) == 2
    assert asked == [1, 2] and [h["reason"]
                                for h in json.loads((tmp_path / "run"
                                                     / "stop.json").read_text())] == [None, None, "enough"]


@pytest.mark.parametrize("change, words", [
    ({"pool": "all"}, "pool: unknown rule"), ({"max_candidates": 1}, "max_candidates: too few"),
    ({"prompts": [*PROMPTS, {"id": "p0", "prompt": "other"}]}, "same id"),
])
def test_bad_plans(tmp_path, start, change, words):
    with pytest.raises(LireError, match=words):
        self_enhance(start, change.pop("prompts", PROMPTS), short, tmp_path / "run", **(OPTIONS | change))
    assert not (tmp_path / "run").exists()


DPO = dict(OPTIONS, training=OPTIONS["training"] | {"loss_type": "dpo"})


@pytest.mark.parametrize("mix, lora", [(None, False), (0, False), (0.25, False), (lambda number: {2: 1.0}[number], False),
                                       (0.25, True)], ids=["last", "0", "0.25", "start", "lora"])
def test_the_reference_of_a_round(tmp_path, start, monkeypatch, mix, lora):
    """Round 2 compares with round 1's policy, with the start, or with the mixture: log-probs from models loaded alone,
    one candidate at a time."""
    import torch

    from lire_nb import enhancement
    from lire_nb.lab.memory import lora_config
    from lire_nb.models import load_policy

    seen = []

    class Watched(enhancement.LIRETrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self.train_dataset)

    monkeypatch.setattr(enhancement, "LIRETrainer", Watched)
    adapter = {"trainer_options": {"peft_config": lora_config(rank=2, alpha=32)}} if lora else {}
    folders = self_enhance(start, PROMPTS, codes, tmp_path / "run", evolve=2, reference_mix=mix, **DPO, **adapter)
    assert (folders[1] / "adapter_config.json").exists() == lora
    weight = mix(2) if callable(mix) else mix or 0.0

    def alone(name, row):
        model, _ = load_policy(name)
        found = []
        for ids in row["completion_ids"]:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([row["prompt_ids"] + ids])).logits[0].double().log_softmax(-1)
            at = len(row["prompt_ids"]) - 1
            found.append(sum(logits[at + k, token].item() for k, token in enumerate(ids)))
        return torch.tensor(found)

    gaps = []
    for number, weights in ((1, (1.0, 0.0)), (2, (weight, 1 - weight))):
        for row in seen[number - 1]:
            first, last = alone(start, row), alone(folders[0], row)
            torch.testing.assert_close(torch.tensor(row["ref_logps"]), weights[0] * first + weights[1] * last if
                                       number == 2 else first, rtol=1e-4, atol=1e-4)
            gaps.append(float((first - last).abs().max()))
    assert max(gaps) > 0.05  # the two references differ, so the check above can fail


def test_a_pool_is_scored_once_and_chosen_from(tmp_path, start):
    from lire_nb.selection import learn_categories, select

    letters = lambda texts: [[t.count(c) for c in "abc"] for t in texts]  # noqa: E731
    asked, folder = [], tmp_path / "run"

    def reward(prompts, completions):
        asked.append(len(completions))
        return short(prompts, completions)

    self_enhance(start, PROMPTS, reward, folder, evolve=2, select="category", pool_size=7, embed=letters, **OPTIONS)
    pools, lists = ([list(load_lists(folder / f"round-{n}" / name)) for n in (1, 2)]
                    for name in ("pool.jsonl", "lists.jsonl"))
    assert asked == [28, 28]
    assert all(len(r["completions"]) == 7 for pool in pools for r in pool)
    assert all(len(r["completions"]) == 3 == len(r["meta"]["logps"]) for some in lists for r in some)
    from lire_nb.sampling import derive_seed

    for number, values in ((1, None), (2, pools[0])):
        seed = derive_seed(0, number, "select")
        known = values and learn_categories(values, seed=seed, embed=letters)
        assert select(pools[number - 1], 3, "category", seed=seed, embed=letters, values=known) == lists[number - 1]


def test_demonstrations_stay_unscored_where_they_are_used(tmp_path, start):
    from lire_nb.enhancement import Refit

    prompts = [{**p, "completions": [" by hand", " graded"], "rewards": [None, 0.5], "sources": ["human", "given"]}
               for p in PROMPTS]
    refit = Refit(backbone=start, lr=1e-2)
    self_enhance(start, prompts, short, tmp_path / "plain", evolve=1, **OPTIONS)
    self_enhance(start, prompts, None, tmp_path / "refit", evolve=2, pool="keep", refit=refit, **OPTIONS)
    assert all(r["rewards"][0] == -8.0 for r in load_lists(tmp_path / "plain" / "round-1" / "lists.jsonl"))
    from lire_nb.rewards import RewardModel

    for number in (1, 2):  # every own sample, of this round and of the last one, has the score of this round's model
        folder = tmp_path / "refit" / f"round-{number}"
        model = RewardModel.load(folder / "reward")
        for r in load_lists(folder / "lists.jsonl"):
            assert r["rewards"][:2] == [None, 0.5] and len(r["rewards"]) >= 2 + 2 * number
            scores = model([r["prompt"]] * (len(r["rewards"]) - 2), r["completions"][2:])
            assert r["rewards"][2:] == pytest.approx(scores, abs=1e-5 + 0.02 * max(map(abs, scores)))


def test_options_that_are_not_used_leave_no_trace(tmp_path, start):
    self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=1, **OPTIONS)
    said = json.loads((tmp_path / "run" / "enhancement.json").read_text())
    assert not {"select", "pool_size", "embed", "refit", "reference_mix"} & set(said)
    assert sorted(p.name for p in (tmp_path / "run" / "round-1").iterdir()) == ["candidates.jsonl", "lists.jsonl",
                                                                                "manifest.json", "policy"]


@pytest.mark.parametrize("change, words", [
    ({"pool_size": 5}, "no effect without select"), ({"select": "best_worst"}, "pool_size: too few"),
    ({"select": "all", "pool_size": 5}, "select: unknown way"), ({"select": "random", "pool_size": 2}, "too few"),
    ({"select": "random", "pool_size": 5, "embed": len}, "embed: cannot be used"),
    ({"refit": {}}, "refit: not a Refit"), ({"reference_mix": 0.5}, "reference_mix"),
    ({"reference_mix": 1.5, "training": {"loss_type": "dpo"}}, "not a weight"),
    ({"reference_mix": "start", "training": {"loss_type": "dpo"}}, "not a weight"),
])
def test_options_that_cannot_be(tmp_path, start, change, words):
    with pytest.raises(LireError, match=words) as e:
        self_enhance(start, PROMPTS, short, tmp_path / "run", **(OPTIONS | change))
    assert not (tmp_path / "run").exists() and "\n" not in str(e.value)


def test_a_refit_needs_something_to_learn_from(tmp_path, start):
    from lire_nb.enhancement import Refit

    with pytest.raises(LireError, match="nothing to fit a reward model on"):
        self_enhance(start, PROMPTS, None, tmp_path / "run", refit=Refit(backbone=start), **OPTIONS)
    with pytest.raises(LireError, match="reward: the fitted reward model scores the rounds"):
        self_enhance(start, PROMPTS, short, tmp_path / "run", refit=Refit(backbone=start), **OPTIONS)
    for change in ({"epochs": 0}, {"lr": float("nan")}, {"batch_size": 1.5}):
        with pytest.raises(LireError, match=f"refit: {[*change][0]}: cannot be used"):
            Refit(**change)


def test_a_disk_without_room_is_said_before_the_first_step(tmp_path, start, monkeypatch):
    """The weights in float32, counted from their file; what can go on from a checkpoint needs no more."""
    lists = [make_record(f"film {i} was", [" good", " bad"], rewards=[1.0, 0.0], id=str(i)) for i in range(2)]
    training = dict(use_cpu=True, bf16=False, num_train_epochs=1, per_device_train_batch_size=2)
    need = sum(t.numel() * 4 for t in load_file(Path(start) / "model.safetensors").values())
    room = shutil.disk_usage(tmp_path)
    for free, refused in ((need - 1, True), (need, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: room._replace(free=free))
        told = pytest.raises(LireError, match="the disk has too little room") if refused else nullcontext()
        with told:
            train_policy(start, lists, tmp_path / "policy", save_steps=1, **training)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith("policy")] == ["policy"] * (not refused)


@pytest.mark.parametrize("passes", [1, 2.0, 4])
def test_two_numbers_of_passes_are_refused(start, tmp_path, passes):
    """Neither is silently not used; as many by both names, and one of them alone, are one number."""
    asked = {**OPTIONS, "training": {**OPTIONS["training"], "num_train_epochs": passes}}
    with pytest.raises(LireError, match="iterate: two numbers of passes"):
        self_enhance(start, PROMPTS, short, tmp_path / "run", evolve=1, iterate=3, **asked)
    assert not (tmp_path / "run").exists()
    for name, iterate in (("same", int(passes)), ("alone", 1)):
        self_enhance(start, PROMPTS, short, tmp_path / name, evolve=1, iterate=iterate, **asked)
        logged = [json.loads(line) for line in open(tmp_path / name / "round-1" / "policy" / "training.jsonl")]
        assert max(row["step"] for row in logged) == int(passes) * len(PROMPTS) // 2
