"""Does LIRE learn with its defaults? 20 steps on list sets of different kinds, each from the same policy. A command,
not a test:

    python tests/first_contact.py --out data/results/first_contact.jsonl --hh HH.jsonl.gz --graded GRADED.jsonl

Rows are added as they come; a set and setting that has a row is not run again. `--setting paper` takes
`LIREConfig.paper`."""
import argparse
import copy
import datetime
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lire_nb.cli import machine
from lire_nb.lists import load_lists
from lire_nb.logprobs import dataset_logps
from lire_nb.losses import SATURATED, lire_loss, list_metrics, list_probs
from lire_nb.models import load_policy
from lire_nb.temperature import why_mute
from lire_nb.training import LIREConfig, LIRETrainer

STEPS, LOOKED_AT = 20, 40


def trl_pairs(path: str) -> list[dict]:
    """The best and the worst of graded lists, in the layout of TRL's preference data."""
    rows = []
    for record in load_lists(path):
        best, worst = (pick(range(len(record["rewards"])), key=record["rewards"].__getitem__) for pick in (max, min))
        rows.append({"prompt": record["prompt"],
                     "chosen": [{"role": "assistant", "content": record["completions"][best]}],
                     "rejected": [{"role": "assistant", "content": record["completions"][worst]}]})
    return rows


def sets(args) -> dict:
    """Name -> rows or a file, in any layout that `load_lists` reads."""
    return {"dialogue (ours)": args.data / "dialogue.jsonl", "summarization (ours)": args.data / "summarization.jsonl",
            "TRL pairs, from ours": trl_pairs(args.data / "dialogue.jsonl"),
            **({"HH pairs": args.hh} if args.hh else {}),
            **({"AlpacaEval, graded": args.graded} if args.graded else {})}


def chosen_lists(source) -> list[dict]:
    """80 lists that can teach, the same at every call."""
    with tempfile.TemporaryDirectory() as place:  # for damaged rows, not beside the source
        aside = {"on_error": "quarantine", "quarantine": Path(place, "damaged.jsonl")}
        rows = load_lists(source, **(aside if isinstance(source, (str, Path)) else {}))
        lists = [r for r in rows if why_mute(r["rewards"]) is None]
    return random.Random(0).sample(lists, min(len(lists), 4 * STEPS))


def look(rows: list[list[float]], lists: list[dict], temperatures: list[float], transform: str = "zscore") -> dict:
    """P, its best answer, and T times the gradient of each list, at each list's own fixed T."""
    largest, best, moving = [], [], []
    for row, record, T in zip(rows, lists, temperatures):
        s = torch.tensor([row], dtype=torch.float64, requires_grad=True)
        r = torch.tensor([record["rewards"]], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(lire_loss(s, r, temperature=T, reward_transform=transform).sum(), s)
        largest.append(list_probs(s.detach(), temperature=T).max().item())
        best.append(list_metrics(s, r, temperature=T)["best_weight"].item())
        moving.append(T * gradient.norm().item())
    return {"best": best, "one_hot": sum(p > SATURATED for p in largest) / len(rows),
            "alive": sum(g > 1e-3 for g in moving) / len(rows)}


def run(name: str, source, setting: str) -> dict:
    began, lists = time.monotonic(), chosen_lists(source)
    seen = [{**r, **{k: [v for v, x in zip(r[k], r["rewards"]) if x is not None] for k in ("completions", "rewards")},
             "meta": {}} for r in lists[:LOOKED_AT]]
    model, tokenizer = load_policy("smollm2")

    def measure() -> list[list[float]]:
        return [row for row, _ in dataset_logps(model, tokenizer, copy.deepcopy(seen), batch_size=4)]

    before = measure()
    auto = [statistics.pstdev(row) or 1.0 for row in before]
    with tempfile.TemporaryDirectory() as place:
        make = LIREConfig if setting == "default" else LIREConfig.paper
        args = make(output_dir=place, max_steps=STEPS, save_strategy="no", report_to="none", disable_tqdm=True,
                    logging_steps=STEPS)
        trainer = LIRETrainer(model, args, lists, processing_class=tokenizer)
        trainer.train()
    after, history = measure(), trainer.state.log_history
    first, last = look(before, seen, auto), look(after, seen, auto)
    cold, flat = (look(before, seen, temperatures, "softmax") for temperatures in ([2.0] * len(seen), auto))
    rise = [b - a for a, b in zip(first["best"], last["best"])]
    return {
        "set": name, "setting": setting, "steps": STEPS, "lists": len(lists),
        "M": [min(len(r["rewards"]) for r in lists), max(len(r["rewards"]) for r in lists)],
        "tokens": round(statistics.mean(len(tokenizer(c)["input_ids"]) for r in seen for c in r["completions"])),
        "T": [round(t, 2) for t in sorted(auto)],
        "one_hot_at_2": cold["one_hot"], "alive_paper": cold["alive"], "alive_softmax": flat["alive"],
        "one_hot": first["one_hot"], "alive": first["alive"],
        "best_before": statistics.mean(first["best"]), "best_after": statistics.mean(last["best"]),
        "rise_se": statistics.stdev(rise) / len(rise) ** 0.5,
        "log": {k: v for k, v in history[-2 if len(history) > 1 else -1].items() if isinstance(v, (int, float))},
        "seconds": round(time.monotonic() - began), "date": str(datetime.date.today()), "machine": machine(),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/results/first_contact.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--hh", help="rows of Anthropic's HH")
    parser.add_argument("--graded", help="graded lists of AlpacaEval")
    parser.add_argument("--setting", choices=("default", "paper"), default="default")
    args = parser.parse_args()
    rows = map(json.loads, args.out.read_text().splitlines()) if args.out.exists() else ()
    done = {(r["set"], r["setting"]) for r in rows}
    for name, source in sets(args).items():
        if (name, args.setting) not in done:
            row = run(name, source, args.setting)
            with open(args.out, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                os.fsync(f.fileno())
            print(f"{name}: best {row['best_before']:.3f} -> {row['best_after']:.3f}, alive {row['alive']:.0%}, "
                  f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
