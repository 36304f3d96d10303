"""Verdicts of chat models and of people: nothing asked twice, nothing counted as a win that is none, every damage to a
sheet named. (About 10 s, and 45 s for the real server, on two free cores.)"""
import csv
import io
import itertools
import json
import logging
import math
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from serving import Serve, need_server

from lire_nb.base.errors import LireError
from lire_nb.base.files import slug
from lire_nb.cli import main
from lire_nb.judges.chat import ChatJudge
from lire_nb.judges.sheets import SheetWidget, check_sheets, make_sheets, read_sheets
from lire_nb.judges.verdicts import (
    FunctionJudge,
    agreement,
    judge_pairs,
    make_pairs,
    parse_verdict,
    verdict_frame,
    verdict_leaderboard,
    verdicts_to_preferences,
)
from lire_nb.lab.compare import WinsAgainst
from lire_nb.models import compute_dtype, resolve_model
from lire_nb.preferences import judge_agreement, win_rate
from lire_nb.records import make_record
from lire_nb.rewards import graded_scores, score_lists

ROOT = Path(__file__).resolve().parents[1]


def rows(answers, n=12):
    "Rows of a system; `answers(i)` gives the completions of prompt i."
    return [{"id": f"p{i}", "prompt": f"Question {i}?", "completions": list(answers(i))} for i in range(n)]


def two_systems(n=12, samples=1):
    return {"start": rows(lambda i: [f"old {i}.{k}" for k in range(samples)], n),
            "LIRE": rows(lambda i: [f"a new answer {i}.{k}" for k in range(samples)], n)}


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and "remedy" in text, text
    for word in words:
        assert word in text, (word, text)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("reply, verdict", [
    ("A", "first"), ("B\n\n", "second"), ("Reason.\n\n  **A**  ", "first"), ("Verdict: B.", "second"),
    ("**Verdict:** [[tie]]", "tie"), ("`TIE`", "tie"), ("(A)", "first"),
    ("A is better", None), ("Answer A", None), ("A/B", None), ("A, B", None), ("A\nbecause it is kind", None),
    ("a", None), ("draw", None), ("C", None), ("AB", None), ("", None), ("  \n ", None),
    ("Verdict:", None), ("not A", None), ("A or tie", None),
])
def test_only_a_last_line_that_is_a_verdict_is_one(reply, verdict):
    assert parse_verdict(reply) == verdict


def by_hand(verdicts):
    """The rule of the notebook in plain loops: (preference a prompt, flips a prompt, first shares a prompt, failed
    pairs)."""
    preference, flips, first, failed = {}, {}, {}, 0
    for id in dict.fromkeys(v["id"] for v in verdicts):
        values, changed, shares = [], [], []
        for sample in dict.fromkeys(v["sample"] for v in verdicts if v["id"] == id):
            ab, ba = (next(v for v in verdicts if (v["id"], v["sample"], v["order"]) == (id, sample, order))
                      for order in ("ab", "ba"))
            if ab["verdict"] is None or ba["verdict"] is None:
                failed += 1
                continue
            a = {"first": 1.0, "second": 0.0, "tie": 0.5}[ab["verdict"]]
            b = {"first": 0.0, "second": 1.0, "tie": 0.5}[ba["verdict"]]
            values.append(a if a == b else 0.5)
            changed.append(float(a != b))
            shares.append((a + 1 - b) / 2)
        if values:
            preference[id], flips[id], first[id] = (sum(x) / len(x) for x in (values, changed, shares))
    return preference, flips, first, failed


@pytest.mark.parametrize("seed", range(6))
def test_preferences_agree_with_plain_loops(seed):
    rng = random.Random(seed)
    verdicts = judge_pairs(FunctionJudge(lambda *_: rng.choice(["A", "A", "B", "tie", "who knows"]), "dice"),
                           two_systems(15, 3), samples=3)
    assert len(verdicts) == 15 * 3 * 2
    preference, flips, first, failed = by_hand(verdicts)
    found = verdicts_to_preferences(verdicts)
    assert (found.system, found.against) == ("LIRE", "start")
    for name, expected in (("preferences", preference), ("flips", flips), ("first", first)):
        np.testing.assert_allclose(getattr(found, name), list(expected.values()), atol=1e-12)
    assert (found.ids == list(preference) and found.counts["failed"] == failed > 0
            and found.counts["prompts_left_out"] == 15 - len(preference))
    assert found.counts["flipped"] + found.counts["failed"] <= found.counts["pairs"] == 45
    assert sum(found.counts["failures"].values()) == sum(v["verdict"] is None for v in verdicts)
    mirrored = verdicts_to_preferences(verdicts, system="start")
    np.testing.assert_allclose(mirrored.preferences, 1 - np.array(found.preferences), atol=1e-12)
    summary = found.summary(resamples=99)
    assert (
        summary["win_rate"] == win_rate(found.preferences, resamples=99)["win_rate"]
        and summary["flip_rate"].low <= np.mean(list(flips.values())) <= summary["flip_rate"].high
    )


def test_a_judge_of_places_says_nothing_about_systems():
    found = verdicts_to_preferences(judge_pairs(lambda *_: "A", two_systems()))
    assert set(found.preferences) == {0.5} and set(found.flips) == {1.0} == set(found.first)


def test_failures_are_never_wins():
    verdicts = judge_pairs(FunctionJudge(lambda p, a,
                                         b: "mmh" if "new" in a and p.endswith("1?") else "A" if "new" in a else "B",
                                         "x"), two_systems())
    dropped, tied = verdicts_to_preferences(verdicts), verdicts_to_preferences(verdicts, failures="tie")
    assert (dropped.preferences == [1.0] * 10 and dropped.counts["failures"] == {"no verdict in the last line": 2}
            and "p1" not in dropped.ids)
    assert sorted(tied.preferences) == [0.5] * 2 + [1.0] * 10


