"""Lists: real files, every layout against hand-made expectations, round trips, damaged files, and writing that
survives."""

import csv
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from lire_nb import conversations, layouts, records
from lire_nb.base import files
from lire_nb.base.errors import ListError
from lire_nb.lists import iter_lists, load_lists, save_lists, to_rrhf, to_trl_pairs
from lire_nb.records import lists_dataset, make_record, validate_record

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
HH = REAL / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
ALPACA = REAL / "alpaca_eval_lists.jsonl"


logging.getLogger("lire_nb.lists").setLevel(logging.ERROR)  # thousands of damaged files would fill the log


def real(path):
    return pytest.mark.skipif(not path.exists(),
                              reason=f"real data is not on this machine: shared/data/{path.name} is not part of the "
                                     "project")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exact(data):
    """The rows of a Dataset, floats in meta not rounded by datasets' JSON reader."""
    return list(iter_lists(data))


def quarantined(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# Real files
# ------------------------------------------------------------------------------------------------------------


@real(HH)
def test_every_hh_pair_is_accounted_for(tmp_path):
    rows = [json.loads(line) for line in gzip.open(HH, "rt", encoding="utf-8")]
    aside = tmp_path / "aside.jsonl"
    data, report = load_lists(HH, on_error="quarantine", quarantine=aside, return_report=True)
    assert report.rows == len(rows) == report.good_rows + report.quarantined_rows
    bad = {entry["line"] - 1: entry for entry in quarantined(aside)}
    assert len(bad) == report.quarantined_rows < 0.01 * len(rows)

    # Oddities found here with string operations only, by another way than the reader's.
    parted = {
        i
        for i, row in enumerate(rows)
        if row["chosen"].rpartition("\n\nAssistant:")[0] != row["rejected"].rpartition("\n\nAssistant:")[0]
    }
    assert set(bad) == parted and all("part before the last answer" in entry["reason"] for entry in bad.values())
    good = [row for i, row in enumerate(rows) if i not in bad]
    empty = sum(row[name].endswith(("\n\nAssistant:", "\n\nAssistant: ")) for row in good
                for name in ("chosen", "rejected"))
    turns = [re.findall(r"\n\n(Human|Assistant):", row["chosen"]) for row in good]
    assert report.empty_completions == empty
    assert report.oddities["one speaker twice in a row"] == sum(any(a == b for a, b in zip(t, t[1:])) for t in turns)

    kept = [row for row in exact(data)]
    assert len(kept) == len(good) - report.duplicates
    assert report.repeated_prompts == len(kept) - len({json.dumps(record["prompt"]) for record in kept})
    for row, record in zip(good, kept):
        assert record["sources"] == ["chosen", "rejected"] and record["rewards"] == [1.0, 0.0]
        for name, answer in zip(("chosen", "rejected"), record["completions"]):
            said = [*record["prompt"], {"role": "assistant", "content": answer}]
            glue = lambda text: text if not text or text[0].isspace() else f" {text}"  # noqa: E731
            joined = "".join(f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}:{glue(turn['content'])}"
                             for turn in said)
            assert joined == row[name] == layouts.join_transcript(said)


@real(HH)
def test_hh_stops_at_the_first_oddity_when_asked_to_raise():
    with pytest.raises(ListError, match="part before the last answer") as caught:
        load_lists(HH)
    assert caught.value.file == str(HH) and caught.value.line > 1 and "quarantine" in caught.value.remedy


@real(ALPACA)
def test_alpaca_lists_load_with_no_mapping():
    rows = [json.loads(line) for line in ALPACA.open(encoding="utf-8")]
    data, report = load_lists(ALPACA, return_report=True)
    assert len(data) == len(rows) == 644 and dict(report.layouts) == {"distilabel": 644}
    for row, record in zip(rows, exact(data)):
        said = [{"role": "user", "content": row["instruction"]}]  # an instruction is said to the model
        assert record["prompt"] == said and record["completions"] == row["generations"] and record["id"] == row["id"]
        assert record["rewards"] == row["ratings"] and record["sources"] == row["generation_models"]
        assert record["meta"] == {"dataset": row["dataset"]}


@real(HH)
@real(ALPACA)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_real_lists_survive_the_round_trip(tmp_path, ending):
    for source in (HH, ALPACA):
        first = load_lists(source, on_error="quarantine", quarantine=tmp_path / "aside.jsonl")
        again = load_lists(save_lists(first, tmp_path / f"lists{ending}"))
        assert exact(again) == exact(first) and again.features == first.features
        assert exact(load_lists(to_rrhf(first, tmp_path / "rrhf.jsonl"))) == exact(first)


