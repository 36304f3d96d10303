"""What new users typed: own column names, judges and losses of one's own, misspelled words, runs that were refused."""
import json
from pathlib import Path

import pytest
from tiny_policy import make_start

from lire_nb.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
LISTS = [{"question": f"say {k}", "answers": ["eel", "fox", "bee"], "points": [1.0, 0.0, 2.0]} for k in range(6)]
MAP = ["--map", "prompt=question", "--map", "completions=answers", "--map", "rewards=points"]
QUICK = ["--set", "bf16=False", "--set", "use_cpu=True"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(make_start(tmp_path_factory.mktemp("policy") / "tiny"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder with lists in it, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LISTS))
    return tmp_path


def said(capsys, *words) -> str:
    """The one line of an error, all of whose words are there."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lire ")]
    assert len(errors) == 1, errors
    assert all(word in errors[0] for word in words), errors[0]
    return errors[0]


def test_compare_reads_columns_of_other_names(monkeypatch):
    """The lists that reach `compare` are those of the same rows under our names; the judge keeps the name it was given."""
    Path("checks.py").write_text("def count_e(prompts, completions):\n    return [float(c.count('e')) for c in completions]\n")
    seen = {}
    monkeypatch.setattr("lire_nb.lab.compare.compare",
                        lambda lists, policy, losses, judge, out, **more: seen.update(lists=list(lists), **more))
    assert main(["compare", "--lists", "own.jsonl", *MAP, "--judge", "checks.py:count_e", "--out", "which"]) == 0
    assert [(r["prompt"], r["completions"], r["rewards"]) for r in seen["lists"]] == [
        (r["question"], r["answers"], r["points"]) for r in LISTS]
    assert seen["judge_name"] == "checks.py:count_e"


def test_a_function_of_ones_own_scores(capsys):
    Path("checks.py").write_text("def count_e(prompts, completions):\n    return [float(c.count('e')) for c in completions]\n")
    command = ["score", "--lists", "own.jsonl", *MAP, "--reward", "checks.py:count_e", "--out", "scored.jsonl"]
    assert main(command) == 0
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [r["rewards"] for r in rows] == [[2.0, 0.0, 2.0]] * 6  # by hand: eel, fox, bee
    assert main(command) == 0 and "made with the same settings" in capsys.readouterr().out
    Path("checks.py").write_text("def count_e(prompts, completions):\n    return [1.0] * len(completions)\n")
    assert main(command) == 2, "another function under the same name is another reward"
    said(capsys, "scored.jsonl")


def test_loss_is_another_word_for_a_setting(tiny, capsys):
    train = ["train", "--lists", "own.jsonl", *MAP, "--policy", tiny, *QUICK, "--set", "max_steps=1", "--out", "new"]
    assert main([*train, "--loss", "dpo"]) == 0
    for same in (["--set", "loss_type=dpo"], ["--loss", "dpo", "--set", "loss_type=dpo"]):
        capsys.readouterr()
        assert main([*train, *same]) == 0 and "made with the same settings" in capsys.readouterr().out
    assert main([*train, "--loss", "sft", "--set", "loss_type=dpo"]) == 2
    said(capsys, "--loss: two losses", "leave --loss out")
