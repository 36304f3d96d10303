"""Kill a comparison in each of its stages, in one folder, and compare what it leaves with an undisturbed one.

A script, started by test_compare.py. This process imports everything and loads the policy once, so that what a library
makes at first use is there; every run is a fork of it. Prints one JSON object.
"""
import gc
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  what is imported at first use is imported here, once
import PIL.JpegImagePlugin  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from tiny_policy import make_start

from lire_nb.lab.compare import compare
from lire_nb.models import load_policy
from lire_nb.records import make_record

TEXTS = ["eee", "abc", "e", "zz", "eeee", "qe", "k", "eaea"]
STAGES = {  # a stage -> what has appeared when it is hit
    "start": "start-test.jsonl", "judge": "judge.jsonl",
    "search, training": "runs/search-*-0/policy.partial/checkpoint-2/manifest.json",
    "search, done": "runs/search-*-1/done.json",
    "seeds, first look": "runs/seed-*-0/step-*1.jsonl",
    "seeds, policy": "runs/seed-*-0/policy", "report": "report.md",
}


def letter_e(prompts, completions):
    return [float(text.count("e")) for text in completions]


def run(place: Path) -> None:
    lists = [make_record(f"film {k} was", chosen := [TEXTS[(k + 3 * j) % 8] for j in range(4)],
                         letter_e(None, chosen)) for k in range(7)]
    compare(lists, place.parent / "tiny", ["lire", "dpo"], letter_e, place, seeds=1, points=2, max_kl=4.0, prompts=2,
            samples=2, best_of=4, max_new_tokens=6, say=lambda line: None,
            training={"learning_rate": 4e-2, "num_train_epochs": 1, "per_device_train_batch_size": 1, "bf16": False,
                      "use_cpu": True, "save_steps": 1, "save_total_limit": 2})


def fork(task, *arguments) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(arguments[0].parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        task(*arguments)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(place: Path) -> dict[str, str]:
    return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest()[:12]
            for p in sorted(place.rglob("*")) if p.is_file()}


def kill_at(place: Path, pattern: str) -> int:
    "Start, wait until something new of this name is there, kill; how the child ended."
    before, until = set(place.glob(pattern)), time.monotonic() + 60
    child = fork(run, place)
    while not set(place.glob(pattern)) - before and time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def main(home: Path) -> dict:
    load_policy(make_start(home / "tiny"))
    gc.freeze()
    assert wait(fork(run, home / "whole")) == 0, (home / "log").read_text()[-3000:]
    hits = {stage: kill_at(home / "killed", pattern) for stage, pattern in STAGES.items()}
    code = wait(fork(run, home / "killed"))
    whole, now = contents(home / "whole"), contents(home / "killed")
    return {"hits": hits, "code": code, "files": sorted(whole), "log": (home / "log").read_text()[-2000:],
            "different": [n for n in {**now, **whole} if now.get(n) != whole.get(n)]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
