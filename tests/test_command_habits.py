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


@pytest.mark.parametrize("id, words", [(None, "own.jsonl:4: rewards: nothing is scored"),
                                       ("q7", "own.jsonl:4: rewards of list 'q7': nothing is scored")])
def test_a_list_is_named_by_its_row(tiny, capsys, id, words):
    """The third row stands in line 4, after a blank one."""
    rows = [row | ({"id": f"a{k}"} if id else {}) for k, row in enumerate(LISTS)]
    rows[2] |= {"points": [None] * 3} | ({"id": id} if id else {})
    lines = list(map(json.dumps, rows))
    Path("own.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    mapped = [*MAP, *(["--map", "id=id"] if id else [])]
    assert main(["train", "--lists", "own.jsonl", *mapped, "--policy", tiny, *QUICK, "--out", "new"]) == 2
    said(capsys, words)


@pytest.mark.parametrize("words, guess", [
    (["--set", "loss_type=dop"], "did you mean dpo?"), (["--set", "temprature=3"], "did you mean temperature?"),
    (["--map", "rewards=point"], "did you mean points?"), (["--map", "promt=question"], "did you mean prompt?")])
def test_a_misspelled_word_is_guessed_and_nothing_stays(tiny, capsys, words, guess):
    mapped = [w for pair in zip(MAP[::2], MAP[1::2]) for w in pair if words[1].split("=")[0] not in pair[1]]
    assert main(["train", "--lists", "own.jsonl", *mapped, "--policy", tiny, *QUICK, "--out", "new", *words]) == 2
    said(capsys, guess)
    assert {p.name for p in Path().iterdir()} == {"own.jsonl"}, "a run that was refused leaves nothing behind"


@pytest.mark.parametrize("words", [
    ["train", "--lists", "own.jsonl", "--lists", "other.jsonl", "--out", "new"],
    ["score", "--lists", "own.jsonl", "--reward", "length", "--reward", "vader", "--out", "new"],
    ["sample", "--prompts", "a.txt", "--policy", "one", "--policy", "two", "--out", "new"],
    ["compare", "--lists", "own.jsonl", "--judge", "length", "--judge", "length", "--out", "new"],
    ["judge", "--run", "run", "--people", "ada", "--people", "ben", "--out", "new"],
    ["enhance", "--prompts", "a.txt", "--reward", "length", "--seed", "1", "--seed=2", "--out", "new"]])
def test_an_option_that_is_given_twice_is_refused(capsys, words):
    assert main(words) == 2
    said(capsys, f"lire {words[0]}: ", "given twice", next(w for w in words if words.count(w) == 2 or w == "--seed"))


def test_prompts_of_a_stop_rule_need_the_rule(tiny, capsys):
    Path("a.txt").write_text("say 1\nsay 2\n")
    assert main(["enhance", "--prompts", "a.txt", "--reward", "length", "--policy", tiny, "--stop-prompts", "a.txt",
                 "--out", "new"]) == 2
    said(capsys, "--stop-prompts", "no effect without --stop-gold or --stop-kl")


def test_every_option_is_either_repeatable_or_refused_twice():
    """No command of ours has an option whose last value would silently win."""
    from lire_nb.options import _Once, _parser

    commands = next(a for a in _parser()._actions if a.dest == "command").choices
    kinds = {type(a).__name__ for one in commands.values() for a in one._actions}
    assert len(commands) > 10 and kinds == {"_HelpAction", "_AppendAction", "_StoreTrueAction", _Once.__name__}


def test_going_on_is_said_once_and_read_once(tiny, capsys, monkeypatch):
    """A training that is stopped at its fourth step goes on; every file of its checkpoint is hashed once."""
    import lire_nb.resume
    from lire_nb.training import LIRETrainer

    train = ["train", "--lists", "own.jsonl", *MAP, "--policy", tiny, *QUICK, "--set", "max_steps=6", "--set",
             "save_steps=2", "--set", "per_device_train_batch_size=2", "--out", "new"]
    whole = LIRETrainer.training_step

    def stops(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    with monkeypatch.context() as now:
        now.setattr(LIRETrainer, "training_step", stops)
        assert main(train) == 130
    assert "goes on" not in capsys.readouterr().err
    (newest,) = [p for p in Path("new.partial").glob("checkpoint-*") if p.name == "checkpoint-4"]
    files, hashed, kept = {p.name for p in newest.iterdir()} - {"manifest.json"}, [], lire_nb.resume.file_hash
    monkeypatch.setattr(lire_nb.resume, "file_hash", lambda path: hashed.append(Path(path)) or kept(path))
    assert main(train) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "goes on" in line] == [
        "lire: goes on from checkpoint-4 of 6 steps"]
    read = [p.name for p in hashed if p.parent.name == "checkpoint-4"]
    assert sorted(read) == sorted(files), "each file once"


def test_a_tracker_that_is_missing_names_its_extra(tiny, capsys, monkeypatch):
    """Python gives no module where sys.modules holds None."""
    import sys
    from configparser import ConfigParser

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "--lists", "own.jsonl", *MAP, "--policy", tiny, *QUICK, "--out", "new", "--set",
                 "report_to=tensorboard"]) == 2
    extra = said(capsys, "report_to: tensorboard is not installed").partition("lire_nb[")[2].partition("]")[0]
    config = ConfigParser(delimiters=["="])
    config.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
    assert "tensorboard" in config["DEFAULT"][f"{extra}_requirements"]