def test_unequal_numbers_of_answers_are_refused():
    systems = two_systems(5, 3)
    systems["start"] = [{**r, "completions": r["completions"][:1]} for r in systems["start"]]
    assert len(make_pairs(systems)) == 5
    with pytest.raises(LireError) as e:
        make_pairs(systems, 3)
    one_line(e, "too few answers", "rows of 'start'")


def test_lengths_are_those_of_the_judged_pairs():
    """The second answer of each prompt is long and gets no verdict, and one prompt gets none at all."""
    rows = lambda word: [{"id": f"p{i}", "prompt": f"Question {i}?",  # noqa: E731
                          "completions": [f"{word} {i:02}", word * 90]} for i in range(25)]
    systems = {"start": rows("old"), "LIRE": rows("newer")}
    verdicts = judge_pairs(lambda p, a, b: "mmh" if len(a) > 50 or p.endswith("n 7?") else "A" if "new" in a else "B",
                           systems, samples=2)
    (line,) = verdict_leaderboard({"x": verdicts}, systems, 2)
    assert line["mean_length"] == len("newer 00") and (line["prompts"], line["not_judged"]) == (25, 1)
    assert line["win_rate"] == 1.0 and line["length_controlled_win_rate"] > 0.8


@pytest.mark.parametrize("fail", [0.0, 0.3, 0.6])
def test_a_score_of_wins_counts_verdicts_alone(fail, caplog):
    """A judge that always prefers the answer gives 1 wherever it speaks in both orders, as in `judge_pairs`."""
    rng, prompts = random.Random(0), [f"q{i}" for i in range(200)]
    judge = FunctionJudge(lambda p, a, b: "cannot say" if rng.random() < fail else "A" if a == "good" else "B", "x")
    wins = WinsAgainst(judge, dict.fromkeys(prompts, "bad"))
    lists = score_lists([make_record(p, ["good"], id=p) for p in prompts], wins)
    scores = [r["rewards"][0] for r in lists]
    rng.seed(0)
    rows = {name: [{"id": p, "prompt": p, "completions": [name]} for p in prompts] for name in ("bad", "good")}
    found = verdicts_to_preferences(judge_pairs(judge, rows))
    assert scores.count(None) == found.counts["failed"] and {s for s in scores if s is not None} == {1.0}
    assert (fail == 0) == (scores.count(None) == 0) and ("are no verdict" in caplog.text) == bool(fail)
    graded = graded_scores([make_record(p, ["good", "bad"], [1, 0], id=p) for p in prompts[:20]], wins)
    assert all(None not in row["scores"] and len(row["scores"]) == len(row["grades"]) for row in graded)


def test_a_judge_without_any_verdict_gives_no_score():
    with pytest.raises(LireError) as e:
        WinsAgainst(FunctionJudge(lambda *_: "cannot say", "x"), {"q": "bad"})(["q"], ["good"])
    one_line(e, "none of 2 replies is a verdict")


def test_several_systems_and_identical_answers():
    systems = two_systems() | {"copy": two_systems()["LIRE"]}
    shown = []
    verdicts = judge_pairs(FunctionJudge(lambda p, a, b: shown.append((a, b)) or ("A" if "new" in a else "B"), "x"),
                           systems)
    assert len(verdicts) == 3 * 12 * 2 and len(shown) == 2 * 12 * 2, "identical answers are not shown"
    same = verdicts_to_preferences(verdicts, "copy", "LIRE")
    assert set(same.preferences) == {0.5} and same.counts["identical"] == 12 and same.flips == [] == same.first
    assert verdicts_to_preferences(verdicts, "start", "copy").preferences == [0.0] * 12
    with pytest.raises(LireError) as e:
        verdicts_to_preferences(verdicts)
    one_line(e, "not exactly one pair of systems", "LIRE / start")
    with pytest.raises(LireError):
        verdicts_to_preferences(verdicts, "LIRE", "nobody")


def test_rows_come_from_files_too(tmp_path):
    systems = two_systems()
    for name in systems:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in systems[name]))
    files = {name: tmp_path / f"{name}.jsonl" for name in systems}
    assert make_pairs(files) == make_pairs(systems)
    with open(files["LIRE"], "a") as f:
        f.write('{"id": "p12", "prom')
    with pytest.raises(LireError) as e:
        make_pairs(files)
    assert e.value.line == 13 and str(files["LIRE"]) in str(e.value)
    systems["LIRE"][3]["prompt"] = "Something else?"
    with pytest.raises(LireError) as e:
        make_pairs(systems)
    one_line(e, "p3", "same prompts")


# ---------------------------------------------------------------- a scripted endpoint


def completion(text, reason="stop"):
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}],
              "usage": {"prompt_tokens": 10, "completion_tokens": 2}}
    return 200, json.dumps(answer), {}


class Endpoint:
    """A chat endpoint whose behaviour is a function: (how often this text was asked, text) -> (status, body, headers),
    or None to cut the connection."""

    def __init__(self, behave):
        self.asked, self.served, self.keys, self.bodies = Counter(), Counter(), set(), []
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(404)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with outer.lock:
                    outer.asked[text] += 1
                    times = outer.asked[text]
                    outer.keys.add(self.headers["Authorization"])
                    outer.bodies.append(body)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    answer = behave(times, text)
                    if answer is not None:
                        status, content, headers = answer
                        self.send_response(status)
                        for name, value in {"Content-Type": "application/json", **headers}.items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(content.encode())
                        outer.served[text] += status == 200
                finally:
                    with outer.lock:
                        outer.now -= 1

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def prefers_new(times, text):
    return completion("A" if "a new" in text.split("Answer B")[0] else "B")


def chat(endpoint, cache=None, **options):
    pytest.importorskip("openai", reason="openai is not installed: pip install 'lire_nb[server]'")
    return ChatJudge(getattr(endpoint, "url", endpoint), "judge-1", cache=cache,
                     **{"progress": False, "patience": 5.0, **options})


