"""What each of several processes does, for test_ranks.py: a round of self-enhancement with everything on, an
evaluation, a reward that fails, a process that is killed. Started by warm.ranks, or alone with WORLD_SIZE=1:
share_processes.py FOLDER WHAT. For test_handover.py: an evaluation with servers."""
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

import torch

from lire_nb import cli, handover, sampling
from lire_nb.base import ranks
from lire_nb.base.errors import LireError
from lire_nb.enhancement import Refit, self_enhance, StopRule
from lire_nb.evaluation import evaluate_systems
from lire_nb.models import load_policy
from lire_nb.options import read_prompts
from lire_nb.records import make_record
from lire_nb.rewards import longer_wins, score_lists, train_reward_model
from lire_nb.sampling import sample_lists, SamplingSettings
from lire_nb.watching import EvaluationCallback

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WORDS = [" good", " bad", " dull and long", " fine", " odd"]
# of unequal length, and one of them twice
PROMPTS = [{"id": f"p{i}", "prompt": "film " + "x" * (5 * i % 7) + " was", "meta": {}} for i in range(7)]
GRADED = [make_record(f"film {n} was", WORDS[: 2 + n % 4], rewards=[1.0, -0.5, 0.25, 0.0, 0.7][: 2 + n % 4],
                      id=f"g{n}") for n in range(5)]
HELD_OUT = [{"id": f"h{i}", "prompt": f"the {'y' * i} end", "meta": {}} for i in range(3)]
SHORT = SamplingSettings(max_new_tokens=5)