# Layouts
# ---------------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "Hi"}]
LAYOUTS = {
    "rrhf": ({"query": "Hi", "responses": ["a", "b"], "scores": [0.5, None]}, "Hi", ["a", "b"], [0.5, None],
             ["unknown"] * 2),
    "rrhf, a transcript": ({"query": "\n\nHuman: Hi\n\nAssistant:", "responses": ["a"], "scores": [1]}, USER, ["a"],
                           [1.0], ["unknown"]),
    "distilabel": (
        {"instruction": "Hi", "generations": ["a", "", "c"], "ratings": ["4", "N/A", float("nan")],
         "generation_models": ["m", "n", "o"]},
        USER, ["a", "", "c"], [4.0, None, None], ["m", "n", "o"],
    ),
    "distilabel, ratings in a string": ({"input": "Hi", "generations": ["a", "b"], "rating": "[9.0, 7.0]"}, "Hi",
                                        ["a", "b"], [9.0, 7.0], ["unknown"] * 2),
    "ultrafeedback": (
        {"instruction": "Hi", "completions": [
            {"response": "a", "model": "m", "overall_score": 7.5, "fine-grained_score": 1.0},
            {"response": "b", "model": "n", "fine-grained_score": "2.5"},
            {"response": "c", "model": "o",
             "annotations": {"truth": {"Rating": "4"}, "help": {"Rating": "3"}, "x": {"Rating": "N/A"}}},
            {"response": "d"},
        ]},
        USER, ["a", "b", "c", "d"], [7.5, 2.5, 3.5, None], ["m", "n", "o", "unknown"],
    ),
    "trl, strings": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", ["a", "b"], [1.0, 0.0],
                     ["chosen", "rejected"]),
    "trl, static": ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}, USER, ["a", "b"],
                    [1.0, 0.0], ["chosen", "rejected"]),
    "trl, messages": (
        {"prompt": USER, "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        USER, ["a", "b"], [1.0, 0.0], ["chosen", "rejected"],
    ),
    "trl, implicit prompt": (
        {"chosen": [*USER, {"role": "assistant", "content": "a"}],
         "rejected": [*USER, {"role": "assistant", "content": "b"}]},
        USER, ["a", "b"], [1.0, 0.0], ["chosen", "rejected"],
    ),
    "ultrafeedback_binarized": (
        {"prompt": "Hi", "prompt_id": "p1", "chosen": [*USER, {"role": "assistant", "content": "a"}],
         "rejected": [*USER, {"role": "assistant", "content": "b"}], "score_chosen": 8.0},
        USER, ["a", "b"], [1.0, 0.0], ["chosen", "rejected"],
    ),
    "hh": ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, USER, ["a", "b"],
           [1.0, 0.0], ["chosen", "rejected"]),
    "tldr": (
        {"info": {"id": "t3_x", "post": "It came back.", "title": "A cat", "subreddit": "cats"},
         "summaries": [{"text": " Back.", "policy": "sup", "note": ""},
                       {"text": " Dog.", "policy": "ref", "note": "bad"}], "choice": 1, "worker": "w"},
        "TITLE: A cat\n\nIt came back.", [" Back.", " Dog."], [0.0, 1.0], ["sup", "ref"],
    ),
    "ranks": ({"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]}, "Hi", ["a", "b", "c"],
              [0.5, 1.0, 0.0], ["unknown"] * 3),
    "long": ({"prompt": "Hi", "response": "a", "score": "1.5", "model": "m"}, "Hi", ["a"], [1.5], ["m"]),
    "own, short": ({"prompt": "Hi", "completions": ["a"]}, "Hi", ["a"], [None], ["unknown"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path):
    row, prompt, completions, rewards, sources = LAYOUTS[name]
    (record,) = exact(load_lists(write_jsonl(tmp_path / "x.jsonl", [row])))
    assert (record["prompt"], record["completions"], record["rewards"],
            record["sources"]) == (prompt, completions, rewards, sources)
    assert exact(load_lists([row])) == [record] == validated([record])


def validated(records):
    return [validate_record(record) for record in records]


def test_columns_that_are_not_used_are_kept():
    row = LAYOUTS["tldr"][0]
    (record,) = load_lists([row])
    assert record["id"] == "t3_x" and record["meta"] == {"info": {"subreddit": "cats"}, "notes": ["", "bad"],
                                                         "worker": "w"}
    (record,) = load_lists([LAYOUTS["ultrafeedback_binarized"][0]])
    assert record["id"] == "p1" and record["meta"] == {"score_chosen": 8.0}
    (record,) = load_lists([LAYOUTS["ultrafeedback"][0]])
    assert record["meta"]["candidates"][0] == {"overall_score": 7.5, "fine-grained_score": 1.0}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: and?"}, "does not end with an answer"),
        ({"chosen": "\n\nHuman: Ho\n\nAssistant: a"}, "part before the last answer"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "without a prompt"),
        ({"chosen": "no marks"}, "before the first turn"),
        ({"chosen": 3}, "not a string"),
    ],
)
def test_hh_oddities_that_cannot_be_a_list(change, reason):
    with pytest.raises(ListError, match=reason):
        load_lists([LAYOUTS["hh"][0] | change])