def test_many_in_flight_but_bounded_and_counted(tmp_path):
    def slow(times, text):
        time.sleep(0.05)
        return prefers_new(times, text)

    with Endpoint(slow) as endpoint:
        judge = chat(endpoint, max_in_flight=5)
        verdicts = judge_pairs(judge, two_systems(30))
    assert 2 <= endpoint.most <= 5
    cost = judge.cost
    assert (cost.requests, cost.failures, cost.retries, cost.prompt_tokens,
            cost.completion_tokens) == (60, 0, 0, 600, 120) and cost.seconds >= 60 * 0.05 / 5
    assert verdicts_to_preferences(verdicts).preferences == [1.0] * 30 and {v["judge"] for v in verdicts} == {"judge-1"}


def test_trouble_that_passes_is_waited_out():
    def stumbling(times, text):
        trouble = [lambda: (429, '{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
                   lambda: (503, "busy", {}), lambda: None, lambda: (500, "oops", {})]
        number = int(text.split("Question ")[1].split("?")[0])
        return trouble[number % 4]() if times == 1 else prefers_new(times, text)

    with Endpoint(stumbling) as endpoint:
        judge = chat(endpoint, patience=30.0)
        verdicts = judge_pairs(judge, two_systems(8))
    assert judge.cost.retries == 16 == judge.cost.requests and set(endpoint.served.values()) == {1}
    assert verdicts_to_preferences(verdicts).preferences == [1.0] * 8


def test_an_endpoint_that_stays_broken_ends_with_one_line_and_what_came_is_kept(tmp_path):
    def half(times, text):
        return prefers_new(times,
                           text) if int(text.split("Question ")[1].split("?")[0]) < 4 else (500, "out of memory", {})

    cache = tmp_path / "sub" / "replies.jsonl"
    with Endpoint(half) as endpoint:
        with pytest.raises(LireError) as e:
            judge_pairs(chat(endpoint, cache, max_retries=1, max_in_flight=2), two_systems(8))
        one_line(e, "500", "out of memory")
    kept = len(cache.read_text().splitlines())
    assert kept == 8
    with Endpoint(prefers_new) as endpoint:
        judge = chat(endpoint, cache)
        judge_pairs(judge, two_systems(8))
    assert judge.cost.requests == sum(endpoint.asked.values()) == 8 and judge.cost.from_cache == 8


@pytest.mark.parametrize("status, words",
                         [(401, "bad key"), (403, "bad key"), (404, "no such model"), (400, "pinned to another model")])
def test_a_wrong_key_or_model_stops_at_once(status, words):
    with Endpoint(lambda *_: (status, json.dumps({"error": {"message": words}}), {})) as endpoint:
        with pytest.raises(LireError) as e:
            judge_pairs(chat(endpoint, max_in_flight=2), two_systems(50))
        one_line(e, str(status), words)
        assert sum(endpoint.asked.values()) < 50, "not all of the 100 questions, each with its probe"


def test_one_pair_that_is_turned_down_is_a_counted_failure(tmp_path):
    def picky(times, text):
        return (400, '{"error": {"message": "context length exceeded"}}',
                {}) if "Question 0?" in text else prefers_new(times, text)

    with Endpoint(picky) as endpoint:
        judge = chat(endpoint, tmp_path / "c.jsonl", max_in_flight=1)  # the refused one comes first
        verdicts = judge_pairs(judge, two_systems(6))
        again = chat(endpoint, tmp_path / "c.jsonl")
        assert judge_pairs(again, two_systems(6)) == verdicts and again.cost.requests == again.cost.refused == 0
    assert judge.cost.refused == judge.cost.failures == 2 and judge.cost.requests == 10
    found = verdicts_to_preferences(verdicts)
    assert len(found.preferences) == 5 and any("context length exceeded" in reason
                                               for reason in found.counts["failures"])


@pytest.mark.parametrize("body",
                         ["<html>Welcome</html>", "{", "{}", '{"choices": []}', '{"choices": [{"text": "A"}]}',
                          '{"choices": [{"message": {"content": 5}}]}', '"A"', "[]"])
def test_nonsense_is_named(body):
    with Endpoint(lambda *_: (200, body, {})) as endpoint:
        with pytest.raises(LireError) as e:
            judge_pairs(chat(endpoint), two_systems(3))
        one_line(e, "chat completion", endpoint.url)


def test_a_refused_port_is_said_without_waiting():
    began = time.monotonic()
    with pytest.raises(LireError) as e:
        judge_pairs(chat("http://127.0.0.1:9/v1", patience=300), two_systems(3))
    one_line(e, "http://127.0.0.1:9/v1", "start it")
    assert time.monotonic() - began < 10


def test_replies_without_a_verdict_are_failures_with_their_reason():
    def vague(times, text):
        number = int(text.split("Question ")[1].split("?")[0])
        return {0: completion("I like both"), 1: completion("Because", "length"),
                2: completion(None)}.get(number, prefers_new(times, text))

    with Endpoint(vague) as endpoint:
        judge = chat(endpoint)
        found = verdicts_to_preferences(judge_pairs(judge, two_systems(6)))
    assert found.counts["failures"] == {"no verdict in the last line": 2, "cut off at max_tokens": 2,
                                        "an empty reply": 2} and judge.cost.failures == 6
    assert found.preferences == [1.0] * 3 and found.counts["prompts_left_out"] == 3
    with Endpoint(lambda *_: completion("I like both")) as endpoint:
        with pytest.raises(LireError) as e:
            judge_pairs(chat(endpoint), two_systems(3))
        one_line(e, "none of 6 replies", "I like both")


def test_the_cache_knows_what_a_reply_depends_on_and_keeps_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    cache = tmp_path / "c.jsonl"
    with Endpoint(prefers_new) as endpoint:
        systems = two_systems(3)
        for r in systems.values():
            r.append({**r[0], "id": "again"})  # the same texts under another id: the same question
        judge = chat(endpoint, cache)
        verdicts = judge_pairs(judge, systems)
        assert (set(endpoint.asked.values()) == {1} and judge.cost.requests == 6 and judge.cost.from_cache == 2
                and len(verdicts) == 8)
        assert endpoint.keys == {"Bearer sk-from-the-environment"}
        chat(endpoint, cache, api_key="sk-given").ask([[{"role": "user", "content": "Hello"}]])
        assert "Bearer sk-given" in endpoint.keys
        assert not any("sk-" in text for text in (cache.read_text(), repr(judge), json.dumps(verdicts)))
        for options in ({"temperature": 0.5}, {"max_tokens": 7}, {"criterion": "Shorter is better."},
                        {"extra_body": {"seed": 1}}):
            other = chat(endpoint, cache, **options)
            judge_pairs(other, two_systems(3))
            assert other.cost.requests == 6, options
        chat(endpoint,
             extra_body={"max_tokens": None, "max_completion_tokens": 9}).ask([[{"role": "user", "content": "Hello"}]])
        assert ("max_tokens" not in endpoint.bodies[-1] and endpoint.bodies[-1]["max_completion_tokens"] == 9
                and endpoint.bodies[0]["temperature"] == 0)
    with Endpoint(prefers_new) as elsewhere:
        moved = chat(elsewhere, cache)
        assert judge_pairs(moved, two_systems(3))[:6] == verdicts[:6] and not elsewhere.asked, (
            "the address is no part of the question"
        )


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_line_is_asked_again_and_a_foreign_file_is_left_alone(tmp_path, cut):
    cache = tmp_path / "c.jsonl"
    with Endpoint(prefers_new) as endpoint:
        verdicts = judge_pairs(chat(endpoint, cache), two_systems(4))
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-cut])
        endpoint.asked.clear()
        assert judge_pairs(chat(endpoint, cache), two_systems(4)) == verdicts and sum(endpoint.asked.values()) == 1
        assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())
        foreign = tmp_path / "rows.jsonl"
        foreign.write_text('{"id": 1}\n')
        with pytest.raises(LireError) as e:
            judge_pairs(chat(endpoint, foreign), two_systems(4))
        one_line(e, str(foreign))
        assert foreign.read_text() == '{"id": 1}\n'


