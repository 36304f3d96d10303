"""Kill a self-enhancement run at random moments, start it again, and compare what it leaves with an undisturbed run.

A script, started by test_enhancement.py. This process imports everything once and computes nothing; every run is a fork
of it, so that a kill costs a run and no start of Python.
Prints one JSON object.
"""
import gc
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  what optimizers import at first use is imported here, once
import transformers.models.llama.modeling_llama  # noqa: F401
from tiny_policy import make_start
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lire_nb import enhancement, evaluation
from lire_nb.base import files
from lire_nb.base.errors import LireError
from lire_nb.enhancement import Refit, self_enhance
from lire_nb.resume import ExactTrainer
from lire_nb.rewards import RewardModel, train_reward_model
from lire_nb.sampling import SamplingSettings
from lire_nb.uncertain_rewards import RewardEnsemble

STAGES = ("other", "sampling", "fitting", "scoring", "selecting", "training", "checkpointing", "saving", "evaluation")
# seconds, about, for the moment inside a stage
SPAN = {"sampling": 0.1, "fitting": 0.05, "scoring": 0.1, "selecting": 0.01, "training": 0.25,
        "checkpointing": 0.01, "saving": 0.01, "evaluation": 0.15}
PROMPTS = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}, "completions": [" good"], "sources": ["human"]}
           for i in range(6)]
TRAINING = {"learning_rate": 1e-2, "bf16": False, "use_cpu": True, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "save_steps": 1, "save_total_limit": 2, "lr_scheduler_type": "linear",
            "optimism": 0.05, "demo_weight": 0.1}
WAYS = ("refit", "ensemble")


def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) - len(text) / 10 for text in completions]


def letters(texts):
    return [[text.count(c) for c in "aeiou"] for text in texts]


class Stages:
    """The stage a child is in, and how often each was entered, written where its parent can read it."""

    pause = 0.0  # seconds that a reward takes: who is to be hit there must be there, who goes on to the end need not

    def __init__(self):
        self.shared = mmap.mmap(-1, 1 + len(STAGES))

    def reset(self):
        self.shared[:] = bytes(len(self.shared))

    def entered(self, stage: str) -> int:
        return self.shared[1 + STAGES.index(stage)]

    def wait(self, stage: str, entry: int) -> None:
        "Until a child has entered a stage so often."
        until = time.monotonic() + 60
        while self.entered(stage) < entry:
            assert time.monotonic() < until, f"no child came to {stage}"
            time.sleep(0.0005)

    def now(self) -> str:
        return STAGES[self.shared[0]]

    def watch(self, owner, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            before, self.shared[0] = self.shared[0], STAGES.index(stage)
            self.shared[1 + STAGES.index(stage)] += 1
            try:
                time.sleep(self.pause if stage in ("scoring", "evaluation") else 0)
                return function(*args, **kwargs)
            finally:
                self.shared[0] = before

        setattr(owner, name, watched)

    def watch_all(self):
        for owner, name, stage in ((enhancement, "sample_lists", "sampling"), (enhancement, "score_lists", "scoring"),
                                   (enhancement, "train_reward_model", "fitting"),
                                   (enhancement, "select_from", "selecting"),
                                   (ExactTrainer, "train", "training"),
                                   (ExactTrainer, "_save_checkpoint", "checkpointing"),
                                   (ExactTrainer, "save_model", "saving"), (evaluation, "judge_policy", "evaluation")):
            self.watch(owner, name, stage)


def make_members(place: Path) -> None:
    "Two small reward models, members of an ensemble."
    lists = [{"id": f"g{i}", "prompt": f"film {i} was", "completions": [" good", " bad"], "rewards": [1.0, 0.0],
              "sources": ["human"] * 2, "meta": {}} for i in range(4)]
    for seed in range(2):
        train_reward_model(lists, place / "start", lr=1e-2, seed=seed, progress=False).save(place / f"reward-{seed}")


def run(place: Path) -> None:
    """Evolve 2 × iterate 2, with an evaluation after every round and all options on: a pool to choose from, optimism,
    demonstrations, and by the way that the folder names a reward model fitted in every round beside a reference mixed
    of two policies, or an ensemble of reward models."""
    os.chdir(place)
    settings = SamplingSettings(max_new_tokens=6)
    if way(place) == "refit":
        reward, options = None, dict(refit=Refit(backbone="start", lr=1e-2, batch_size=3), reference_mix=0.25,
                                     training=TRAINING | {"loss_type": "dpo"})
    else:
        reward = RewardEnsemble([RewardModel.load(f"reward-{seed}") for seed in range(2)], k=0.5)
        options = dict(training=TRAINING | {"demo_form": "self_play"}, contrastive=True)

    def judge(number, policy):
        path = Path("run", "evaluation", f"round-{number}.jsonl")
        if not path.exists():
            files.write_jsonl(path,
                              evaluation.judge_policy(policy, PROMPTS[:2], {"vowels": vowels}, start="start",
                                                      settings=settings, progress=False))

    self_enhance("start", PROMPTS, reward, "run", evolve=2, iterate=2, num_candidates=3, settings=settings,
                 pool="keep", max_candidates=5, seed=3, progress=False,
                 after_round=judge, select="category", pool_size=5, embed=letters, **options)


def way(place: Path) -> str:
    return "ensemble" if place.name.startswith("ensemble") else "refit"


def fork(place: Path, stages: Stages, limit: int | None = None, pause: float = 0.0) -> int:
    """A child that runs; 0 when it ends well, 3 with one line in `error` for a LireError."""
    place.mkdir(exist_ok=True)
    stages.reset()
    for name in ("start", "reward-0", "reward-1"):
        if not (place / name).exists():
            (place / name).symlink_to(place.parent / name)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        stages.watch_all()
        stages.pause = pause
        run(place)
        code = 0
    except LireError as e:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        (place / "error").write_text(str(e))
        code = 3
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(place: Path) -> dict[str, str]:
    """Every file of a finished run with its hash; hidden and partial ones would show up here as well."""
    return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest()[:12]
            for p in sorted((place / "run").rglob("*")) if p.is_file()}