def test_hh_oddities_that_are_kept():
    turns = "\n\nHuman: Hi\n\nHuman: \n\nAssistant:"
    data, report = load_lists([{"chosen": turns + "a", "rejected": turns + "a"}], return_report=True)
    assert data[0]["meta"] == {"transcripts": {"chosen": turns + "a", "rejected": turns + "a"}}
    assert set(report.oddities) == {
        "one speaker twice in a row", "empty turn in the prompt", "chosen and rejected are equal",
        "transcript not exactly re-joinable (kept in meta)",
    }


def test_long_rows_are_grouped_wherever_they_stand(tmp_path):
    frame = pd.DataFrame({"prompt": ["p", "q", "p", "q", "p"], "completion": list("abcde"),
                          "reward": [1, 2, None, 4, 5], "lang": ["en", "en", "en", "en", "de"],
                          "prompt_id": [7, 8, 7, 8, 7]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_json(tmp_path / "x.json", orient="records", indent=1)
    for ending in ("csv", "parquet", "json"):
        data, report = load_lists(tmp_path / f"x.{ending}", return_report=True)
        p, q = exact(data)
        assert (
            p["completions"] == ["a", "c", "e"]
            and p["rewards"] == [1.0, None, 5.0]
            and p["meta"] == {"lang": ["en", "en", "de"]}
            and p["id"] == "7"
        )
        assert q["completions"] == ["b", "d"] and q["meta"] == {"lang": "en"} and report.rows == report.good_rows == 5
        assert report.lists == 2


def test_long_rows_go_to_quarantine_one_by_one(tmp_path):
    rows = [{"prompt": "p", "completion": "a", "reward": 1}, {"prompt": "p", "completion": None, "reward": 1},
            {"prompt": "p", "completion": "b", "reward": "high"}, {"prompt": "p", "completion": "c", "reward": 0}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data, report = load_lists(path, on_error="quarantine", return_report=True)
    assert data[0]["completions"] == ["a", "c"] and (report.good_rows, report.quarantined_rows) == (2, 2)
    assert [entry["line"] for entry in quarantined(Path(report.quarantine))] == [2, 3]


def test_long_rows_whose_group_fails_are_all_put_aside(tmp_path):
    rows = [{"id": "x", "prompt": p, "completion": c, "reward": 1} for p, c in ("pa", "qb", "pc", "qd")]
    data, report = load_lists(write_jsonl(tmp_path / "x.jsonl", rows), on_error="quarantine", return_report=True)
    assert list(data["prompt"]) == ["p"] and (report.good_rows, report.quarantined_rows) == (2, 2)
    assert [entry["line"] for entry in quarantined(Path(report.quarantine))] == [2, 4]


def test_ranked_long_rows():
    (record,) = load_lists([{"prompt": "p", "completion": c, "rank": r} for c, r in (("a", 2), ("b", 1), ("c", 4))])
    assert record["rewards"] == [0.5, 1.0, 0.0] and record["meta"] == {}


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8))
def test_ranks_against_scipy(ranks):
    rewards = layouts.rank_rewards(ranks)
    if len(set(ranks)) == 1:
        assert rewards == [0.5] * len(ranks)
    else:
        assert rewards == pytest.approx([(len(ranks) - place) / (len(ranks) - 1) for place in rankdata(ranks)])


def test_mapping_reaches_into_nested_columns():
    row = {"q": {"text": "Hi", "lang": "en"}, "answers": [{"t": "a", "by": "m"}, {"t": "b", "by": "n"}],
           "m.x": ["3", 1], "n": 5, "other": float("nan")}
    mapping = {"prompt": "q.text", "completions": "answers.t", "sources": "answers.by", "rewards": "m.x", "id": "n"}
    (record,) = load_lists([row], mapping)
    assert record == make_record("Hi", ["a", "b"], [3.0, 1.0], ["m", "n"], "5",
                                 {"q": row["q"], "answers": row["answers"], "other": None})
    (record,) = load_lists([row], mapping | {"meta": ["n"]})
    assert record["meta"] == {"n": 5}
    flat = {"x": "Hi", "a1": "a", "a2": "b", "s1": 1, "s2": 0}
    (record,) = load_lists([flat], {"prompt": "x", "completions": ["a1", "a2"], "rewards": ["s1", "s2"]})
    assert record == make_record("Hi", ["a", "b"], [1, 0])
    (record,) = load_lists([{"h": "Hi", "good": "a", "bad": "b"}], {"prompt": "h", "chosen": "good", "rejected": "bad"})
    assert record["sources"] == ["chosen", "rejected"]
    (record,) = load_lists([{"h": "Hi", "r": c, "help": i} for i, c in enumerate("ab")],
                           {"prompt": "h", "completion": "r", "reward": "help"})
    assert record["completions"] == ["a", "b"] and record["rewards"] == [0.0, 1.0]


@pytest.mark.parametrize("mapping",
                         [{"promt": "q"}, {"prompt": "nope", "completions": "a"}, {"prompt": 3}, {"completions": []},
                          {"prompt": "q"}])
def test_a_wrong_mapping_is_named(mapping):
    with pytest.raises(ListError) as caught:
        load_lists([{"q": "Hi", "a": ["x"]}], mapping)
    assert caught.value.allowed


# Records
# ---------------------------------------------------------------------------------------------------------------

WORD = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SOLID = WORD.filter(str.strip)
CHAT = st.lists(st.fixed_dictionaries({"role": st.sampled_from(records.ROLES), "content": WORD}), min_size=1,
                max_size=3).filter(
    lambda messages: any(message["content"].strip() for message in messages)
)
PROMPT = SOLID | CHAT | st.sampled_from(["42", "null", '"x"', "[1]", "{}", "true", "\n\nHuman: a\n\nAssistant:",
                                         "\n\nHuman:a\n\nAssistant:"])
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | WORD | FINITE | st.integers(-(2**63), 2**63 - 1),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORD, inner, max_size=2), max_leaves=4)
CANDIDATE = st.tuples(WORD, st.none() | FINITE, WORD)


