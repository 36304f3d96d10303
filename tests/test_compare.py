"""`lire compare`: splits without leakage, equal searches, a killed run, and an answer recomputed from its rows."""
import json
import math
import os
import random
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from scipy import stats
from tiny_policy import make_start

from lire_nb.base.errors import LireError
from lire_nb.frontiers import choose_under_cap
from lire_nb.lab.compare import (
    compare, first_line, judge_check, Question, read_found, read_method, Room, search_points, training_of, work_of,
    write_report, verdicts_of,
)
from lire_nb.lab.own_lists import same_text, split_by_prompt
from lire_nb.models import Policy
from lire_nb.options import settings_of
from lire_nb.records import make_record
from lire_nb.rewards import longer_wins
from lire_nb.rivals import get_loss, LOSSES
from lire_nb.training import LIREConfig

HERE = Path(__file__).parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_stands_on_two_sides(seed):
    """Copies of prompts in other dress go where their prompt goes, and every list goes somewhere, once."""
    draw = random.Random(seed)
    dress = [str.upper, str.title, lambda t: f"  {t}!! ", lambda t: t.replace(" ", "\n"), lambda t: f"“{t}”"]
    words = [f"what is {draw.randrange(90)} and {draw.randrange(90)}" for _ in range(40)]
    texts = words + [draw.choice(dress)(draw.choice(words)) for _ in range(60)]
    lists = [make_record(t, ["a", "b"], [1, 0], id=str(k)) for k, t in enumerate(texts)]
    draw.shuffle(lists)
    parts = split_by_prompt(lists, {"validation": 0.2, "test": 0.3}, seed=seed)
    # the oracle strips a text to its letters and digits in another way
    bare = [{"".join(c for c in r["prompt"].lower() if c.isalnum()) for r in part} for part in parts.values()]
    assert not any(a & b for a, b in combinations(bare, 2)) and all(bare)
    assert sorted(r["id"] for part in parts.values() for r in part) == sorted(r["id"] for r in lists)
    count = len(set().union(*bare))
    assert len(bare[1]) == round(0.2 * count) and len(bare[2]) == round(0.3 * count)


def test_text_and_turns_of_one_prompt_are_the_same():
    assert same_text([{"role": "user", "content": "Hi there."}]) == same_text("hi  THERE")
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]
    assert same_text(system) != same_text("hi there")


def test_every_loss_is_searched_equally():
    for points in range(1, 7):
        tried = {name: search_points(read_method(name), points, temperature=10.0) for name in LOSSES}
        assert {len(found) for found in tried.values()} == {points}
        assert all(len({json.dumps(one, sort_keys=True) for one in found}) == points for found in tried.values())


def points_of(training: dict, *losses: str) -> dict[str, list[dict]]:
    """All settings of every training that a search would run."""
    asked = Question([make_record("prompt", ["a", "b"], [1, 0])], Policy("none", "none"),
                     tuple(read_method(name) for name in losses), len, training=training)
    return {name: [training_of(asked, m, p) for p in search_points(m, 6, asked.learning_rate, 20.0)]
            for name, m in zip(losses, asked.methods)}


@pytest.mark.parametrize("loss, training", [
    ("lire", {"temperature": 7.0, "reward_transform": "softmax"}), ("lire_anchored", {"temperature": 7.0}),
    ("dpo", {"beta": 0.7}), ("rrhf", {"loss_kwargs": {"sft_weight": 0.3}}), ("pro", {"sft_weight": 0.3}),
    ("slic", {"loss_kwargs": {"margin": 3.0}})])
def test_a_setting_that_was_asked_for_is_trained_with(loss, training):
    """Whatever is asked of the loss reaches its function in every point, and the points still differ."""
    points = points_of(training, loss, "sft")
    for told in points[loss]:
        used = LIREConfig(output_dir="unused", **told).loss_settings()
        wanted = {**training, **training.get("loss_kwargs", {})}
        assert all(used[name] == value for name, value in wanted.items() if name != "loss_kwargs")
    assert len({json.dumps(told, sort_keys=True) for told in points[loss]}) == 6
    assert points["sft"] == points_of({}, "sft")["sft"]  # which takes none of them