def kill(place: Path, stages: Stages, draw: random.Random, duration: float, stage: str | None, entries: int,
         at_once: bool) -> tuple[str, int]:
    """Start a run and kill it: at any moment, or somewhere inside a stage. Returns the stage it was in and how it
    ended."""
    child = fork(place, stages, pause=0.1)
    if stage is None:
        time.sleep(draw.uniform(0, duration))
    else:
        entry = draw.randint(1, entries)
        stages.wait(stage, entry)
        time.sleep(0 if at_once else draw.uniform(0, SPAN[stage]))
    hit = stages.now()
    os.kill(child, signal.SIGKILL)
    return hit, wait(child)


def finish(place: Path, stages: Stages, whole: dict) -> list | None:
    """Start again; None if it ends in the same files, else what differs."""
    code, now = wait(fork(place, stages)), contents(place)
    return None if code == 0 and now == whole else [code, [n for n in {**now, **whole} if now.get(n) != whole.get(n)],
                                                    (place / "log").read_text()[-2000:]]


def undisturbed_run(place: Path, stages: Stages) -> tuple[float, dict, dict]:
    "Its seconds, how often each stage was entered, and its files."
    began = time.monotonic()
    assert wait(fork(place, stages, pause=0.1)) == 0, (place / "log").read_text()
    return time.monotonic() - began, {stage: stages.entered(stage) for stage in STAGES[1:]}, contents(place)


