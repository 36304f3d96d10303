"""How fast lists are validated and written, and how much memory it takes. A script, not a test:

    python tests/bench_lists.py            # 20,000 and 200,000 lists of 6 candidates, each step in a process of its own
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CANDIDATES = 6
WORDS = "the reward of a list depends on what its candidates say and on nothing else that stands beside them".split()


def raw_rows(count):
    """Rows as a file would have them: a chat prompt of 40 words, six completions of 30 to 55 words."""
    for i in range(count):
        text = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(40))
        yield {
            "id": f"row-{i}",
            "prompt": [{"role": "user", "content": f"{i}: {text}"}],
            "completions": [" ".join(WORDS[(i * j + k) % len(WORDS)] for k in range(30 + 5 * j))
                            for j in range(CANDIDATES)],
            "rewards": [(i * 7 + j) % 11 / 10 for j in range(CANDIDATES)],
            "sources": [f"policy:{j}" for j in range(CANDIDATES)],
            "meta": {"row": i},
        }


def step(name, count, folder):
    """Run one step here; seconds, and the peak of resident memory in MiB of this process."""
    from lire_nb.lists import iter_lists, load_lists, save_lists

    source, before = folder / f"{count}.jsonl", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    if name == "validate and write":
        save_lists(raw_rows(count), source)
    elif name == "read, validate, write JSONL":
        save_lists(iter_lists(source), folder / f"{count}-copy.jsonl")
    elif name == "read, validate, write Parquet":
        save_lists(iter_lists(source), folder / f"{count}.parquet")
    elif name == "read Parquet, write JSONL":
        save_lists(iter_lists(folder / f"{count}.parquet"), folder / f"{count}-back.jsonl")
    else:
        assert len(load_lists(source)) == count
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step": name, "lists": count, "lists_per_second": round(count / seconds), "peak_mib": round(peak),
            "imports_mib": round(before)}


STEPS = ("validate and write", "read, validate, write JSONL", "read, validate, write Parquet",
         "read Parquet, write JSONL", "load_lists (in memory)")


def main():
    if len(sys.argv) == 4:
        print(json.dumps(step(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'step':32}{'lists':>9}{'lists/s':>9}{'peak MiB':>10}{'imports MiB':>12}")
        for count in (20_000, 200_000):
            for name in STEPS:
                command = [sys.executable, __file__, name, str(count), folder]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"{result['step']:32}{result['lists']:>9,}{result['lists_per_second']:>9,}"
                      f"{result['peak_mib']:>10}{result['imports_mib']:>12}", flush=True)
            # what went through JSONL, and through Parquet and back, is byte for byte what was written first
            first, copy, back = (Path(folder, f"{count}{suffix}.jsonl").read_bytes()
                                 for suffix in ("", "-copy", "-back"))
            assert first == copy == back
            size = len(first) / 2**20
            print(f"{'':4}{size:.0f} MiB of JSONL; all three files equal", flush=True)


if __name__ == "__main__":
    main()