@pytest.mark.parametrize("options",
                         [{"template": [{"role": "user", "content": "{prompt}"}]},
                          {"template": "{prompt}{first}{second}"}, {"max_tokens": 0}, {"temperature": -1}])
def test_bad_settings(options):
    with pytest.raises(LireError) as e:
        chat("http://127.0.0.1:9/v1", **options)
    one_line(e)


# ---------------------------------------------------------------- people


def sheet_rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def save(path, found, delimiter=",", encoding="utf-8-sig"):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(found)
    path.write_bytes(text.getvalue().encode(encoding))


def fill(path, verdict, change=lambda rows: rows):
    found = sheet_rows(path)
    for row in found:
        row["verdict"] = verdict(row)
    save(path, change(found))


def honest(row):
    return "first" if "a new" in row["first"] else "second"


@pytest.fixture
def sheets(tmp_path):
    return make_sheets(two_systems(20), tmp_path / "people", judges=["Ada L.", "Ben", "Cleo", "Dan"], overlap=3, seed=5)


def test_sheets_are_blind_balanced_and_repeatable(tmp_path):
    named = {"zebra-start": two_systems(21, 2)["start"], "zebra-lire": two_systems(21, 2)["LIRE"]}
    judges = ["Ada", "Ben", "Cleo", "Dan"]
    sheets = make_sheets(named, tmp_path / "a", judges=judges, overlap=3, samples=2, seed=1)
    assert [s.stem for s in sheets] == [slug(j) for j in judges]
    assert not any(b"zebra" in s.read_bytes() or b"zebra" in s.name.encode() or b'"ab"' in s.read_bytes()
                   for s in sheets)
    key = json.loads((tmp_path / "a" / "key.json").read_text())
    entries = list(key["items"].values())
    assert set(Counter((e["id"], e["sample"]) for e in entries).values()) == {3} and len(entries) == 21 * 2 * 3
    assert len({(e["judge"], e["id"], e["sample"]) for e in entries}) == len(entries), "nobody gets a pair twice"
    for judge, sheet in zip(judges, sheets):
        own = [e for e in entries if e["judge"] == judge]
        assert abs(2 * sum(e["order"] == "ab" for e in own) - len(own)) <= 1 and abs(len(own) - len(entries) / 4) <= 1
        sides = [key["items"][r["item"]]["order"] for r in sheet_rows(sheet)]
        assert 5 < sum(a != b for a, b in zip(sides, sides[1:])) < len(sides) - 5, "neither in blocks nor in turns"
        assert [r["prompt"] for r in sheet_rows(sheet)] != sorted(r["prompt"] for r in sheet_rows(sheet))
    met = {frozenset(pair) for i in range(21)
           for pair in itertools.combinations({e["judge"] for e in entries if e["id"] == f"p{i}"}, 2)}
    assert len(met) == 6, "every two judges share pairs"
    make_sheets(named, tmp_path / "d", judges=judges, overlap=2, seed=1)
    few = list(json.loads((tmp_path / "d" / "key.json").read_text())["items"].values())
    assert len({frozenset(e["judge"] for e in few if e["id"] == f"p{i}")
                for i in range(21)}) == 6, "with two persons a pair, too"
    same = make_sheets(named, tmp_path / "b", judges=judges, overlap=3, samples=2, seed=1,
                       key=tmp_path / "safe" / "key.json")
    assert [s.read_bytes() for s in same] == [s.read_bytes()
                                              for s in sheets] and not (tmp_path / "b" / "key.json").exists()
    other = make_sheets(named, tmp_path / "c", judges=judges, overlap=3, samples=2, seed=2)
    assert [s.read_bytes() for s in other] != [s.read_bytes() for s in sheets]