def main(place: Path, kills: int, seed: int) -> dict:
    stages, draw = Stages(), random.Random(seed)
    get_checkpoint_conversion_mapping("llama")  # a table that every load would build again
    gc.freeze()  # a collection in a child would copy every page of this process
    maker = os.fork()
    if not maker:
        make_start(place / "start")
        make_members(place)
        os._exit(0)
    assert wait(maker) == 0
    undisturbed = {name: undisturbed_run(place / ("whole" if name == "refit" else name), stages) for name in WAYS}
    assert wait(fork(place / "first", stages)) == 0, (place / "first" / "log").read_text()
    whole = undisturbed["refit"][2]
    report = {"files": {name: sorted(found) for name, (_, _, found) in undisturbed.items()},
              "again": contents(place / "first") == whole, "hits": [], "ways": [], "resumed": 0, "different": []}
    while len(report["hits"]) < kills or (set(STAGES[1:]) - set(report["hits"]) and len(report["hits"]) < 2 * kills):
        k = len(report["hits"])
        name = WAYS[k % 3 == 2]  # every third kill hits the ensemble
        duration, entries, expected = undisturbed[name]
        # a busy machine may wake us too late for a short stage
        missing = sorted({s for s in entries if entries[s]} - set(report["hits"])) or [None]
        aim = None if k % 2 else STAGES[1 + k // 2 % len(entries)] if k < kills else missing[0]
        aim = aim if entries.get(aim) else None  # nothing is fitted for an ensemble
        there = place / f"{name}-killed-{k}"
        hit, code = kill(there, stages, draw, duration, aim, entries.get(aim, 0), at_once=k >= kills)
        if code == -signal.SIGKILL:  # else it was done before
            report["hits"].append(hit)
            report["ways"].append(name)
            report["resumed"] += any(there.glob("run/round-*/policy.partial/checkpoint-*/manifest.json"))
            if (wrong := finish(there, stages, expected)) is not None:
                report["different"].append([k, hit, *wrong])
        shutil.rmtree(there)
    report["cases"] = {name: case(place / name, stages, whole) for name, case in CASES.items()}
    return report


def terminated(stage: str):
    """SIGTERM in a stage: 143, nothing half-written, and the same result after another start."""

    def case(place, stages, whole):
        child = fork(place, stages, pause=0.1)
        stages.wait(stage, 1)
        time.sleep(0.02)
        os.kill(child, signal.SIGTERM)
        code = wait(child)
        return {"code": code, "left": left(place),
                "checkpoints": len(list(place.glob("run/round-*/policy.partial/checkpoint-*/manifest.json"))),
                "wrong": finish(place, stages, whole)}

    return case


def full_disk(limit: int):
    """No file may grow over the limit: one line, nothing half-written, and the same result once there is room."""

    def case(place, stages, whole):
        code = wait(fork(place, stages, limit))
        return {"code": code, "error": (place / "error").read_text(), "left": left(place),
                "wrong": finish(place, stages, whole)}

    return case


def damaged(name: str, damage, remedy: str):
    """A file of a finished run is changed: one line that names it; what the line says mends it."""

    def case(place, stages, whole):
        shutil.copytree(place.parent / "whole" / "run", place / "run")
        path = place / "run" / name
        path.write_bytes(damage(path.read_bytes()))
        code = wait(fork(place, stages))
        target = place / "run" / remedy
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return {"code": code, "error": (place / "error").read_text(), "wrong": finish(place, stages, whole)}

    return case


def left_over(place, stages, whole):
    """What an earlier kill −9 left under hidden names is swept."""
    shutil.copytree(place.parent / "whole" / "run", place / "run")
    (place / "run" / "round-1" / ".policy.4194399.draft").mkdir()
    (place / "run" / "round-2" / ".lists.jsonl.0123abcd.tmp").write_text("half")
    (place / "run" / "round-1" / ".policy.lock").touch()
    return {"code": 0, "left": left(place), "wrong": finish(place, stages, whole)}


def left(place: Path) -> list[str]:
    """Hidden files, and partial trainings that hold no checkpoint."""
    hidden = [str(p.relative_to(place)) for p in place.glob("run/**/.*")]
    return hidden + [str(p.relative_to(place)) for p in place.glob("run/round-*/policy.partial")
                     if not list(p.glob("checkpoint-*/manifest.json"))]


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


CASES = {
    "term-sampling": terminated("sampling"), "term-scoring": terminated("scoring"),
    "term-training": terminated("checkpointing"),
    "disk-lists": full_disk(300), "disk-reward": full_disk(15_000),
    "disk-weights": full_disk(30_000), "disk-optimizer": full_disk(40_000),
    "cut-candidates": damaged("round-1/candidates.jsonl", lambda b: b[:-30], "round-1/candidates.jsonl"),
    "cut-lists": damaged("round-2/lists.jsonl", lambda b: b[:-30], "round-2/lists.jsonl"),
    "flipped-weights": damaged("round-1/policy/model.safetensors", flip, "round-1/policy"),
    "cut-manifest": damaged("round-2/manifest.json", lambda b: b[:-30], "round-2"),
    "left-over": left_over,
}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