@st.composite
def a_record(draw):
    completions, rewards, sources = map(list, zip(*draw(st.lists(CANDIDATE, min_size=1, max_size=4))))
    return make_record(draw(PROMPT), completions, rewards, sources, meta=draw(st.dictionaries(WORD, JSON, max_size=2)))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(a_record(), min_size=1, max_size=4, unique_by=lambda record: record["id"]))
def test_any_record_survives_every_round_trip(tmp_path, records):
    for ending in (".jsonl", ".jsonl.gz", ".parquet"):
        path = save_lists(records, tmp_path / f"x{ending}")
        before = path.read_bytes()
        data = load_lists(path)
        assert exact(data) == records == list(iter_lists(path))
        assert save_lists(data, path).read_bytes() == before
    assert exact(load_lists(to_rrhf(records, tmp_path / "r.jsonl"))) == records
    assert [row["prompt"] for row in lists_dataset(records)] == [record["prompt"] for record in records]


def test_ids_are_stable_across_processes():
    code = "from lire_nb.records import prompt_id; print(prompt_id([{'role': 'user', 'content': 'ä'}]))"
    env = os.environ | {"PYTHONHASHSEED": "7"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                          check=True).stdout.strip() == records.prompt_id([{"content": "ä", "role": "user"}])


def test_the_module_stands_alone():
    heavy = ("torch", "transformers", "matplotlib", "lire_nb.losses")
    code = f"import sys, lire_nb.lists; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


# Duplicates
# ------------------------------------------------------------------------------------------------------------


def test_duplicates_follow_the_table(tmp_path, caplog):
    one, other = make_record("p", ["a"], [1]), make_record("p", ["b"], [1])
    named = make_record("p", ["a"], [1], id="mine")
    with caplog.at_level(logging.INFO, "lire_nb.lists"):
        data, report = load_lists([one, other, one, other, named], return_report=True)
    assert list(data["id"]) == [one["id"], one["id"] + "-2", "mine"]
    assert (report.rows, report.good_rows, report.duplicates, report.repeated_prompts, report.lists) == (5, 5, 2, 2, 3)
    assert "duplicates: 2" in caplog.text and "repeated prompts: 2" in caplog.text
    path = write_jsonl(tmp_path / "x.jsonl", [one, make_record("q", ["a"], id=one["id"])])
    with pytest.raises(ListError, match="already belongs to another prompt") as caught:
        load_lists(path)
    assert (caught.value.line, caught.value.field) == (2, "id")
    assert exact(load_lists(save_lists(data, tmp_path / "y.jsonl"))) == exact(data)


# Damaged files
# ---------------------------------------------------------------------------------------------------------
# Each damage takes a good row (a dict in our own layout) and a random source, and gives the bytes of its line and a
# verdict:
# True = this is still good, False = this must be refused, None = anything but a crash.