@pytest.mark.parametrize("training, losses, words", [
    ({"beta": 0.7}, ("lire", "sft"), "none of the losses takes it"),
    ({"temperature": 7.0}, ("lire", "lire_auto"), "is what makes LIRE, T = auto what it is"),
    ({"score": "sum"}, ("lire_anchored",), "is what makes anchored LIRE what it is")])
def test_a_setting_that_no_loss_can_have_is_refused(training, losses, words):
    with pytest.raises(LireError, match=words):
        points_of(training, *losses)


def test_settings_are_those_of_the_losses_that_were_asked_for(tmp_path):
    """`beta` is no setting of LIRE, and is one of DPO; a value that no training can use is said before the work."""
    start = tmp_path / "start"
    make_start(start)
    lists = [make_record(f"say {k}", ["good", "bad"], [1, 0]) for k in range(24)]
    ask = lambda **training: compare(lists, start, ["dpo"], longer_wins, tmp_path / "out", training=training,  # noqa: E731
                                     dry_run=True, say=said.append)
    said = []
    ask(beta=0.7)
    assert said and not (tmp_path / "out").exists()
    for training, words in (({"learning_rate": -1.0}, "out of range"), ({"seed": 3}, "decided by the comparison")):
        with pytest.raises(LireError, match=words):
            ask(**training)


def question(seeds=5, **more):
    lists = [make_record(f"prompt {k}", ["a", "b"], [1, 0]) for k in range(8)]
    methods = tuple(read_method(name) for name in ("lire", "dpo", "sft"))
    return Question(lists, Policy("none", "none"), methods, len, seeds=seeds, max_kl=6.0, **more)