def test_what_honest_people_say_comes_back(sheets, tmp_path):
    for sheet in sheets:
        fill(sheet, honest)
    verdicts = read_sheets(tmp_path / "people")
    found = verdicts_to_preferences(verdicts)
    assert len(verdicts) == 60 and found.preferences == [1.0] * 20 and found.system == "LIRE" and found.flips == []
    assert found.summary(resamples=99)["flip_rate"] is None and {v["judge"]
                                                                 for v in verdicts} == {"Ada L.", "Ben", "Cleo", "Dan"}
    assert read_sheets(sheets, key=tmp_path / "people" / "key.json") == verdicts
    some = read_sheets(sheets[:1], key=tmp_path / "people" / "key.json")
    assert sum(v["verdict"] is not None for v in some) == 15 and verdicts_to_preferences(some).counts["failed"] == 45
    with pytest.raises(LireError) as e:
        read_sheets(sheets)
    one_line(e, "no key")


def test_what_spreadsheets_do_is_forgiven(tmp_path, caplog):
    systems = {"start": rows(lambda i: ["=1+1\nand more"], 6), "LIRE": rows(lambda i: ["- a point, “quoted”", ], 6)}
    sheets = make_sheets(systems, tmp_path, judges=["Ada"], overlap=1)
    assert all(r[c][0] not in "=-" for r in sheet_rows(sheets[0]) for c in ("first", "second")), "no text is a formula"

    def mangle(found):
        for row in found:
            row.update({c: row[c].lstrip("'").replace("\n", "\r\n") + " " for c in ("first", "second")},
                       verdict=row["verdict"].upper())
        return [{"note of the judge": "x", **r} for r in reversed(found)]

    fill(sheets[0],
         lambda r: "" if r["prompt"].startswith("Question 0") else "first" if "point" in r["first"] else "second",
         mangle)
    with caplog.at_level(logging.WARNING):
        found = verdicts_to_preferences(read_sheets(tmp_path))
    assert found.preferences == [1.0] * 5 and found.counts["failures"] == {"not judged": 1} and "1 of 6" in caplog.text


BAD_ROWS = {
    "an item that the key does not know": lambda r: r[0].update(item="ffffffffff"),
    "a side is missing": lambda r: r[2].update(first="\n"),
    "not those of this item": lambda r: [a.update(second=b) for a, b in zip(r, sorted(x["second"] for x in r))],
    "more than one verdict by 'Ben'": lambda r: r.append({**r[0], "verdict": "tie"}),
    "a sheet of another run": lambda r: r[1].update(run="0" * 12),
}


@pytest.mark.parametrize("problem", BAD_ROWS)
def test_damaged_rows_are_named(sheets, tmp_path, problem):
    def change(found):
        BAD_ROWS[problem](found)
        return found

    fill(sheets[1], honest, change)
    with pytest.raises(LireError) as e:
        read_sheets(tmp_path / "people")
    one_line(e, problem, str(sheets[1]))
    assert e.value.line >= 2 and e.value.has_value
    verdicts, problems = check_sheets(tmp_path / "people")
    assert problems and all(p.line and p.file == str(sheets[1]) for p in problems) and len(verdicts) == 60
    known = {v["raw"] for v in verdicts if v["verdict"]}
    assert not known & {p.value for p in problems if "not those" in p.reason}


@pytest.mark.parametrize("word", ["draw", "0.5", "1.5", "=", "A", "left", "both", "1", "first or second", "TIE?"])
def test_foreign_notation_is_never_guessed(sheets, tmp_path, word):
    fill(sheets[0], lambda row: word)
    with pytest.raises(LireError) as e:
        read_sheets(tmp_path / "people")
    one_line(e, "not a verdict", "14 more problems", word)
    for notation in (word, word.lower()):  # capitals do not count
        translated = read_sheets(tmp_path / "people", mapping={notation: "tie"})
        assert {v["preference"] for v in translated if v["judge"] == "Ada L."} == {0.5}
    with pytest.raises(LireError) as e:
        read_sheets(tmp_path / "people", mapping={word: "won"})
    one_line(e, "mapping")


@pytest.mark.parametrize("damage, words", [
    (lambda p: save(p, sheet_rows(p), delimiter=";"), "no column"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b"old 1.0", b"\xe4lt")), "not UTF-8"),
    (lambda p: save(p, [{k: v for k, v in r.items() if k != "second"} for r in sheet_rows(p)]), "no column second"),
    (lambda p: p.unlink() or p.mkdir(), "cannot be read"),
    (lambda p: p.write_bytes(b""), "no column"),
    (lambda p: p.write_bytes(p.read_bytes() + b"a,b,c,d,e,f,g,h\r\n"), "more cells than columns"),
])
def test_damaged_files_are_named(sheets, tmp_path, damage, words):
    damage(sheets[2])
    with pytest.raises(LireError) as e:
        read_sheets(tmp_path / "people")
    one_line(e, words, str(sheets[2]))


def test_keys_and_runs_do_not_mix(sheets, tmp_path):
    before = [s.read_bytes() for s in sheets]
    with pytest.raises(LireError) as e:
        make_sheets(two_systems(20), tmp_path / "people", judges=["Ada L.", "Ben", "Cleo", "Dan"], overlap=3, seed=6)
    one_line(e, "another run")
    fill(sheets[0], honest)
    assert make_sheets(two_systems(20), tmp_path / "people", judges=["Ada L.", "Ben", "Cleo", "Dan"], overlap=3,
                       seed=5) == sheets
    assert sheet_rows(sheets[0])[0]["verdict"] and [s.read_bytes()
                                                    for s in sheets[1:]] == before[1:], "verdicts are not overwritten"
    other = make_sheets(two_systems(20), tmp_path / "other", judges=["Ada L.", "Ben", "Cleo", "Dan"], overlap=3, seed=6)
    with pytest.raises(LireError) as e:
        read_sheets(sheets, key=tmp_path / "other" / "key.json")
    one_line(e, "another run")
    key = tmp_path / "other" / "key.json"
    text = key.read_text()
    key.write_text(text.replace('"order": "ab"', '"order": "ba"', 1))
    with pytest.raises(LireError) as e:
        read_sheets(other, key=key)
    one_line(e, "changed after it was written")
    for damaged in (text[:-9], "[]", "{}"):
        key.write_text(damaged)
        with pytest.raises(LireError) as e:
            read_sheets(other, key=key)
        one_line(e, "key")
    for judges, overlap in ((["Ada", "ada"], 1), (["Ada"], 2), (["Ada", "?"], 1), ([], 0)):
        with pytest.raises(LireError) as e:
            make_sheets(two_systems(), tmp_path / "new", judges=judges, overlap=overlap)
        one_line(e, "judges")