JUNK = st.sampled_from([None, True, 0, -1, 1.5, "", " ", "x", [], {}, [None], [[]], {"a": 1}, ["a", 1],
                        [{"role": "user"}], [{"role": "nobody", "content": "x"}], {"role": "user", "content": "x"}])


def encode(row):
    return json.dumps(row, ensure_ascii=False).encode()


def cut(row, draw):
    line = encode(row)
    return line[: draw(st.integers(1, len(line) - 1))], False if line.isascii() else None


def wrong_type(row, draw):
    return encode(row | {draw(st.sampled_from(list(row))): draw(JUNK)}), None


def unequal(row, draw):
    name = draw(st.sampled_from(["rewards", "sources"]))
    return encode(row | {name: row[name] + row[name][:1] if draw(st.booleans()) else row[name][1:]}), False


def bad_utf8(row, draw):
    line = bytearray(encode(row))
    at = draw(st.integers(0, len(line)))
    line[at:at] = draw(st.sampled_from([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80"]))
    return bytes(line), None if not encode(row).isascii() else False


def bad_reward(row, draw):
    text = draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000, '"1"',
                                 "true", "[1]", "{}"]))
    return encode(row | {"rewards": ["@"] + row["rewards"][1:]}).replace(b'"@"', text.encode(), 1), False


def empty_string(row, draw):
    where = draw(st.sampled_from(["id", "prompt", "completions", "sources"]))
    value = "" if isinstance(row[where], str) else [""] + row[where][1:]
    return encode(row | {where: value}), where not in ("id",
                                                       "prompt") if isinstance(row[where],
                                                                               list) or where == "id" else False


def nested(row, draw):
    depth = draw(st.sampled_from([60, 900, 5000]))
    text = draw(st.sampled_from(["[", '{"a":'])) * depth
    text += draw(st.sampled_from(["", "1"])) + ("]" if text[0] == "[" else "}") * draw(st.sampled_from([0, depth]))
    return encode(row | {"meta": "@"}).replace(b'"@"', text.encode()), False


def not_an_object(row, draw):
    return draw(st.sampled_from([b"1", b"null", b'"text"', b"[]", b"[{}]", b"true", b"\xff\xfe", b"{", b"}", b"\x00",
                                 b"{}", b'{"prompt": "x"}'])), False


def twice_the_key(row, draw):
    return encode(row)[:-1] + b', "id": "again"}', False


def surrogate(row, draw):
    return encode(row | {"completions": ["@"] + row["completions"][1:]}).replace(b'"@"', rb'"\ud800"'), False


def stray_byte(row, draw):
    line = bytearray(encode(row))
    line[draw(st.integers(0, len(line) - 1))] = draw(st.sampled_from([b for b in range(256) if b not in (10, 13)]))
    return bytes(line), None


DAMAGE = [cut, wrong_type, unequal, bad_utf8, bad_reward, empty_string, nested, not_an_object, twice_the_key, surrogate,
          stray_byte]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
written = 0  # damaged files written so far


@st.composite
def damaged_file(draw):
    """Lines, the verdict on each, and what the good ones must become."""
    lines, verdicts, expected, has_twin, copied = [], [], [], False, set()
    for i in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 3))
        row = make_record(f"{i}{draw(TEXT)}", [draw(TEXT) for _ in range(size)],
                          [draw(st.integers(-3, 3)) for _ in range(size)], "s", id=f"id{i}")
        lines.append(encode(row))
        verdicts.append(True)
        expected.append(row)
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, len(lines) - 1))
        if expected[i] is None or i in copied:
            continue
        if draw(st.integers(0, 9)) == 0:  # one id, two prompts: the later one is refused
            lines.append(encode(make_record("another prompt", ["x"], id=expected[i]["id"])))
            verdicts.append(False)
            expected.append(None)
            copied.add(i)
            continue
        lines[i], verdicts[i] = draw(st.sampled_from(DAMAGE))(expected[i], draw)
        expected[i] = json.loads(lines[i]) if verdicts[i] else None
        # a damaged id may be the id of another row, which is then refused; a damaged line may break in two
        has_twin |= verdicts[i] is None
    return lines, verdicts, expected, has_twin


