"""What one of several processes does, for test_training.py: python -m torch.distributed.run --nproc_per_node 2
two_processes.py PLACE. Results go to PLACE/rank-N.json."""
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from lire_nb.base.errors import LireError
from lire_nb.enhancement import self_enhance, train_policy
from lire_nb.models import load_policy
from lire_nb.records import make_record
from lire_nb.resume import Stopped
from lire_nb.sampling import SamplingSettings
from lire_nb.training import LIREConfig, LIRETrainer

WORDS = [" good", " bad", " dull and long", " fine", " odd"]
LISTS = [make_record(f"film {n} was", WORDS[: 2 + n % 4], rewards=[1.0, -0.5, 0.25, 0.0, 0.7][: 2 + n % 4],
                     id=f"film-{n:02}") for n in range(11)]
SETTINGS = dict(learning_rate=5e-3, max_steps=5, gradient_accumulation_steps=2, disable_tqdm=True, bf16=False,
                use_cpu=True, report_to="none", logging_steps=1, save_strategy="no")


def trainer(place, batch, lists=LISTS, callbacks=None, **settings):
    model, tokenizer = load_policy(place / "start")
    args = LIREConfig(**{"output_dir": str(place / "out"), "per_device_train_batch_size": batch,
                         "per_device_eval_batch_size": batch, **SETTINGS, **settings})
    return LIRETrainer(model, args, lists, LISTS[:7], processing_class=tokenizer, callbacks=callbacks)


def course(one) -> dict:
    """Losses, metrics and weights of a training of five steps, and an evaluation."""
    one.train()
    log = [{k: h[k] for k in ("loss", "grad_norm", "expected_reward", "best_weight", "entropy")}
           for h in one.state.log_history if "loss" in h]
    evaluated = one.evaluate()
    return {"log": log, "weights": flat(one.model).tolist(),
            "eval": {k: evaluated[f"eval_{k}"] for k in ("loss", "expected_reward", "kendall")}}


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spoilt(place, what: str) -> dict:
    """A loss, or a gradient, that is not finite on process 1 alone: both must stop with the same line, weights
    untouched."""
    one = trainer(place, 1, lists=LISTS[:4], gradient_accumulation_steps=1)
    original = one.list_losses

    def list_losses(model, inputs):
        losses, metrics = original(model, inputs)
        if one.args.process_index == 1 and one.state.global_step == 0:
            # the root of zero has an infinite slope
            losses = losses * float("nan") if what == "loss" else losses + 0 * (losses.detach() - losses).sqrt().sum()
        return losses, metrics

    one.list_losses, before = list_losses, flat(one.model).clone()
    try:
        one.train()
        return {"error": None}
    except LireError as e:
        return {"error": str(e), "untouched": torch.equal(before, flat(one.model)), "ids": [r["id"] for r in LISTS[:4]]}


class TermOne(TrainerCallback):
    """Only process 1 is told to stop."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_and_resumed(place) -> dict:
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 100, "per_device_train_batch_size": 1}
    options = {k: v for k, v in settings.items() if k not in ("report_to",)}
    try:
        train_policy(place / "start-dropout", LISTS, place / "stopped", callbacks=[TermOne()], **options)
        return {"stopped": None}
    except Stopped as stop:
        message = str(stop)
    kept = sorted(p.name for p in (place / "stopped.partial").glob("checkpoint-*"))
    train_policy(place / "start-dropout", LISTS, place / "stopped", **options)
    train_policy(place / "start-dropout", LISTS, place / "undisturbed", **options)
    return {"stopped": message, "kept": kept,
            "equal": all((place / "stopped" / f).read_bytes() == (place / "undisturbed" / f).read_bytes()
                         for f in ("model.safetensors", "training.jsonl"))}


def enhanced(place) -> dict:
    prompts = [{"id": f"p{i}", "prompt": f"film {i} was", "meta": {}} for i in range(4)]
    calls = []

    def short(prompts, completions):
        calls.append(len(completions))
        return [-float(len(c)) for c in completions]

    training = {k: v
        for k, v in SETTINGS.items() if k not in ("max_steps", "report_to")} | {"per_device_train_batch_size": 1,
                                                                                 "gradient_accumulation_steps": 1}
    folders = self_enhance(place / "start", prompts, short, place / "run", num_candidates=3,
                           settings=SamplingSettings(max_new_tokens=4), training=training, progress=False)
    return {"calls": calls, "folders": [p.name for p in folders],
            "whole": all((p / "model.safetensors").is_file() for p in folders)}


def main(place: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {"course": course(trainer(place, 1)), "loss": spoilt(place, "loss"), "gradient": spoilt(place, "gradient"),
             "stopped": stopped_and_resumed(place), "enhanced": enhanced(place)}
    (place / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