def test_the_work_is_counted_right():
    asked = question(seeds=3, points=4, prompts=8, samples=2, best_of=16)
    asked.training.update(num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    # 50 lists in batches of 8 are 7 steps, three times; a search point is judged once, a seed at three looks
    assert work_of(asked, 50, {"validation": 5, "test": 8}) == (
        3 * (4 + 3), 21, 3 * (4 * 5 * 2 + 3 * 3 * 8 * 2) + 8 * 16)


PROMPTS, SAMPLES = 12, 3


def simulated(folder, slopes: dict[str, float], seeds: int, draw, noise=0.15, page=False, **more) -> str:
    """The answer of a comparison whose policies gain slope · √KL, and whose seeds differ by the noise."""
    room = Room(question(seeds, **more), folder, lambda line: None)
    room.__dict__.update(parts={"train": [], "validation": [], "test": []}, look={"lines": ["seen"]})
    base = draw.normal(0, 2, PROMPTS)
    scores = base[:, None] + draw.normal(0, 1, (PROMPTS, 16))
    room.rows("start-test", lambda: [
        {"id": f"p{i}", "prompt": f"q{i}", "completions": ["x"] * 16, "scores": {"judge": list(row)},
         "tokens": [1] * 16, "finish_reasons": ["eos"] * 16} for i, row in enumerate(scores)])
    runs, names = {}, {m.name: m for m in room.question.methods}
    for name, slope in slopes.items():
        runs[name] = [[look(base, slope, draw.normal(0, noise), kl * draw.uniform(0.8, 1.3), draw)
                       for kl in (2.0, 5.0, 8.0)] for _ in range(seeds)]
    chosen = {name: choose_under_cap([{"settings": search_points(names[name], 1, temperature=20.0)[0], "proxy": 0.0,
                                       "kl": 0.0}], 6.0) for name in slopes}
    judge = {"fails": "", "logits": False, "name": "planted", "accuracy": 1.0, "lists": 9, "spread": 1.0}
    found = read_found(room, judge, chosen, runs)
    if page:
        write_report(room, found)
    return first_line(found)


def look(base, slope, luck, kl, draw) -> list[dict]:
    rows = []
    for i, b in enumerate(base):
        ratio = kl + draw.normal(0, 0.3, SAMPLES)
        got = b + slope * math.sqrt(kl) + luck + draw.normal(0, 1, SAMPLES)
        rows.append({"id": f"p{i}", "prompt": f"q{i}", "completions": ["y"] * SAMPLES, "scores": {"judge": list(got)},
                     "tokens": [2] * SAMPLES, "logps": list(ratio - 9), "start_logps": [-9.0] * SAMPLES})
    return rows


def recomputed(folder: Path, max_kl: float = 6.0) -> dict:
    """Differences at equal distance of every two losses, (seeds, prompts), and the distance, from the rows alone."""
    rows = pd.read_parquet(folder / "rows.parquet")
    start = rows[rows.loss == "start"]
    unit = math.sqrt((start.groupby("id").score.var(ddof=1)).mean())  # equally many answers to each prompt
    old = start.groupby("id").score.mean()
    rows = rows[rows.loss != "start"].assign(kl=lambda r: r.logp - r.start_logp)
    course = {}
    for (loss, seed), run in rows.groupby(["loss", "seed"]):
        kls = [0.0, *run.groupby("look").kl.mean()]
        gains = [0 * old, *((one.groupby("id").score.mean() - old) / unit for _, one in run.groupby("look"))]
        course.setdefault(loss, {})[seed] = kls, np.array(gains)
    course["start"] = {}
    found = {}
    for new, against in [*combinations([n for n in course if n != "start"], 2), *((n, "start") for n in course)]:
        if new == against:
            continue
        runs = [*course[new].values(), *course[against].values()]
        at = min(max_kl, *(max(kls) for kls, _ in runs))
        read = lambda kls, gains: np.array([np.interp(at**0.5, np.sqrt(kls), g) for g in gains.T])  # noqa: E731
        table = np.array([read(*course[new][s]) - (read(*course[against][s]) if against != "start" else 0)
                          for s in sorted(course[new])])
        found[new, against] = table, at
    return found


def bounds(table: np.ndarray) -> tuple[float, float]:
    """A two-way analysis of variance by sums of squares: seeds always count, prompts where they exceed the rest."""
    S, N = table.shape
    grand = table.mean()
    ms_seed = N * sum((row.mean() - grand) ** 2 for row in table) / (S - 1)
    ms_prompt = S * sum((column.mean() - grand) ** 2 for column in table.T) / (N - 1)
    ms_rest = sum((table[s, n] - table[s].mean() - table[:, n].mean() + grand) ** 2
                  for s in range(S) for n in range(N)) / ((S - 1) * (N - 1))
    parts = [(ms_seed, S - 1)]
    if ms_prompt > ms_rest:
        parts += [(ms_prompt, N - 1), (-ms_rest, (S - 1) * (N - 1))]
    total = sum(part for part, _ in parts)
    freedom = max(total**2 / sum(part**2 / df for part, df in parts), S - 1)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(total / (S * N))
    return grand - half, grand + half


LABELS = {"LIRE": "LIRE, T = 20", "DPO": "DPO", "SFT": "SFT"}


def test_the_first_line_is_what_the_rows_say(tmp_path):
    draw = np.random.default_rng(5)
    answer = simulated(tmp_path, {"LIRE": 0.9, "DPO": 0.3, "SFT": 0.05}, 5, draw, page=True)
    found = recomputed(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["answer"] == answer
    first = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"**{answer}**" and f"<h1>{answer}</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    number = r"([+-]\d+\.\d+) sd at (\d+\.\d) nats over ([^\[]+?) \[([+-]\d+\.\d+), ([+-]\d+\.\d+)\]"
    claims = re.findall(number, answer)
    assert {name for *_, name, _, _ in claims} == {"DPO", "SFT", "the start policy"} and answer.startswith("LIRE, T = 20")
    for value, kl, name, low, high in claims:
        other = next((k for k, v in LABELS.items() if v == name), "start")
        table, at = found.get(("LIRE", other)) or [(-t, d) for t, d in [found[other, "LIRE"]]][0]
        assert abs(table.mean() - float(value)) < 0.006 and abs(at - float(kl)) < 0.06
        assert np.allclose(bounds(table), (float(low), float(high)), atol=0.006)


def test_planted_winners_are_found_and_ties_are_not_won(tmp_path):
    """Ten simulated sets each. A winner by twice what matters is named; of equals nobody is said to be better."""
    won = wrong = 0
    for k in range(10):
        draw = np.random.default_rng(100 + k)
        answer = simulated(tmp_path / f"won-{k}", {"LIRE": 0.3, "DPO": 0.9, "SFT": 0.3}, 5, draw)
        won += answer.startswith("DPO: +") and "over LIRE" in answer and "over SFT" in answer
        answer = simulated(tmp_path / f"tie-{k}", {"LIRE": 0.6, "DPO": 0.6, "SFT": 0.6}, 5, draw, noise=0.05)
        wrong += any(f"nats over {name} [" in answer.partition("undecided:")[0] for name in LABELS.values())
    assert won >= 9 and wrong <= 1, (won, wrong)


def test_what_was_not_judged_is_left_out_and_said(tmp_path):
    """Of complete rows some scores are taken away: figures are those of the rest, and the report counts the others."""
    def with_gaps(rows, every):
        gaps = [{**r, "scores": {"judge": [None if (7 * i + k) % every == 0 else s
                                           for k, s in enumerate(r["scores"]["judge"])]}} for i, r in enumerate(rows)]
        return [*gaps[:-1], {**rows[-1], "scores": {"judge": [None] * len(rows[-1]["completions"])}}]

    draw, room = np.random.default_rng(3), Room(question(), tmp_path, lambda line: None)
    room.__dict__.update(parts={"train": [], "validation": [], "test": []}, look={"lines": ["seen"]})
    base = draw.normal(0, 2, PROMPTS)
    start = [{"id": f"p{i}", "prompt": f"q{i}", "completions": ["x"] * 16, "scores": {"judge": list(row)},
              "tokens": [1] * 16, "finish_reasons": ["eos"] * 16}
             for i, row in enumerate(base[:, None] + draw.normal(0, 1, (PROMPTS, 16)))]
    room.rows("start-test", lambda: with_gaps(start, 5))
    runs = {"LIRE": [[with_gaps(look(base, 1.0, 0.0, kl, draw), 4) for kl in (2.0, 5.0, 8.0)] for _ in range(5)]}
    chosen = {"LIRE": choose_under_cap([{"settings": search_points(read_method("lire"), 1)[0], "proxy": 0.0,
                                         "kl": 0.0}], 6.0)}
    judge = {"fails": "", "logits": False, "name": "planted", "accuracy": 1.0, "lists": 9, "spread": 1.0}
    found = read_found(room, judge, chosen, runs)
    page = write_report(room, found)
    scores = [s for rows in [room.rows("start-test", list), *(rows for one in runs["LIRE"] for rows in one)]
              for r in rows for s in r["scores"]["judge"]]
    assert f"no verdict on {scores.count(None)} of {len(scores)} answers" in page.with_suffix(".md").read_text()
    assert "with them 1 prompts" in page.with_suffix(".md").read_text()
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert rows.score.notna().all() and f"p{PROMPTS - 1}" not in set(rows.id)
    (gain,) = [v["value"] for v in found.verdicts if v["old"] is None]
    assert gain > 1 and all(len(gains) == PROMPTS - 1 for one in found.courses["LIRE"] for _, gains in one)


def test_no_signal_and_few_seeds_are_said(tmp_path):
    draw = np.random.default_rng(3)
    answer = simulated(tmp_path / "two", {"LIRE": 0.9, "DPO": 0.1, "SFT": 0.1}, 2, draw)
    assert answer.startswith("LIRE, T = 20 leads, undecided") and "2 seeds decide nothing, 5 do" in answer
    assert "[" not in answer, "no bounds below five seeds"
    answer = simulated(tmp_path / "none", dict.fromkeys(LABELS, 0.0), 8, draw, noise=0.02, margin=0.5)
    assert answer.startswith("No signal")


def test_killed_in_every_stage_it_ends_in_the_same_bytes(tmp_path):
    done = warm.run(HERE / "killed_compare.py", tmp_path, cwd=HERE, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0 and not found["different"], (found["different"], found["log"])
    assert {"results.json", "rows.parquet", "report.html"} <= set(found["files"])
    missed = [stage for stage, code in found["hits"].items() if code != -9]
    assert not missed, (missed, found["log"])


@pytest.mark.parametrize("given", [["lire"], {"lire": 1}, {"a:b"}, 3, None, b"lire"])
def test_what_is_no_loss_is_said(given):
    with pytest.raises(LireError, match="losses: no such loss; got .*name one of these, or module:function"):
        read_method(given)


def test_a_loss_that_is_compared_can_be_trained(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def gap(logps, rewards, mask=None):\n"
                    "    if mask is not None:\n        logps, rewards = logps.where(mask, -1e9), rewards.where(mask, 0.0)\n"
                    "    return -(logps.softmax(-1) * rewards).sum(-1)\n")
    settings = settings_of([f"loss_type={file}:gap", "learning_rate=1e-4"])
    config = LIREConfig(str(tmp_path / "out"), report_to="none", **settings)
    logps, rewards = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    assert float(get_loss(config.loss_type).fn(logps, rewards)) == pytest.approx(-1 / (1 + math.exp(-1)))
    with pytest.raises(LireError, match="loss_type: no such function in it"):
        settings_of([f"loss_type={file}:gab"])


def test_no_answer_says_what_would_give_one(tmp_path):
    """The report of a judge that may be a coin: as it was given, how many lists are missing, and prompts as text."""
    asked = question(judge_name="checks.py:count_e")
    room = Room(asked, tmp_path, lambda line: None)
    lists = [make_record([{"role": "user", "content": f"say {k}"}], ["e", "x"], [1, 0]) for k in range(60)]
    room.__dict__.update(parts={"train": lists[24:], "validation": lists[:9], "test": lists[9:24]},
                         look={"lines": ["seen"], "tokens": {"usual": 16}}, limits={"max_completion_length": 128})
    object.__setattr__(asked, "lists", lists)
    scores = np.random.default_rng(0).normal(0, 3, (4, 16))
    room.rows("start-test", lambda: [
        {"id": f"p{i}", "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"q{i}"}],
         "completions": ["x"] * 16, "scores": {"judge": list(row)}, "tokens": [1] * 16, "finish_reasons": ["eos"] * 16}
        for i, row in enumerate(scores)])
    room.rows("judge", lambda: [{"accuracy": 0.66, "lists": 24, "logits": False, "name": "count_e", "spread": 3.0}])
    found = read_found(room, judge_check(room), {}, {})
    write_report(room, found)
    # by hand: 0.16 above one half is 1.96 standard errors of a coin at n = (0.98 / 0.16)² = 37.5 lists
    assert "checks.py:count_e (a function) decides nothing" in (line := first_line(found))
    assert "it takes 38 held-out lists, about 95 in all (60 now)" in line
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "system: be brief user: q0" in page and "'role'" not in page and "count&#95;e, a function" in page
    stored = json.loads((tmp_path / "judge.jsonl").read_text(encoding="utf-8"))
    assert stored["name"] == "count_e" and set(stored) == {"accuracy", "lists", "logits", "name", "spread"}


@pytest.mark.parametrize("ahead, gained, verdict", [
    (0.0, 0.1, "undecided"), (0.1, 0.1, "contradicted"), (0.0, 1.0, "tie"), (0.1, 1.0, "tie"), (0.5, 0.1, "contradicted")])
def test_losses_that_gained_nothing_yet_do_not_tie(ahead, gained, verdict):
    """Eight seeds, two losses, read at 2 of 8 nats: alike there is no answer, unless one had gained what matters."""
    draw = np.random.default_rng(0)
    rows = lambda mean: [[(kl, mean * kl / 2 + np.repeat(draw.normal(0, 0.02, 1), 30))  # noqa: E731
                          for kl in (0.7, 1.3, 2.0)] for _ in range(8)]
    found = {(v["new"], v["old"]): v for v in verdicts_of({"LIRE": rows(gained), "DPO": rows(gained + ahead)}, 8.0)}
    assert found["LIRE", "DPO"]["verdict"] == verdict
    assert found["LIRE", None]["verdict"] in ("tie", "supported")  # against the start a tie is what it says
