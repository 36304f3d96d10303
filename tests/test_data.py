"""The two graded sets are what their card says."""
import re
from collections import Counter
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from lire_nb.lists import load_lists
from lire_nb.rewards import longer_wins, pair_accuracy

DATA = Path(__file__).resolve().parents[1] / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TASKS = ("dialogue", "summarization")


@pytest.fixture(scope="module", params=TASKS)
def graded(request):
    return request.param, list(load_lists(DATA / f"{request.param}.jsonl"))


def card(row: str, task: str) -> str:
    line = next(text for text in (DATA / "README.md").read_text().splitlines() if text.startswith(f"| {row}"))
    return line.strip("| ").split(" | ")[1 + TASKS.index(task)]


def five_grams(texts) -> Counter:
    counts = Counter()
    for text in texts:
        words = re.findall(r"[\w']+", text.lower())
        counts.update(tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return counts


def messages(record) -> list[str]:
    return [record["prompt"]] if isinstance(record["prompt"], str) else [m["content"] for m in record["prompt"]]


def test_shape(graded):
    task, lists = graded
    assert len(lists) >= 200 and len({str(r["prompt"]) for r in lists}) == len(lists)
    sizes = Counter(len(r["completions"]) for r in lists)
    assert f"{sizes[4]} / {sizes[5]} / {sizes[6]}" == card("lists with", task) and set(sizes) == {4, 5, 6}
    for r in lists:
        assert all(0 <= g <= 10 and g * 2 == int(g * 2) for g in r["rewards"]), r["id"]
        assert max(r["rewards"]) - min(r["rewards"]) >= 5 and len(set(r["rewards"])) >= 3, r["id"]
        assert len(set(r["completions"])) == len(r["completions"]), r["id"]
        assert all(s.startswith("author:") for s in r["sources"]), r["id"]


def test_kinds_of_prompts(graded):
    task, lists = graded
    if task == "dialogue":
        kinds = Counter(r["meta"]["kind"] for r in lists)
        assert f"{kinds['helpful']} / {kinds['harmless']}" == card("helpful / harmless", task)
        several = sum(len(r["prompt"]) > 1 for r in lists)
        assert 0.2 < several / len(lists) < 0.3 and card("prompts of several turns", task).startswith(str(several))
        assert all(r["prompt"][-1]["role"] == "user" for r in lists)
    else:
        assert all(80 <= len(r["prompt"].split()) <= 250 for r in lists)


def test_length_and_position_do_not_tell_the_grade(graded):
    task, lists = graded
    lengths, grades = [], []
    for r in lists:
        n = len(r["completions"])
        lengths += [len(c) - sum(map(len, r["completions"])) / n for c in r["completions"]]
        grades += [g - sum(r["rewards"]) / n for g in r["rewards"]]
    rho = spearmanr(lengths, grades)[0]
    assert abs(rho) <= 0.15 and f"{rho:+.2f}".replace("-", "−") == card("Spearman", task)
    accuracy = pair_accuracy(lists, longer_wins)["accuracy"]
    assert f"{accuracy:.3f}" == card("accuracy of", task)
    first = sum(r["rewards"].index(max(r["rewards"])) == 0 for r in lists)
    assert card("lists in which the best", task) == f"{first} of {len(lists)}" and first / len(lists) < 0.3


def test_nothing_is_filled_from_a_template(graded):
    task, lists = graded
    texts = [t for r in lists for t in messages(r)] + [c for r in lists
                                                       for c, s in zip(r["completions"], r["sources"])
                                                       if s != "author:extractive"]
    counts = five_grams(texts)
    share = sum(n for n in counts.values() if n > 1) / counts.total()
    assert f"{share:.2%}".replace("%", " %") == card("share of repeated", task) and share < 0.02


@pytest.mark.skipif(not (SHARED / "hh-rlhf").is_dir(),
                    reason="the real HH files lie outside the project and are not here")
def test_dialogue_from_a_folder_of_real_hh_files():
    from lire_nb.tasks import load_task

    task = load_task("dialogue", path=SHARED / "hh-rlhf")
    assert task.notes == {"train": 0, "validation": 0, "test": 1498, "quarantined": 2, "also in test, taken out": 0}
    assert all(r["prompt"][-1]["role"] == "user" for r in task.prompts["test"])