def check(path, aside):
    """What holds for every file; gives the records, the report and the bad lines."""
    try:
        first, error = load_lists(path), None
    except ListError as caught:
        first, error = None, caught
    data, report = load_lists(path, on_error="quarantine", quarantine=aside, return_report=True)
    bad = quarantined(aside)
    assert report.rows == report.good_rows + report.quarantined_rows and len(bad) == report.quarantined_rows
    records = exact(data)
    assert validated(records) == records and len(records) == report.lists == len(set(data["id"]))
    assert all(entry["line"] >= 1 and entry["reason"] and "\n" not in entry["reason"] for entry in bad)
    if error is None:
        assert not bad and exact(first) == records
    else:
        assert error.file == str(path) and "\n" not in str(error) and str(error).startswith(f"{path}:{error.line}: ")
        assert not report.rows or error.line == bad[0]["line"]
    return records, report, bad


@settings(max_examples=2_200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(damaged_file(), st.sampled_from(["jsonl", "jsonl", "jsonl.gz", "cut.jsonl.gz", "json"]), st.data())
def damaged_files(folder, made, ending, data):
    global written
    lines, verdicts, expected, has_twin = made
    path, aside = folder / f"x.{ending}", folder / "aside.jsonl"
    content = b"[" + b",\n".join(lines) + b"]" if ending == "json" else b"\n".join(lines) + b"\n"
    content = gzip.compress(content, 1) if ending.endswith("gz") else content
    path.write_bytes(content[: data.draw(st.integers(3, len(content) - 1))] if ending == "cut.jsonl.gz" else content)
    written += 1
    records, report, bad = check(path, aside)
    if ending in ("jsonl", "jsonl.gz"):
        rows = [line for line in b"\n".join(lines).split(b"\n") if line.decode(errors="replace").strip()]
        assert report.rows == len(rows)
        if len(rows) == len(lines):
            refused = {entry["line"] for entry in bad}
            assert {i for i, verdict in enumerate(verdicts, 1) if verdict is False} <= refused
            kept = [row for row in expected if row is not None]
            assert has_twin or [i
                                for i, verdict in enumerate(verdicts, 1)
                                if verdict] == sorted(set(range(1, len(lines) + 1)) - refused)
            assert has_twin or records == validated(kept)
            assert all(entry["row"] == lines[entry["line"] - 1].decode(errors="backslashreplace").strip("\r\n")
                       for entry in bad if entry["line"] > 1)


def test_damaged_files(tmp_path):
    damaged_files(tmp_path)
    assert written >= 2_000


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_parquet_and_csv(tmp_path, data):
    records = [make_record(f"prompt {i}", ["a", "b"], [1, i], id=str(i)) for i in range(3)]
    if data.draw(st.booleans()):
        path = save_lists(records, tmp_path / "x.parquet")
    else:
        path = tmp_path / "x.csv"
        with path.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["prompt", "completion", "reward"])
            writer.writerows([f"p,{i % 2}", f'line "{i}"\nnext', i] for i in range(4))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        content[at : at + (kind == "set")] = b"" if kind == "cut" else bytes([data.draw(st.integers(0, 255))])
        content = content[:at] if kind == "cut" else content
        if not content:
            break
    path.write_bytes(content)
    check(path, tmp_path / "aside.jsonl")


def test_layouts_with_wrong_values_never_crash(tmp_path):
    """Every column of every known layout, replaced by every kind of nonsense."""
    rows = [base | {name: junk} for base, *_ in LAYOUTS.values() for name in base for junk in NONSENSE]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    records, report, bad = check(path, tmp_path / "aside.jsonl")
    assert report.rows == len(rows) > 500 and bad and records


NONSENSE = [None, True, 0, -1.5, 10**30, "", "x", "[1", [], {}, [None], [[]], [{}], {"a": 1}, ["a", 1], [1, 2],
            [{"role": "user"}], [{"role": "user", "content": "x"}], [{"text": 1}], [{"response": 1}],
            [{"response": "x", "annotations": 3}], {"post": 1}]


def test_a_damaged_parquet_row_costs_one_row(tmp_path):
    records = [make_record(f"p{i}", ["a"]) for i in range(5)]
    prompts = pa.array(['"p0"', "{broken", '"p2"', '"p3"', '"p4"'])
    completions = pa.array([record["completions"] for record in records])
    pq.write_table(pa.table({"prompt": pa.ExtensionArray.from_storage(pa.json_(), prompts),
                             "completions": completions}), tmp_path / "x.parquet")
    data, report = load_lists(tmp_path / "x.parquet", on_error="quarantine", return_report=True)
    assert list(data["prompt"]) == ["p0", "p2", "p3", "p4"] and report.quarantined_rows == 1


def test_a_clean_reading_removes_an_old_quarantine_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p"}\n')
    load_lists(path, on_error="quarantine")
    aside = tmp_path / "x.jsonl.quarantine.jsonl"
    assert aside.exists()
    path.write_text('{"prompt": "p", "completions": ["a"]}\n')
    load_lists(path, on_error="quarantine")
    assert not aside.exists()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ListError, match="no rows"):
        load_lists(path)
    assert len(load_lists(path, on_error="quarantine")) == 0