def test_the_widget_writes_at_once_and_goes_on(tmp_path):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed: pip install 'lire_nb[evaluation]'")
    systems = {"start": rows(lambda i: ["<script>alert(1)</script> & old"], 4), "LIRE": rows(lambda i: ["new"], 4)}
    sheet = make_sheets(systems, tmp_path, judges=["Ada"], overlap=1)[0]
    widget = SheetWidget(sheet)
    said = lambda: [r["verdict"] for r in sheet_rows(sheet)]  # noqa: E731
    assert ("<script>" not in widget.first.value + widget.second.value
            and "&lt;script&gt;" in widget.first.value + widget.second.value)
    assert widget.buttons["back"].disabled and not widget.buttons["tie"].disabled
    for name, expected in (("first", ["first", "", "", ""]), ("skip", ["first", "", "", ""]),
                           ("second", ["first", "", "second", ""]), ("tie", ["first", "", "second", "tie"])):
        widget.buttons[name].click()
        assert said() == expected
    assert "last one" in widget.progress.value and widget.buttons["first"].disabled
    widget = SheetWidget(sheet)  # another day
    assert widget.position == 1 and widget.progress.value.startswith("3 of 4")
    widget.press("tie")
    assert said() == ["first", "tie", "second", "tie"] and widget.position == 4
    widget.press("first")  # nothing is open any more
    assert said() == ["first", "tie", "second", "tie"]
    widget.press("back")
    assert "verdict so far: tie" in widget.progress.value
    widget.press("first")
    assert said()[3] == "first" and "application/vnd.jupyter.widget-view+json" in widget._repr_mimebundle_()
    assert not any(p.suffix == ".tmp" for p in tmp_path.rglob("*")) and len(read_sheets(tmp_path)) == 4


# ---------------------------------------------------------------- agreement


def alpha_by_hand(units, distance):
    """Krippendorff (2011) in plain loops: observed and expected disagreement over the pairs of values within and across
    units."""
    units = [u for u in units if len(u) >= 2]
    n = sum(map(len, units))
    observed = sum(distance(a, b) / (len(u) - 1) for u in units for i, a in enumerate(u)
                   for j, b in enumerate(u) if i != j) / n
    everything = [v for u in units for v in u]
    expected = sum(distance(a, b) for i, a in enumerate(everything)
                   for j, b in enumerate(everything) if i != j) / (n * (n - 1))
    return 1 - observed / expected


