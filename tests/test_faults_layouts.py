"""Faults of reading, merging and exporting lists, one test for each line, and their relatives."""

import csv
import json
import logging

import numpy as np
import pandas as pd
import pytest

from lire_nb import cli, lists
from lire_nb.lists import LireError, ListError, iter_lists, load_lists, make_record, merge_lists, save_lists, to_rrhf, to_trl_pairs

logging.getLogger("lire_nb.lists").setLevel(logging.ERROR)


def said(role, content):
    return {"role": role, "content": content}


S, U, A = (lambda text, role=role: said(role, text) for role in ("system", "user", "assistant"))
BRIEF = S("Be brief.")


def one(row, *args, **options):
    (record,) = iter_lists([row] if isinstance(row, dict) else row, *args, **options)
    return record


def ended(record):
    return record["meta"].get("finish_reasons", ["stop"] * len(record["completions"]))


# Candidates and their columns ------------------------------------------------------------------------------------------


def test_09_merging_keeps_how_an_answer_ended():
    cut = make_record("p", ["Seven"], [0.0], meta={"finish_reasons": ["length"]})
    stopped = make_record("p", ["Seven"], [1.0], meta={"finish_reasons": ["stop"]})
    (both,) = merge_lists([cut, stopped])
    assert both["completions"] == ["Seven", "Seven"] and both["rewards"] == [0.0, 1.0] and ended(both) == ["length", "stop"]


def test_09_a_record_without_reasons_counts_as_stop():
    cut = make_record("p", ["Seven", "Two"], [0.0, 0.2], meta={"finish_reasons": ["length", "stop"]})
    (both,) = merge_lists([cut, make_record("p", ["Seven", "Two"], [1.0, 0.4])])
    assert list(zip(both["completions"], both["rewards"], ended(both))) == [("Seven", 0.0, "length"), ("Two", 0.30000000000000004, "stop"), ("Seven", 1.0, "stop")]


def test_09_every_column_travels_with_its_candidate():
    a = make_record("p", ["x", "y"], [1, 0], "m", meta={"token_ids": [[1], [2, 3]], "logps": [-1.0, -2.0], "finish_reasons": ["stop", "length"], "tokenizer": "t", "topic": "t"})
    b = make_record("p", ["z", "x"], [3, 2], "n", meta={"token_ids": [[4], [5]], "logps": [-4.0, -5.0], "tokenizer": "other", "note": ["n1", "n2"], "topic": "t"})
    (both,) = merge_lists([a, b])
    assert both["completions"] == ["x", "y", "z"] and both["rewards"] == [1.5, 0.0, 3.0] and both["sources"] == ["m+n", "m", "n"]
    meta = both["meta"]
    assert meta["token_ids"] == [[1], [2, 3], None] and meta["logps"] == [-1.0, -2.0, -4.0] and meta["tokenizer"] == "t"
    assert meta["note"] == ["n2", None, "n1"] and ended(both) == ["stop", "length", "stop"] and meta["topic"] == "t"
    picked = lists.select_candidates(both, [2, 0])
    assert picked["completions"] == ["z", "x"] and picked["meta"]["logps"] == [-4.0, -1.0] and picked["meta"]["note"] == ["n1", "n2"] and picked["meta"]["topic"] == "t"


def test_09_what_the_lists_do_not_agree_on_is_kept_by_list():
    records = [make_record("p", [c], [1], id=c, meta={"lang": "en", "from": {"file": c}}) for c in "abc"]
    (both,) = merge_lists(records)
    assert both["meta"]["lang"] == "en" and both["meta"]["merged"] == [{"id": c, "meta": {"from": {"file": c}}} for c in "abc"]
    assert lists.select_candidates(both, [0])["meta"] == both["meta"]  # three parts and three candidates are no column
    (again,) = merge_lists([both, make_record("p", ["d"], [1], id="d", meta={"lang": "en", "from": {"file": "d"}})])
    assert [part["id"] for part in again["meta"]["merged"]] == ["a", "b", "c", "d"]


def test_09_joining_and_capping_a_pool_keep_the_columns():
    from lire_nb.enhancement import cap_candidates, join_candidates

    old = make_record("p", [" a", " b"], [0.5, 0.1], ["human", "policy:round-1"], meta={"finish_reasons": ["stop", "length"], "logps": [None, -2.0]})
    new = make_record("p", [" b", " c"], [0.3, 0.9], "policy:round-2", meta={"finish_reasons": ["stop", "length"], "logps": [-3.0, -4.0]})
    pool = join_candidates(old, new)
    assert list(zip(pool["completions"], ended(pool), pool["meta"]["logps"])) == [(" a", "stop", None), (" b", "length", -2.0), (" b", "stop", -3.0), (" c", "length", -4.0)]
    capped = cap_candidates(pool, 3, given=1)
    assert list(zip(capped["completions"], ended(capped), capped["meta"]["logps"])) == [(" a", "stop", None), (" b", "length", -2.0), (" c", "length", -4.0)]


def test_09_taking_and_giving_candidates_keep_the_columns():
    from lire_nb.experiments import _with_given, take_candidates

    drawn = make_record("p", ["a", "a", "b"], [0.1, 0.2, 0.3], "policy", meta={"finish_reasons": ["length", "stop", "stop"], "logps": [-1.0, -2.0, -3.0]})
    more = _with_given(drawn, [("b", "human"), ("g", "human")])
    assert more["completions"] == ["a", "a", "b", "b", "g"] and more["meta"]["logps"] == [-1.0, -2.0, -3.0, None, None] and ended(more)[0] == "length"
    scored = {**more, "rewards": [0.1, 0.2, 0.3, 0.0, 0.9]}
    (taken,) = take_candidates([scored], 1, 2)
    assert taken["completions"] == ["a", "a", "b", "g"] and taken["meta"]["logps"] == [-1.0, -2.0, None, None] and ended(taken)[:2] == ["length", "stop"]
    (taken,) = take_candidates([scored], 1, 3, "extremes")
    assert taken["completions"] == ["b", "g"] and taken["meta"]["logps"] == [None, None]


def test_09_exports_keep_the_columns(tmp_path):
    meta = {"finish_reasons": ["length", "stop", "stop"], "token_ids": [[1], None, [2]], "logps": [-1.0, None, -2.0]}
    record = make_record("p", ["a", "b", "c"], [0.1, 0.9, 0.5], ["m", "n", "o"], meta=meta)
    for path in (save_lists([record], tmp_path / "x.jsonl"), save_lists([record], tmp_path / "x.parquet"), to_rrhf([record], tmp_path / "r.jsonl")):
        assert one(path and load_lists(path)) == record
    back = one(to_trl_pairs([record]))
    assert back["rewards"] == [0.9, 0.1] and back["completions"] == ["b", "a"] and back["sources"] == ["n", "m"] and ended(back) == ["stop", "length"]


@pytest.mark.parametrize("keep", [[], [2], [-1], [0.0]])
def test_09_a_candidate_that_is_not_there_is_named(keep):
    with pytest.raises(ListError, match="no such candidates"):
        lists.select_candidates(make_record("p", ["a", "b"]), keep)


def test_09_lists_of_two_prompts_are_not_one():
    with pytest.raises(ListError, match="not one prompt"):
        lists.merge_candidates([make_record("p", ["a"]), make_record("q", ["a"])])