TRAINING = {"learning_rate": 5e-3, "bf16": False, "use_cpu": True, "disable_tqdm": True, "loss_type": "dpo",
            "per_device_train_batch_size": 6 // SIZE, "logging_steps": 1}


def vowels(prompts, completions):
    CALLS.append(len(completions))
    return [sum(c in "aeiou" for c in text) - len(text) / 10 for text in completions]


CALLS, WORKED = [], []
vowels.per_text = True


def watched(owner, name):
    function = getattr(owner, name)

    def one(*args, **kwargs):
        WORKED.append(name)
        return function(*args, **kwargs)

    setattr(owner, name, one)


def whole_round(place: Path) -> dict:
    "Sampling, a reward model fitted, scoring, reference log-probs, training, a stop rule, an evaluation."
    watched(sampling.LocalSampler, "_rows")
    stop = StopRule(HELD_OUT, gold=vowels, max_kl=1e3, settings=SHORT)
    (policy,) = self_enhance(place / "start", PROMPTS, None, place / f"run-{SIZE}", evolve=1, num_candidates=3,
                             settings=SHORT, training=TRAINING, progress=False, stop=stop,
                             refit=Refit(GRADED, backbone=place / "start-dropout", lr=1e-2, batch_size=3))
    with ranks.sharing():
        evaluate_systems(place / f"run-{SIZE}", {"start": place / "start", "LIRE": policy}, HELD_OUT,
                         {"vowels": vowels, "unknown": lambda p, c: [float(len(t)) for t in c]}, settings=SHORT,
                         exact_kl=True, progress=False)
    return {"worked": len(WORKED)}


def centered(lists) -> list:
    mean = sum(x for r in lists["rewards"] for x in r) / sum(map(len, lists["rewards"]))
    return [[x - mean for x in r] for r in lists["rewards"]]


def pieces(place: Path) -> dict:
    "The verbs on their own: sampled in whole batches, a reward model with dropout and a latent."
    with ranks.sharing():
        sampler = sampling.LocalSampler(*load_policy(place / "start"), batch_size=6, progress=False)
        lists = sample_lists(sampler, [*PROMPTS, {**PROMPTS[0], "id": "again"}], 3, settings=SHORT, seed=3)
        reward = train_reward_model(GRADED, place / "bert", lr=1e-3, batch_size=2, epochs=2, seed=1, progress=False,
                                    latent=3)
        upper = train_reward_model(GRADED, place / "bert", lr=1e-3, batch_size=2, seed=1, progress=False,
                                   upper_layers=1)
        reward.batch_size = 4
        scored = score_lists(lists, reward)
        none = score_lists([make_record("q", ["a"], id="one")], reward)  # fewer texts than processes
        watch = EvaluationCallback(HELD_OUT, {"vowels": vowels}, start=sampler.model, settings=SHORT, seed=4)
        seen = watch.measure(sampler.model, sampler.tokenizer)
    # a ranking loss cannot see a constant on all scores: the last bias follows rounding alone
    named = reward.model.named_parameters()
    weights = torch.cat([p.detach().flatten() for name, p in named if "decode.bias" not in name])
    return {"lists": [dict(r) for r in lists], "rewards": centered(scored), "history": reward.history + upper.history,
            "weights": weights.tolist(), "none": len(none["rewards"][0]), "seen": seen}


def fails(place: Path) -> dict:
    "A reward that cannot score one text, on whichever process it falls; and one that fails on each in its own way."
    found = {}

    def one(prompts, completions):
        if " odd" in completions:
            raise RuntimeError("odd")
        return [0.0] * len(completions)

    def each(prompts, completions):
        raise RuntimeError(f"process {RANK}")

    for reward in (one, each):
        reward.per_text, began = True, time.monotonic()
        try:
            with ranks.sharing():
                score_lists(GRADED, reward)
        except LireError as e:
            found[reward.__name__] = [str(e), time.monotonic() - began]
    return found


def killed(place: Path) -> dict:
    "Process 1 dies without a word in the middle of its share of the sampling."
    draw = sampling.LocalSampler._rows

    def rows(*args):
        WORKED.append("rows")
        if os.environ.get("DIES") == str(RANK) and len(WORKED) == 2:
            os._exit(0)
        return draw(*args)

    begin = sampling.LocalSampler.__init__
    sampling.LocalSampler._rows, begin.__defaults__ = rows, (3, *begin.__defaults__[1:])  # a prompt is a batch
    try:
        self_enhance(place / "start", PROMPTS, vowels, place / os.environ["RUN"], evolve=1, num_candidates=3,
                     settings=SHORT, training=TRAINING, progress=False)
    except LireError as e:
        return {"error": str(e), "worked": len(WORKED)}
    return {"worked": len(WORKED)}


def served(place: Path) -> dict:
    """An evaluation where a server draws for one of two systems, and scores for one of two judges. Two processes ask for it
    on the command line, and once more if the server has died."""
    handover._LENGTH, server, systems = 8, os.environ["SERVER"], {name: place / name for name in ("a", "b")}
    if SIZE != 2:
        far = handover.scored_by(longer_wins, f"{server}/score", place / f"served-{SIZE}")
        with ranks.sharing():
            evaluate_systems(place / f"served-{SIZE}", systems, read_prompts(str(place / "prompts.txt")),
                             {"far": far, "near": longer_wins}, settings=SamplingSettings(max_new_tokens=4),
                             samplers={"b": f"{server}/v1"}, progress=False)
        return {}
    handover.Engine.__init__.__kwdefaults__.update(patience=1, progress=False)
    options = [f"--{name}={value}" for name, value in (
        ("prompts", place / "prompts.txt"), ("out", place / "served-2"), ("max-new-tokens", 4), ("judge", "far=length"),
        ("judge", "near=length"), ("sampler", f"b={server}/v1"), ("scorer", f"far={server}/score"),
        *(("system", f"{name}={folder}") for name, folder in systems.items()))]
    found = []
    while not found or found[-1][0]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found.append([cli.main(["evaluate", *options]), said.getvalue()])
        (place / f"ended-{RANK}").touch()
        while not (place / "again").exists():  # the server is back
            time.sleep(0.02)
    return {"found": found}


def main(place: Path, what: str) -> None:
    torch.set_num_threads(1)
    if what != "killed":  # float32 on every machine; else in the dtype of this one
        torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = bool
    if SIZE > 1:  # as a launch does; else the blocks do it
        torch.distributed.init_process_group("gloo")
    found = {name: globals()[name](place) for name in what.split(",")}
    (place / f"{what}-{SIZE}-{RANK}.json").write_text(json.dumps(found))
    if SIZE > 1 and what != "killed":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
