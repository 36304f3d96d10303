"""How memory and time grow with the number of lists: python tests/many_lists.py [20000 200000] [--words 30 12] [--in-memory]

Each count is measured in a process of its own: a file of lists is read (`load_lists`), put in order, identified,
tokenized and trained on for four steps by `train_policy`, with a tiny policy. For every stage a line: seconds, lists a
second, and the peak of the memory that is the process's own (RssAnon, sampled every 20 ms). Pages of mapped files, which
give way when memory is short, are told apart. --in-memory: all of it as Python objects and tables in memory.

It is no test of `make test`: 200,000 lists take some minutes. The smaller twin is in test_many_lists.py."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS = "the film was long dull bright odd fine and slow with a good end that nobody liked much but all talked of".split()


def write_lists(path: Path, count: int, words: tuple[int, int] = (30, 12)) -> None:
    """Lists with so many words of prompt, and in each of four candidates."""
    said = lambda n, k: " ".join(WORDS[(n * 7 + i * i + n // 19 * i) % len(WORDS)] for i in range(k))  # noqa: E731
    with open(path, "w") as f:
        for n in range(count):
            texts = [f" {said(n + 31 * j, words[1])} {j}" for j in range(4)]
            record = {"id": f"list-{n * 7919 % count:07}", "prompt": f"{n} {said(n, words[0])}", "completions": texts,
                      "rewards": [0.5 * j - n % 3 for j in range(4)], "sources": ["made"] * 4, "meta": {}}
            f.write(json.dumps(record) + "\n")


class Memory:
    """The largest RssAnon and RssFile of this process since `take`, in bytes."""

    def __init__(self):
        self.most = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            self._look()
            time.sleep(0.02)

    def _look(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {name: 1024 * int(line.split()[1]) for line in lines for name in ("RssAnon", "RssFile")
                 if line.startswith(name)}
        self.most = {name: max(value, self.most.get(name, 0)) for name, value in found.items()}

    def take(self) -> dict:
        self._look()
        most, self.most = self.most, {}
        return most


def measure(folder: Path, count: int, in_memory: bool) -> list[dict]:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from tiny_policy import make_start

    from lire_nb import enhancement, many_lists, training
    from lire_nb.enhancement import train_policy
    from lire_nb.lists import load_lists

    torch.set_num_threads(1)
    if in_memory:
        many_lists.IN_MEMORY = 2**60
        enhancement.MANY = training.MANY = 2**60
    make_start(folder / "start", dropout=0.0)
    settings = dict(max_steps=4, use_cpu=True, bf16=False, disable_tqdm=True, per_device_train_batch_size=4,
                    max_prompt_length=64, max_completion_length=48, logging_steps=4, on_mute_lists="warn")
    few = folder / "few.jsonl"
    write_lists(few, 32)
    train_policy(folder / "start", load_lists(few), folder / "warm", **settings)  # what the libraries load
    memory, rows, began = Memory(), [], time.perf_counter()

    def stage(name):
        nonlocal began
        seconds = time.perf_counter() - began
        rows.append({"stage": name, "lists": count, "seconds": round(seconds, 2), "per_second": round(count / seconds),
                     **{key: value for key, value in memory.take().items()}})
        print(json.dumps(rows[-1]), flush=True)
        began = time.perf_counter()

    stage("before")
    lists = load_lists(folder / "lists.jsonl")
    stage("load_lists")
    prepare = training.prepare_lists
    identify = enhancement.lists_identity

    def identified(*args):
        found = identify(*args)
        stage("order and identity")
        return found

    def prepared(*args):
        if args[0] is None:
            return prepare(*args)
        stage("checks")
        found = prepare(*args)
        stage("tokenize")
        return found

    enhancement.lists_identity, training.prepare_lists = identified, prepared
    train_policy(folder / "start", lists, folder / "policy", **settings)
    stage("four steps")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("counts", nargs="*", type=int, default=[20_000, 200_000])
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--words", nargs=2, type=int, default=(30, 12), help="of a prompt, and of a candidate")
    parser.add_argument("--inside", default=None)
    args = parser.parse_args()
    if args.inside:
        measure(Path(args.inside), args.counts[0], args.in_memory)
        return
    peaks = {}
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            write_lists(Path(folder, "lists.jsonl"), count, args.words)
            size = Path(folder, "lists.jsonl").stat().st_size
            print(f"{count} lists, {size / 2**20:.0f} MiB of text", flush=True)
            command = [sys.executable, __file__, "--inside", folder, str(count), *["--in-memory"] * args.in_memory]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
            rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"stage"')]
        base = rows[0]["RssAnon"]
        for r in rows[1:]:
            print(f"{r['stage']:>20}: {r['seconds']:7.1f} s {r['per_second']:7} lists/s   own memory "
                  f"{(r['RssAnon'] - base) / 2**20:+7.0f} MiB   mapped {r['RssFile'] / 2**20:6.0f} MiB", flush=True)
        peaks[count] = max(r["RssAnon"] for r in rows) - base
    if len(peaks) > 1:
        few, many = min(peaks), max(peaks)
        print(f"own memory grows by {(peaks[many] - peaks[few]) / 2**20:.0f} MiB between {few} and {many} lists")


if __name__ == "__main__":
    main()