X = math.nan
FOUR = [[1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
        [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X]]
THREE = [[X, X, X, X, X, 3, 4, 1, 2, 1, 1, 3, 3, X, 3], [1, X, 2, 1, 3, 3, 4, 3, X, X, X, X, X, X, X],
         [X, X, 2, 1, 3, 4, 4, X, 2, 1, 1, 3, 3, X, 4]]


@pytest.mark.parametrize("data, level, value",
                         [(FOUR, "nominal", 0.743), (FOUR, "ordinal", 0.815), (FOUR, "interval", 0.849),
                          (THREE, "nominal", 0.691), (THREE, "interval", 0.811)])
def test_alpha_is_that_of_the_literature(data, level, value):
    """FOUR: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C; THREE: the example of the
    package krippendorff, and of the encyclopedia's article on alpha."""
    pytest.importorskip("krippendorff", reason="krippendorff is not installed: pip install 'lire_nb[evaluation]'")
    found = judge_agreement({str(i): row for i, row in enumerate(data)}, level=level, resamples=199)
    # fewer than 20 units: no interval covers
    assert round(found.value, 3) == value and math.isnan(found.low) and math.isnan(found.high)
    if level != "ordinal":
        by_loops = alpha_by_hand([[v for v in unit if v == v] for unit in zip(*data)],
                                 (lambda a, b: float(a != b)) if level == "nominal" else lambda a, b: (a - b) ** 2)
        assert math.isclose(found.value, by_loops, rel_tol=1e-9)


def test_agreement_of_chat_models_and_people(sheets, tmp_path):
    pytest.importorskip("krippendorff", reason="krippendorff is not installed: pip install 'lire_nb[evaluation]'")
    rng = random.Random(3)
    for sheet in sheets[:3]:
        fill(sheet, lambda row: rng.choice(["first", "second", "tie", honest(row), honest(row), ""]))
    by_people = read_sheets(tmp_path / "people")
    models = [judge_pairs(FunctionJudge(f, name), two_systems(20)) for name, f in
              (("fair", lambda p, a, b: "A" if "new" in a else "B"),
               ("odd", lambda p, a, b: "A" if len(p) % 2 else "B" if "new" in b else "tie"))]
    both = agreement(by_people, *models, level="nominal", resamples=99)
    table = verdict_frame([*by_people, *models[0], *models[1]])
    assert set(table) == {"Ada L.", "Ben", "Cleo", "fair", "odd"}, "Dan gave no verdict"
    for v in by_people:
        if v["verdict"]:
            assert table.loc[v["id"], v["judge"]] == v["preference"]
    units = [[x for x in row if x == x] for row in table.to_numpy().tolist()]
    assert math.isclose(both.alpha.value, alpha_by_hand(units, lambda a, b: float(a != b)), rel_tol=1e-9)
    for one, two in itertools.permutations(table, 2):
        shared = table[[one, two]].dropna()
        assert both.shared.loc[one, two] == len(shared)
        assert math.isclose(both.share.loc[one, two], (shared[one] == shared[two]).mean())
        assert math.isclose(both.alphas.loc[one, two],
                            alpha_by_hand(shared.to_numpy().tolist(), lambda a, b: float(a != b)), rel_tol=1e-9)
    with pytest.raises(LireError) as e:
        agreement(models[0])
    one_line(e, "only one judge")
    with pytest.raises(LireError) as e:
        agreement(models[0], models[0])
    one_line(e, "more than one verdict")


# ---------------------------------------------------------------- lire judge


def answer_files(folder, n=6, systems=None):
    for name, found in (systems or two_systems(n)).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return [word for name in (systems or ("start", "LIRE"))
            for word in ("--system", f"{name}={folder / f'{name}.jsonl'}")]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_command_judges_once_and_another_judge_may_join(tmp_path, capsys):
    pytest.importorskip("openai", reason="openai is not installed: pip install 'lire_nb[server]'")
    pytest.importorskip("krippendorff", reason="krippendorff is not installed: pip install 'lire_nb[evaluation]'")
    out, files = tmp_path / "judged", answer_files(tmp_path)
    with Endpoint(prefers_new) as fair, Endpoint(lambda *_: completion("A")) as lazy:
        command = ["judge", *files, "--judge", f"fair={fair.url}#judge-1", "--out", str(out)]
        assert main([*command, "--dry-run"]) == 0 and not out.exists() and not fair.asked
        assert "12 questions" in capsys.readouterr().out
        assert main(command) == 0 and sum(fair.asked.values()) == 12
        said = capsys.readouterr().out
        assert "LIRE against start 1.000" in said and "12 questions, 120 tokens read, 24 written" in said
        verdicts = read(out / "verdicts" / "fair.jsonl")
        assert verdicts_to_preferences(verdicts).preferences == [1.0] * 6 and {v["judge"] for v in verdicts} == {"fair"}
        assert main([*command, "--judge", f"lazy={lazy.url}#judge-2"]) == 0
        assert sum(fair.asked.values()) == 12 == sum(lazy.asked.values()), "nobody is asked twice"
    rates = {r["judge"]: r for r in read(out / "win_rates.jsonl")}
    assert (rates["fair"]["win_rate"] == 1.0 and rates["fair"]["low"] < 0.7
            and rates["fair"]["flip_rate"]["value"] == 0.0)
    assert rates["lazy"]["win_rate"] == 0.5 and rates["lazy"]["flipped"] == 6
    board = {line["judge"]: line for line in read(out / "leaderboard.jsonl")}
    assert board["fair"]["wins"] == 6 and board["fair"]["mean_length"] == len("a new answer 0.0")
    assert board["fair"]["length_controlled_win_rate"] > 0.8
    (found,) = read(out / "agreement.jsonl")
    assert found["share"]["fair"]["lazy"] == 0.0 and found["shared"]["fair"]["lazy"] == 6


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("openai", reason="openai is not installed: pip install 'lire_nb[server]'")
    out, files = tmp_path / "judged", answer_files(tmp_path)
    options = ["--in-flight", "1", "--patience", "0.5", "--out", str(out)]

    def half(times, text):
        return prefers_new(times, text) if "Question 0?" in text or "Question 1?" in text else None

    with Endpoint(half) as endpoint:
        assert main(["judge", *files, "--judge", f"fair={endpoint.url}#judge-1", *options]) == 2
    one = capsys.readouterr().err
    assert one.startswith("lire judge: ") and "Traceback" not in one
    kept = len(read(out / "replies" / "fair.jsonl"))
    assert kept == 4 and not (out / "verdicts" / "fair.jsonl").exists() and not (out / "win_rates.jsonl").exists()
    with Endpoint(prefers_new) as endpoint:  # at another address
        assert main(["judge", *files, "--judge", f"fair={endpoint.url}#judge-1", *options]) == 0
        assert sum(endpoint.asked.values()) == 12 - kept
    before = (out / "verdicts" / "fair.jsonl").read_bytes()
    gone = ["judge", *files, "--judge", "fair=http://127.0.0.1:9/v1#judge-1", "--out", str(out)]
    assert main(gone) == 0 and (out / "verdicts" / "fair.jsonl").read_bytes() == before
    for change, words in ((["--max-tokens", "9"], "another name"), (["--samples", "2"], "samples")):
        assert main([*gone, *change]) == 2 and words in capsys.readouterr().err
    answer_files(tmp_path, 5)
    assert main(gone) == 2 and "answers" in capsys.readouterr().err
    assert (out / "verdicts" / "fair.jsonl").read_bytes() == before


def test_the_command_makes_sheets_for_people_and_reads_them(tmp_path, capsys):
    pytest.importorskip("krippendorff", reason="krippendorff is not installed: pip install 'lire_nb[evaluation]'")
    out = tmp_path / "judged"
    command = ["judge", *answer_files(tmp_path), "--people", "Ada, Ben,Cleo", "--out", str(out)]
    assert main(command) == 0 and "write first, second or tie" in capsys.readouterr().out
    sheets = sorted((out / "sheets").glob("*.csv"))
    assert [s.name for s in sheets] == ["ada.csv", "ben.csv", "cleo.csv"] and not (out / "win_rates.jsonl").exists()
    assert sum(len(sheet_rows(s)) for s in sheets) == 12
    for sheet in sheets:
        fill(sheet, honest)
    assert main(command) == 0 and "people: LIRE against start 1.000" in capsys.readouterr().out
    assert read(out / "win_rates.jsonl")[0]["flip_rate"] is None and len(read(out / "agreement.jsonl")) == 1
    fill(sheets[0], lambda row: "left")
    assert main(command) == 2 and "not a verdict" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2 and "sheets of another run" in capsys.readouterr().err


def test_the_command_takes_a_folder_of_lire_evaluate(tmp_path, capsys):
    run, systems = tmp_path / "run", two_systems(4)
    (run / "evaluation").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"system": name}) + "\n" for name in systems))
    for name, found in systems.items():
        (run / "evaluation" / f"{slug(name)}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    assert main(["judge", "--run", str(run), "--people", "Ada", "--out", str(run)]) == 0
    assert (run / "config.json").read_text() == "{}" and len(sheet_rows(run / "sheets" / "ada.csv")) == 4


@pytest.mark.parametrize("options, words", [
    ([], "nobody to judge"), (["--run", "nowhere"], "one of both"), (["--judge", "127.0.0.1"], "not a pair"),
    (["--judge", "a=127.0.0.1:9/v1#m"], "http://"), (["--judge", "a=http://127.0.0.1:9/v1"], "no model"),
    (["--judge", "a=http://127.0.0.1:9/v1#m"], "start it"), (["--people", "Ada", "--overlap", "2"], "overlap"),
    (["--judge", "people=http://127.0.0.1:9/v1#m"], "none of them people"),
    (["--judge", "a=http://127.0.0.1:9/v1#m", "--judge", "A=http://127.0.0.1:9/v1#m"], "file names"),
    (["--judge", "a=http://127.0.0.1:9/v1#m", "--template", "start.jsonl"], "no JSON"),
    (["--judge", "a=http://127.0.0.1:9/v1#m", "--template", "none.json"], "none.json"),
    (["--judge", "a=http://user:secret@127.0.0.1:9/v1#m"], "no password"),
    (["--people", "Ada", "--samples", "0"], "samples"), (["--people", "Ada", "--samples", "2"], "too few answers"),
    (["--people", "Ada", "--criterion", "kinder"], "no effect without --judge"),
    (["--people", "Ada", "--template", "short.json"], "no effect without --judge"),
    (["--people", "Ada", "--max-tokens", "9"], "no effect without --judge"),
    (["--people", "Ada", "--people", "Ben"], "given twice"),
    (["--judge", "a=http://127.0.0.1:9/v1#m", "--template", "short.json", "--criterion", "kinder"],
     "would stand in no question"),
])
def test_what_the_command_cannot_do_is_one_line(tmp_path, capsys, monkeypatch, options, words):
    pytest.importorskip("openai", reason="openai is not installed: pip install 'lire_nb[server]'")
    files = answer_files(tmp_path)
    (tmp_path / "short.json").write_text(json.dumps(SHORT))
    monkeypatch.chdir(tmp_path)
    assert main(["judge", *files, *options, "--out", "judged"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "secret" not in error, error
    assert not list(tmp_path.glob("judged/verdicts/*.jsonl")) and not list(tmp_path.glob("judged/sheets/*"))


# ---------------------------------------------------------------- a real server


SHORT = [{"role": "user",
          "content": "Request: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nWhich answer is better? Reply "
                     "with one word: A, B or tie."}]


def test_a_real_server_killed_in_the_middle_is_asked_for_the_rest_only(tmp_path):
    """`transformers serve` with SmolLM2 as the judge: 14 questions, the server killed after some of them, started
    again, nothing answered asked twice.

    SmolLM2-135M is a poor judge, and this is the lesson: it can say "A", and says it whatever stands there, so that
    most pairs flip; what it says otherwise is often no verdict.
    """
    need_server()
    records = [json.loads(line) for line in open(ROOT / "data" / "dialogue.jsonl", encoding="utf-8")]
    records = sorted((r for r in records if len(r["prompt"]) == 1),
                     key=lambda r: len(str(r["prompt"])) + sum(map(len, r["completions"][:2])))[:7]
    systems = {name: [{"id": r["id"], "prompt": r["prompt"], "completions": [r["completions"][k]]} for r in records]
               for k, name in enumerate(("one", "two"))}
    cache, log = tmp_path / "replies.jsonl", tmp_path / "serve.log"
    options = dict(template=SHORT, max_tokens=4, progress=False)
    answered = lambda: cache.read_bytes().count(b"\n") if cache.exists() else 0  # noqa: E731

    with Serve(resolve_model("smollm2"), "--dtype", str(compute_dtype("cpu")).removeprefix("torch."),
               log=log) as server:
        failed = []

        def first_run():
            try:
                judge_pairs(ChatJudge(server.url, server.model, cache=cache, patience=1.0, max_in_flight=2, **options),
                            systems)
            except LireError as e:
                failed.append(e)

        client = threading.Thread(target=first_run)
        client.start()
        end = time.monotonic() + 90
        while answered() < 4 and time.monotonic() < end:
            time.sleep(0.02)
        server.kill()
        client.join(60)
        kept = answered()
        assert (4 <= kept < 14 and len(failed) == 1 and "does not answer" in str(failed[0])
                and "\n" not in str(failed[0]))

        server.start()
        judge = ChatJudge(server.url, server.model, cache=cache, max_in_flight=4, **options)
        verdicts = judge_pairs(judge, systems)
        with pytest.raises(LireError) as e:
            judge_pairs(ChatJudge(server.url, "no-such-model", **options), systems)
        one_line(e, "400", "no-such-model")

    assert judge.cost.requests == 14 - kept and judge.cost.from_cache == kept and answered() == 14
    ok = log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200')
    assert 14 <= ok <= 14 + 2, "at most what was under way when the server died was answered twice"
    assert judge.cost.prompt_tokens > 14 - kept and judge.cost.completion_tokens >= 14 - kept
    gone = ChatJudge(server.url, server.model, cache=cache, **options)
    assert judge_pairs(gone, systems) == verdicts and gone.cost.requests == 0, (
        "with everything in the cache no server is needed"
    )

    found = verdicts_to_preferences(verdicts)
    assert {v["order"] for v in verdicts} == {"ab", "ba"} and len(verdicts) == 14
    assert judge.cost.failures == sum(v["verdict"] is None for v in verdicts) == sum(found.counts["failures"].values())
    assert found.counts["pairs"] == 7 == found.counts["failed"] + len(found.preferences)
    assert np.mean(found.first) > 0.5 and max(found.flips) == 1.0, "it prefers a place"