@pytest.mark.parametrize("name, reason",
                         [("missing.jsonl", "No such file"), ("folder.jsonl", "Is a directory"),
                          ("x.txt", "unknown kind of file")])
def test_files_that_cannot_be_read(tmp_path, name, reason):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ListError, match=reason) as caught:
        load_lists(tmp_path / name)
    assert caught.value.file == str(tmp_path / name) and caught.value.remedy


def test_options_are_checked_at_once():
    with pytest.raises(ListError, match="on_error"):
        iter_lists("x.jsonl", on_error="ignore")
    with pytest.raises(ListError, match="quarantine"):
        iter_lists([{}], on_error="quarantine")


# Writing
# ---------------------------------------------------------------------------------------------------------------


def child(code, *args, fork=True):
    if fork:
        script = Path(args[0]).with_name("child.script")
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        return warm.run(script, *args, cwd=script.parent, env=dict(os.environ))
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True,
                          text=True)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = save_lists([make_record("old", ["a"])], tmp_path / "x.jsonl")
    before = path.read_bytes()
    code = """
        import resource, sys
        from lire_nb.base.errors import ListError
        from lire_nb.lists import save_lists
        from lire_nb.records import make_record
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # as a full disk: the write itself is refused
        try:
            save_lists((make_record(f"new {i}", ["a" * 100]) for i in range(1000)), sys.argv[1])
        except ListError as error:
            print(error)
    """
    for ending in ("jsonl", "jsonl.gz", "parquet"):
        target = tmp_path / f"x.{ending}"
        out = child(code, target)
        if ending == "jsonl.gz" and not out.stdout:
            continue  # compressed, it may fit
        assert f"{target}: cannot be written" in out.stdout and out.stdout.count("\n") == 1, out.stderr
    assert path.read_bytes() == before and not list(tmp_path.glob(".*.tmp"))


