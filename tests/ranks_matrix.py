"""The whole matrix with real launches, a command: `python tests/ranks_matrix.py FOLDER [KILLS]`, some minutes.

- a round of self-enhancement and an evaluation by torchrun with 1, 2 and 3 processes: largest differences;
- a process, or the launcher, is killed at a moment drawn by chance, and the run is finished with another number of
  processes: the files must be those of an undisturbed run;
- after the launcher is killed no worker is left.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from test_ranks import ENV, HERE, make_encoder
from tiny_policy import make_start

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(place: Path, count: int, what: str, **env) -> subprocess.Popen:
    if count == 1:
        command, env = [sys.executable], {**env, "RANK": "0", "WORLD_SIZE": "1"}
    else:
        command = [*LAUNCH, str(count)]
    with open(place / "log", "a") as log:
        return subprocess.Popen([*command, str(HERE / "share_processes.py"), str(place), what], env={**ENV, **env},
                                stdout=log, stderr=log)


def rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [x for k in sorted(value) for x in numbers(value[k])]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


def texts(path: Path) -> list:
    return [row.get("completions") for row in rows(path)]


def farthest(one: list, two: list) -> float:
    assert len(one) == len(two)
    return max((abs(a - b) for a, b in zip(one, two)), default=0.0)


def compare(place: Path, count: int) -> dict:
    from safetensors.torch import load_file

    found, one, many = {}, place / "run-1", place / f"run-{count}"
    for name in ("round-1/candidates.jsonl", "round-1/lists.jsonl", "evaluation/lire.jsonl", "metrics.jsonl"):
        assert texts(one / name) == texts(many / name), name
        found[name] = farthest(numbers(rows(one / name)), numbers(rows(many / name)))
    for name in ("round-1/reward/model.safetensors", "round-1/policy/model.safetensors"):
        a, b = (load_file(run / name) for run in (one, many))
        found[name] = max((a[k] - b[k]).abs().max().item() for k in a)
    return found


def kill_and_finish(place: Path, number: int, draw: random.Random, whole: dict) -> dict:
    "Start on a few processes, kill one of them or the launcher, finish on another number."
    first, then = draw.sample((1, 2, 3), 2)
    name = f"killed-{number}"
    process = launch(place, first, "killed", RUN=name)
    parent, until = psutil.Process(process.pid), time.monotonic() + 120
    while not (place / name / "enhancement.json").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 1.5))
    workers = parent.children(recursive=True)
    victim = draw.choice([parent, *workers])
    began = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    process.wait()
    gone, left = psutil.wait_procs(workers, timeout=30)
    ended = time.monotonic() - began
    kept = sum(len(rows(p)) for p in (place / name).rglob("rank-*.jsonl"))
    assert launch(place, then, "killed", RUN=name).wait() == 0
    same = {f: (place / name / f).read_bytes() == content for f, content in whole.items()}
    return {"processes": [first, then], "killed": "launcher" if victim == parent else "worker", "kept rows": kept,
            "workers left": len(left), "seconds until all had ended": round(ended, 1), "same bytes": all(same.values())}


def main(place: Path, kills: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "bert").exists():  # a folder of before goes on
        make_start(place / "start", dropout=0.0)
        make_start(place / "start-dropout")
        make_encoder(place / "bert", place / "start")
    for count in (1, 2, 3):
        began = time.monotonic()
        if not (place / f"run-{count}" / "metrics.jsonl").exists():
            assert launch(place, count, "whole_round").wait() == 0, (place / "log").read_text()[-3000:]
        print(json.dumps({"processes": count, "seconds": round(time.monotonic() - began, 1),
                          **(compare(place, count) if count > 1 else {})}), flush=True)
    assert launch(place, 1, "killed", RUN="alone").wait() == 0
    # training on another number of processes rounds differently: what was sampled and scored is compared
    whole = {f: (place / "alone" / f).read_bytes() for f in ("round-1/candidates.jsonl", "round-1/lists.jsonl")}
    draw = random.Random(0)
    for number in range(kills):
        print(json.dumps(kill_and_finish(place, number, draw, whole)), flush=True)


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