def test_a_killed_writer_leaves_what_was_there(tmp_path):
    path = save_lists([make_record("old", ["a"])], tmp_path / "x.jsonl")
    before = path.read_bytes()
    code = """
        import os, signal, sys
        from lire_nb.lists import save_lists
        from lire_nb.records import make_record
        def records():
            for i in range(5000):
                yield make_record(str(i), ["a"])
            os.kill(os.getpid(), signal.SIGKILL)
        save_lists(records(), sys.argv[1])
    """
    assert child(code, path).returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def test_a_bad_record_leaves_nothing_half_written(tmp_path):
    with pytest.raises(ListError, match="record 2"):
        save_lists([make_record("p", ["a"]), {"prompt": "q"}], tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_foreign_os_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "x.txt"):
        open(tmp_path / "not here")
    with pytest.raises(ConnectionError), files.atomic_write(tmp_path / "x.txt"):
        raise ConnectionResetError(104, "reset")
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    with files.atomic_write(tmp_path / "ours") as handle:
        handle.write("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_can_be_rewritten_from_itself(tmp_path):
    path = save_lists([make_record(str(i), ["a"]) for i in range(5)], tmp_path / "x.jsonl")
    before = path.read_bytes()
    assert save_lists(iter_lists(path), path).read_bytes() == before


def test_streaming_memory_does_not_grow(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from lire_nb.lists import iter_lists, save_lists
        from lire_nb.records import make_record
        def peak():  # MiB; a child's ru_maxrss would begin with its parent's, and never grow
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
        peaks = []
        for count in (1_000, 10_000):
            path = save_lists((make_record(str(i), ["word " * 200] * 6, [0.5] * 6) for i in range(count)), sys.argv[1])
            save_lists(iter_lists(path), path)
            peaks.append(peak())
        print(peaks[1] - peaks[0], path.stat().st_size / 2**20)
    """
    grown, size = map(float, child(code, tmp_path / "x.jsonl", fork=False).stdout.split())
    assert size > 50 and grown < 0.2 * size


ANY_TEXT = st.text(st.characters(codec=None), max_size=8)  # lone surrogates as well
JSONS = st.recursive(st.none() | st.booleans() | st.integers() | ANY_TEXT,
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(JSONS, max_size=4), JSONS, st.integers(0, 20))
def test_json_lines_come_back_whatever_a_crash_left(tmp_path, values, last, cut):
    path = tmp_path / "x.jsonl"
    files.write_jsonl(path, values)  # any text, lone surrogates as well
    whole = path.read_bytes()
    path.write_bytes(whole + files.json_line(last)[:-1][:cut])  # half a line
    assert files.read_jsonl(path, skip=True)[: len(values)] == values
    files.append_jsonl(path, [last])
    assert files.read_jsonl(path) == [*values, last] and path.read_bytes() == whole + files.json_line(last)


# Exports and description
# -----------------------------------------------------------------------------------------------


def test_pairs_for_trl_come_back():
    records = [make_record(USER, ["a", "b", "c"], [0.1, 0.9, None]), make_record([*USER, *USER], ["d", "e"], [2, 1])]
    pairs = to_trl_pairs(records)
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "b"}] and pairs[0]["score_chosen"] == 0.9
    back = load_lists(pairs)
    assert [r["prompt"] for r in back] == [r["prompt"] for r in records] and [r["completions"]
                                                                              for r in back] == [["b", "a"], ["d", "e"]]
    with pytest.raises(ListError, match="both string and message"):
        to_trl_pairs([*records, make_record("p", ["a", "b"], [1, 0])])
    with pytest.raises(ListError, match="pairs"):
        to_trl_pairs(records, pairs="some")


@given(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=6))
def test_all_pairs_are_all_strict_pairs(rewards):
    record = make_record("p", [str(i) for i in range(len(rewards))], rewards)
    got = {(row["chosen"], row["rejected"]) for row in to_trl_pairs([record], pairs="all")}
    assert got == {(str(i), str(j)) for i, a in enumerate(rewards)
                   for j, b in enumerate(rewards) if None not in (a, b) and a > b}
    best = to_trl_pairs([record])
    known = [reward for reward in rewards if reward is not None]
    assert [(row["score_chosen"], row["score_rejected"]) for row in best] == ([(max(known), min(known))]
                                                                              if len(set(known)) > 1 else [])


class Letters:
    """A tokenizer with one token a character."""

    chat_template = None

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return {"input_ids": list(map(ord, text))}


def test_the_description_counts_what_it_says():
    records = [make_record("pp", ["aaaa", "b", "cc"], [1, 1, 0]), make_record(USER, ["a", ""], [2, 2]),
               make_record("q", ["a"], [5]), make_record("r", ["a", "b"])]
    table = conversations.describe_lists(records, Letters(), max_prompt_length=10, max_completion_length=1)["value"]
    expected = {
        "lists": 4, "candidates": 8, "lists with M = 1": 1, "lists with M = 2": 2, "lists with M = 3": 1,
        "candidates scored": 6,
        "lowest reward": 0, "highest reward": 5, "spread of rewards in a list, mean": 0.5, "lists with a tie": 2,
        "lists without signal": 3, "… because M = 1": 1,
        "… because all are tied": 1, "… because fewer than two are scored": 1, "lists with an empty completion": 1,
        "prompts longer than 10 tokens": 1, "completions longer than 1 tokens": 3, "completion tokens, largest": 4,
        "prompt tokens, largest": len("\n\nHuman: Hi\n\nAssistant:"),
    }
    assert {name: table[name] for name in expected} == expected
    figure = conversations.plot_lists(records, Letters(), max_completion_length=1)
    heights = [[bar.get_height() for bar in axis.patches] for axis in figure.axes]
    assert heights[0] == [1, 2, 1] and [sum(h) for h in heights[1:]] == [2, 4, 8] and len(figure.axes[3].lines) == 1
    with pytest.raises(ListError, match="no lists"):
        conversations.describe_lists([])


def test_merged_lists_hold_every_candidate_once():
    pairs = [make_record("p", [a, b], [1, 0], ["chosen", "rejected"], id=a + b)
             for a, b in ("AB", "AC", "CB")] + [make_record("q", ["x"])]
    first, second = records.merge_lists(pairs)
    assert (
        dict(zip(first["completions"], first["rewards"])) == {"A": 1.0, "B": 0.0, "C": 0.5}
        and first["id"] == "AB"
        and second == pairs[3]
    )
    assert [one["id"] for one in first["meta"]["merged"]] == ["AB", "AC", "CB"]


@pytest.mark.parametrize("name", ["policy:sft+human", "policy:runs/dpo+human:2/policy"])
def test_a_policys_name_with_a_plus_is_one_source(tmp_path, name):
    "What a policy sampled is its own, and no demonstration, whatever the policy is called."
    from tiny_policy import make_start

    from lire_nb.records import demonstrated, own_candidates
    from lire_nb.sampling import sample_lists, SamplingSettings

    [record] = sample_lists(str(make_start(tmp_path / "start")), ["film"], 2, source=name, progress=False,
                            settings=SamplingSettings(max_new_tokens=3))
    assert demonstrated(record) == [False, False] and own_candidates(record) == [True, True]
