"""Faults of reading, merging and exporting lists, one test for each line, and their relatives."""

import csv
import hashlib
import json
import logging
import unicodedata

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizer_kinds
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lire_nb import cli, lists, records
from lire_nb.base import files
from lire_nb.base.errors import LireError, ListError
from lire_nb.conversations import completion_ids
from lire_nb.lab import own_lists
from lire_nb.lists import iter_lists, load_lists, save_lists, to_rrhf, to_trl_pairs
from lire_nb.records import make_record, merge_lists
from lire_nb.tasks import load_task, same_text, text_hash

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


# Candidates and their columns
# ------------------------------------------------------------------------------------------


def test_09_merging_keeps_how_an_answer_ended():
    cut = make_record("p", ["Seven"], [0.0], meta={"finish_reasons": ["length"]})
    stopped = make_record("p", ["Seven"], [1.0], meta={"finish_reasons": ["stop"]})
    (both,) = merge_lists([cut, stopped])
    assert both["completions"] == ["Seven",
                                   "Seven"] and both["rewards"] == [0.0, 1.0] and ended(both) == ["length", "stop"]


def test_09_a_record_without_reasons_counts_as_stop():
    cut = make_record("p", ["Seven", "Two"], [0.0, 0.2], meta={"finish_reasons": ["length", "stop"]})
    (both,) = merge_lists([cut, make_record("p", ["Seven", "Two"], [1.0, 0.4])])
    assert list(zip(both["completions"], both["rewards"], ended(both))) == [("Seven", 0.0, "length"),
                                                                            ("Two", 0.30000000000000004, "stop"),
                                                                            ("Seven", 1.0, "stop")]


def test_09_every_column_travels_with_its_candidate():
    a = make_record("p", ["x", "y"], [1, 0], "m",
                    meta={"token_ids": [[1], [2, 3]], "logps": [-1.0, -2.0], "finish_reasons": ["stop", "length"],
                          "tokenizer": "t", "topic": "t"})
    b = make_record("p", ["z", "x"], [3, 2], "n",
                    meta={"token_ids": [[4], [5]], "logps": [-4.0, -5.0], "tokenizer": "other", "note": ["n1", "n2"],
                          "topic": "t"})
    (both,) = merge_lists([a, b])
    assert both["completions"] == ["x", "y", "z"] and both["rewards"] == [1.5, 0.0,
                                                                          3.0] and both["sources"] == ["m+n", "m", "n"]
    meta = both["meta"]
    assert meta["token_ids"] == [[1], [2, 3], None] and meta["logps"] == [-1.0, -2.0, -4.0] and meta["tokenizer"] == "t"
    assert meta["note"] == ["n2", None, "n1"] and ended(both) == ["stop", "length", "stop"] and meta["topic"] == "t"
    picked = records.select_candidates(both, [2, 0])
    assert (
        picked["completions"] == ["z", "x"]
        and picked["meta"]["logps"] == [-4.0, -1.0]
        and picked["meta"]["note"] == ["n1", "n2"]
        and picked["meta"]["topic"] == "t"
    )


def test_09_what_the_lists_do_not_agree_on_is_kept_by_list():
    (both,) = merge_lists(make_record("p", [c], [1], id=c, meta={"lang": "en", "from": {"file": c}}) for c in "abc")
    assert both["meta"]["lang"] == "en" and both["meta"]["merged"] == [{"id": c, "meta": {"from": {"file": c}}}
                                                                       for c in "abc"]
    # three parts and three candidates are no column
    assert records.select_candidates(both, [0])["meta"] == both["meta"]
    (again,) = merge_lists([both, make_record("p", ["d"], [1], id="d", meta={"lang": "en", "from": {"file": "d"}})])
    assert [part["id"] for part in again["meta"]["merged"]] == ["a", "b", "c", "d"]


def test_09_joining_and_capping_a_pool_keep_the_columns():
    from lire_nb.enhancement import cap_candidates, join_candidates

    old = make_record("p", [" a", " b"], [0.5, 0.1], ["human", "policy:round-1"],
                      meta={"finish_reasons": ["stop", "length"], "logps": [None, -2.0]})
    new = make_record("p", [" b", " c"], [0.3, 0.9], "policy:round-2",
                      meta={"finish_reasons": ["stop", "length"], "logps": [-3.0, -4.0]})
    pool = join_candidates(old, new)
    assert list(zip(pool["completions"], ended(pool), pool["meta"]["logps"])) == [(" a", "stop", None),
                                                                                  (" b", "length", -2.0),
                                                                                  (" b", "stop", -3.0),
                                                                                  (" c", "length", -4.0)]
    capped = cap_candidates(pool, 3, given=1)
    assert list(zip(capped["completions"], ended(capped),
                    capped["meta"]["logps"])) == [(" a", "stop", None), (" b", "length", -2.0), (" c", "length", -4.0)]


def test_09_taking_and_giving_candidates_keep_the_columns():
    from lire_nb.lab.experiments import _with_given, take_candidates

    drawn = make_record("p", ["a", "a", "b"], [0.1, 0.2, 0.3], "policy",
                        meta={"finish_reasons": ["length", "stop", "stop"], "logps": [-1.0, -2.0, -3.0]})
    more = _with_given(drawn, [("b", "human"), ("g", "human")])
    assert more["completions"] == ["a", "a", "b", "b",
                                   "g"] and more["meta"]["logps"] == [-1.0, -2.0, -3.0, None,
                                                                      None] and ended(more)[0] == "length"
    scored = {**more, "rewards": [0.1, 0.2, 0.3, 0.0, 0.9]}
    (taken,) = take_candidates([scored], 1, 2)
    assert taken["completions"] == ["a", "a", "b",
                                    "g"] and taken["meta"]["logps"] == [-1.0, -2.0, None,
                                                                        None] and ended(taken)[:2] == ["length", "stop"]
    (taken,) = take_candidates([scored], 1, 3, "extremes")
    assert taken["completions"] == ["b", "g"] and taken["meta"]["logps"] == [None, None]


def test_09_exports_keep_the_columns(tmp_path):
    meta = {"finish_reasons": ["length", "stop", "stop"], "token_ids": [[1], None, [2]], "logps": [-1.0, None, -2.0]}
    record = make_record("p", ["a", "b", "c"], [0.1, 0.9, 0.5], ["m", "n", "o"], meta=meta)
    for path in (save_lists([record], tmp_path / "x.jsonl"), save_lists([record], tmp_path / "x.parquet"),
                 to_rrhf([record], tmp_path / "r.jsonl")):
        assert one(path and load_lists(path)) == record
    back = one(to_trl_pairs([record]))
    assert back["rewards"] == [0.9, 0.1] and back["completions"] == ["b", "a"] and back["sources"] == ["n", "m"]
    assert ended(back) == ["stop", "length"]


@pytest.mark.parametrize("keep", [[], [2], [-1], [0.0]])
def test_09_a_candidate_that_is_not_there_is_named(keep):
    with pytest.raises(ListError, match="no such candidates"):
        records.select_candidates(make_record("p", ["a", "b"]), keep)


def test_09_lists_of_two_prompts_are_not_one():
    with pytest.raises(ListError, match="not one prompt"):
        records.merge_candidates([make_record("p", ["a"]), make_record("q", ["a"])])


# 16: pairs whose answers repeat the prompt
# ------------------------------------------------------------------------------

Q, Q0, A0 = U("2+2?"), U("Hi"), A("Hello")
FOUR, FIVE = A("4"), A("5")


def test_16_a_system_turn_in_front_of_the_repeated_prompt():
    record = one({"prompt": "2+2?", "chosen": [BRIEF, Q, FOUR], "rejected": [BRIEF, Q, FIVE]})
    assert record["prompt"] == [BRIEF, Q] and record["completions"] == ["4", "5"]


@pytest.mark.parametrize(
    "prompt, before, expected",
    [
        ("2+2?", [], [Q]),
        ("2+2?", [Q], [Q]),
        (" 2+2?\n", [BRIEF, Q], [BRIEF, Q]),
        ("2+2?", [BRIEF], [BRIEF, Q]),
        ("2+2?", [Q0, A0, Q], [Q0, A0, Q]),
        ("2+2?", [BRIEF, Q0, A0, Q], [BRIEF, Q0, A0, Q]),
        ("Hi", [Q0, A0, Q], [Q0, A0, Q]),
        ("Hi", [A0, Q], [Q0, A0, Q]),
        ([Q], [BRIEF, Q], [BRIEF, Q]),
        ([BRIEF, Q], [Q], [BRIEF, Q]),
        ([BRIEF, Q], [BRIEF, Q], [BRIEF, Q]),
        ([BRIEF, Q], [], [BRIEF, Q]),
        ([BRIEF, Q], [BRIEF], [BRIEF, Q]),
        ([BRIEF], [Q], [BRIEF, Q]),
        ([BRIEF, Q0, A0, Q], [Q], [BRIEF, Q0, A0, Q]),
        ([Q0, A0, Q], [BRIEF, Q], [BRIEF, Q0, A0, Q]),
        ([Q0, A0, Q], [BRIEF, Q0, A0, Q], [BRIEF, Q0, A0, Q]),
        ([Q0, A0], [Q], [Q0, A0, Q]),
        ([BRIEF, Q0], [Q0, A0, Q], [BRIEF, Q0, A0, Q]),
        ([Q0, A0, U("And?")], [U("And?"), A("So."), Q], [Q0, A0, U("And?"), A("So."), Q]),
        (None, [BRIEF, Q], [BRIEF, Q]),
    ],
)
def test_16_no_turn_is_doubled_and_none_is_lost(prompt, before, expected):
    record = one({"prompt": prompt, "chosen": [*before, FOUR], "rejected": [*before, FIVE]})
    assert record["prompt"] == expected and record["completions"] == ["4", "5"]


def test_16_text_answers_of_message_prompts():
    assert one({"prompt": [BRIEF, Q], "chosen": "4", "rejected": "5"})["prompt"] == [BRIEF, Q]
    assert one({"prompt": "2+2?", "chosen": "4", "rejected": [BRIEF, Q, FIVE],
                "system": "Be brief."})["prompt"] == [BRIEF, Q]
    assert one({"prompt": "2+2?", "chosen": "4", "rejected": "5"})["prompt"] == "2+2?"


def test_16_a_transcript_that_repeats_the_prompt():
    pair = {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"}
    for prompt in ("2+2?", "\n\nHuman: 2+2?\n\nAssistant:", [Q]):
        record = one(pair | {"prompt": prompt})
        assert record["prompt"] == [Q] and record["completions"] == ["4", "5"]


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("2+2?", [U("3+3?"), FOUR], [U("3+3?"), FIVE]),
        ([BRIEF, Q], [S("Be long."), Q, FOUR], [S("Be long."), Q, FIVE]),
        ("2+2?", [BRIEF, Q, FOUR], [Q, FIVE]),
        ([Q0, A0, Q], [Q0, FOUR], [Q0, FIVE]),
        ([Q0, A0], [Q0, A("Hey")], [Q0, A("Ho")]),
        ("2+2?", [A0, Q, FOUR], [A0, Q, FIVE]),
        ("2+2?", [Q, FOUR, U("sure?")], [Q, FIVE, U("sure?")]),
        ("2+2?", [], [FIVE]),
    ],
)
def test_16_what_can_be_read_two_ways_is_refused(prompt, chosen, rejected):
    with pytest.raises(ListError) as caught:
        one({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert caught.value.field.partition("[")[0] in ("chosen", "rejected") and "\n" not in str(caught.value)


# 17: the columns of a prompt
# --------------------------------------------------------------------------------------------

ASK = {"instruction": "Translate to French", "input": "Hello"}
ASKED = "Translate to French\n\nHello"
WITH_INPUT = {
    "distilabel": {"generations": ["Bonjour", "Hi"], "ratings": [9, 2]},
    "UltraFeedback": {"completions": [{"response": "Bonjour", "overall_score": 9},
                                      {"response": "Hi", "overall_score": 2}]},
    "pairs": {"chosen": "Bonjour", "rejected": "Hi"},
    "two outputs": {"output_1": "Bonjour", "output_2": "Hi", "preference": 1},
    "ranked": {"completions": [{"completion": "Bonjour", "rank": 0}, {"completion": "Hi", "rank": 1}]},
}


@pytest.mark.parametrize("name", WITH_INPUT)
def test_17_instruction_and_input_are_one_prompt(name):
    record = one(ASK | WITH_INPUT[name])
    assert (
        record["prompt"] == [U(ASKED)]
        and record["completions"] == ["Bonjour", "Hi"]
        and record["rewards"][0] > record["rewards"][1]
    )
    assert "input" not in record["meta"] and "instruction" not in record["meta"]
    for empty in ("", None, float("nan"), "  "):
        assert one(ASK | {"input": empty} | WITH_INPUT[name])["prompt"] == [U("Translate to French")]
    assert one(ASK | WITH_INPUT[name], chat=False)["prompt"] == ASKED


@pytest.mark.parametrize("name", WITH_INPUT)
def test_17_system_and_history_come_before(name):
    row = ASK | WITH_INPUT[name]
    assert one(row | {"system": "Be brief."})["prompt"] == [BRIEF, U(ASKED)]
    assert one(row | {"system_prompt": "Be brief.", "system": ""})["prompt"] == [BRIEF, U(ASKED)]
    for history in ([["Hi", "Hello"]], [Q0, A0], "[['Hi', 'Hello']]",
                    [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]):
        record = one(row | {"system": "Be brief.", "history": history})
        assert record["prompt"] == [BRIEF, Q0, A0, U(ASKED)] and not {"system", "history"} & record["meta"].keys()
    assert one(row | {"history": [], "system": None, "subreddit": "french"})["meta"]["subreddit"] == "french"


def test_17_long_rows(tmp_path):
    rows = [ASK | {"output": text, "score": score}
            for text, score in (("Bonjour", 9), ("Hi", 2))] + [ASK | {"input": "Bye", "output": "Salut", "score": 5}]
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    for source in (rows, tmp_path / "x.csv"):
        first, second = load_lists(source)
        assert first["prompt"] == [U(ASKED)] and first["completions"] == ["Bonjour",
                                                                          "Hi"] and first["rewards"] == [9, 2]
        assert second["prompt"] == [U("Translate to French\n\nBye")]
    record = one([row | {"system": "Be brief."} for row in rows[:2]])
    assert record["prompt"] == [BRIEF, U(ASKED)] and record["completions"] == ["Bonjour", "Hi"]


@pytest.mark.parametrize("preference, rewards",
                         [(1, [1, 0]), (2, [0, 1]), (1.5, [0.5, 0.5]), (0, [0.5, 0.5]), ("1.25", [0.75, 0.25]),
                          (None, [None, None])])
def test_17_alpaca_farm_preferences(preference, rewards):
    assert one(ASK | {"output_1": "Bonjour", "output_2": "Hi", "preference": preference,
                      "raw_preference": 3})["rewards"] == rewards
    with pytest.raises(ListError, match="not a preference"):
        one(ASK | {"output_1": "Bonjour", "output_2": "Hi", "preference": 3})


def test_17_own_and_rrhf_rows_read_their_system_too():
    assert one({"prompt": "2+2?", "completions": ["4"], "system": "Be brief."})["prompt"] == [BRIEF, Q]
    assert one({"query": "2+2?", "responses": ["4"], "scores": [1],
                "history": [["Hi", "Hello"]]})["prompt"] == [Q0, A0, Q]
    assert one({"question": "2+2?", "chosen": "4", "rejected": "5", "system": "Be brief."})["prompt"] == [BRIEF, Q]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Translate", "input": "Hello", "completions": ["Bonjour"]},
        {"prompt": "Translate", "input": "Hello", "chosen": "a", "rejected": "b"},
        {"question": "Who?", "context": "Ann came.", "completion": "Ann", "score": 1},
        {"prompt": "p", "completions": ["a"], "tools": [{"name": "search"}]},
        {"instruction": "Describe", "images": ["x.png"], "generations": ["a"], "ratings": [1]},
        {"prompt": "p", "system": "a", "system_prompt": "b", "completions": ["a"]},
        {"prompt": [S("a"), U("p")], "system": "b", "completions": ["a"]},
        {"prompt": "p", "completions": ["a"], "history": "not turns"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b", "system": "x"},
    ],
)
def test_17_what_belongs_to_the_prompt_and_cannot_be_read_is_refused(row):
    with pytest.raises(ListError) as caught:
        one(row)
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_17_a_prompt_that_holds_the_instruction_already():
    template = "### Instruction:\nTranslate to French\n### Input:\nHello\n### Response:"
    record = one({"prompt": template, **ASK, "chosen": "Bonjour", "rejected": "Hi"})
    assert record["prompt"] == template and record["meta"] == ASK  # the prompt is what is said


def test_17_a_mapping_joins_columns():
    row = {"task": "Translate to French", "text": "Hello", "a": ["Bonjour", "Hi"], "m1": 9, "m2": 2, "who": "Be brief.",
           "note": "n"}
    mapping = {"prompt": ["task", "text"], "completions": "a", "rewards": ["m1", "m2"]}
    record = one(row, mapping)
    assert record == make_record(ASKED, ["Bonjour", "Hi"], [9, 2], meta={"who": "Be brief.", "note": "n"})
    assert one(row | {"text": ""}, mapping)["prompt"] == "Translate to French"
    assert one(row, mapping | {"system": "who"})["prompt"] == [BRIEF, U(ASKED)]
    talk = {"h": [{"speaker": "human", "said": "Hi"}, {"speaker": "bot", "said": "Hello"}], "q": "2+2?", "a": ["4"]}
    names = {"roles": {"bot": "assistant", "human": "user"}, "keys": {"role": "speaker", "content": "said"}}
    assert one(talk, {"prompt": ["h", "q"], "completions": "a"} | names)["prompt"] == [Q0, A0, Q]


# 18: printed messages
# -------------------------------------------------------------------------------------------------------


def as_pandas_writes(rows, path):
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("turns", [[Q], [BRIEF, U("It's \"2+2\",\nisn't it?")], [Q0, A0, Q]])
def test_18_messages_printed_into_a_csv(tmp_path, turns):
    for form in (list, np.array):
        rows = [{"prompt": form(turns), "chosen": form([FOUR]), "rejected": form([FIVE])}]
        record = one(as_pandas_writes(rows, tmp_path / "x.csv"))
        assert record["prompt"] == turns and record["completions"] == ["4", "5"]
        rows = [{"prompt": form(turns), "completions": form(["4", "it's 5"]), "rewards": form([9.0, -2.5])}]
        record = one(as_pandas_writes(rows, tmp_path / "y.csv"))
        assert (record["prompt"], record["completions"], record["rewards"]) == (turns, ["4", "it's 5"], [9.0, -2.5])


def test_18_the_line_itself(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt,completion,score\n\"[{'role': 'user', 'content': 'hi'}]\",ho,1\n")
    assert one(path)["prompt"] == [U("hi")]
    path.write_text("prompt,completion,score\n\"[{'role': 'user', 'content': <Message 3>}]\",ho,1\n")
    with pytest.raises(ListError, match="printed messages that cannot be read"):
        one(path)


def test_18_json_text_that_holds_messages():
    for turns in ([Q], [BRIEF, Q]):
        for text in (json.dumps(turns), json.dumps(turns, indent=1), str(turns)):
            assert one({"prompt": text, "chosen": "4", "rejected": "5"})["prompt"] == turns
            assert one({"prompt": text, "completions": ["4"]})["prompt"] == turns
            assert one({"prompt": text, "completion": "4", "label": True})["prompt"] == turns
    sharegpt = json.dumps([{"from": "human", "value": "2+2?"}])
    assert one({"conversations": sharegpt, "chosen": json.dumps(FOUR), "rejected": "5"})["prompt"] == [Q]


def test_18_text_stays_text(tmp_path):
    for text in ("[1, 2]", "['a', 'b']", "{'a': 1}", '{"a": 1}', "[INST] hi [/INST]", "[1] First", "[open('x')]",
                 "[1, 2] sorted?"):
        assert one({"prompt": text, "completions": [text]})["prompt"] == text
        record = one(as_pandas_writes([{"prompt": text, "completion": text, "score": 1}], tmp_path / "x.csv"))
        assert record["prompt"] == text and record["completions"] == [text]
    own = make_record(json.dumps([Q]), [json.dumps([FOUR])])  # a text that reads like messages
    assert one(save_lists([own], tmp_path / "x.jsonl")) == own == one(to_rrhf([own], tmp_path / "r.jsonl"))


def test_18_nothing_is_evaluated(tmp_path):
    flag = tmp_path / "flag"
    for text in (f"[__import__('pathlib').Path('{flag}').touch()]",
                 f"[{{'role': 'user', 'content': open('{flag}', 'w')}}]", "[" * 100_000):
        try:
            one(as_pandas_writes([{"prompt": text, "completion": "a", "score": 1}], tmp_path / "x.csv"))
        except ListError:
            pass
    assert not flag.exists()


# 19: long cells
# ---------------------------------------------------------------------------------------------------------


def test_19_a_cell_of_any_length(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "x" * size, "score": 1}
            for i, size in enumerate((10, 131_072, 131_073, 400_000))]
    limit = csv.field_size_limit()
    data, report = load_lists(as_pandas_writes(rows, tmp_path / "x.csv"), on_error="quarantine", return_report=True)
    assert (
        len(data) == 4
        and report.quarantined_rows == 0
        and [len(c[0]) for c in data["completions"]] == [10, 131_072, 131_073, 400_000]
    )
    stream = files.read_rows(tmp_path / "x.csv")
    next(stream), next(stream)
    assert csv.field_size_limit() == limit  # also while a reading goes on


# 20: scores
# -------------------------------------------------------------------------------------------------------------


def scored(*candidates):
    rows = [{"response": text, "overall_score": overall, "fine-grained_score": fine}
            for text, overall, fine in candidates]
    data, report = load_lists([{"instruction": "p", "completions": rows}], return_report=True)
    return data[0]["rewards"], {k: v for k, v in report.oddities.items()}, data[0]["meta"]


def test_20_a_ten_that_is_a_one():
    rewards, oddities, meta = scored(("bad", 10, 1.25), ("good", 8.5, 4.75), ("best", 10.0, 4.5), ("doubt", "10", 3),
                                     ("edge", 10, 2), ("edge", 10, 4))
    assert rewards == [1.0, 8.5, 10.0, None, 1.0,
                       None] and sum(oddities.values()) == 4 and all("overall_score 10" in name for name in oddities)
    assert meta["candidates"][0] == {"overall_score": 10, "fine-grained_score": 1.25}  # what the file said is kept


def test_20_a_ten_judged_by_its_annotations():
    marks = {name: {"Rating": mark} for name, mark in (("helpfulness", "1"), ("honesty", "2"), ("truthfulness", "N/A"))}
    candidates = [{"response": "a", "overall_score": 10, "annotations": marks}, {"response": "b", "overall_score": 10}]
    record = one({"instruction": "p", "completions": candidates})
    assert record["rewards"] == [1.0, 10.0]


@pytest.mark.parametrize("form",
                         ["score_{}", "{}_score", "{}_rating", "{}-rating", "rating_{}", "reward_{}", "{}_reward"])
def test_20_pair_scores_are_the_rewards(form):
    names = [form.format(which) for which in ("chosen", "rejected")]
    for answers in ({"chosen": "a", "rejected": "b"}, {"chosen": [Q, FOUR], "rejected": [Q, FIVE]},
                    {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"}):
        asked = {} if "\n" in str(answers["chosen"]) or isinstance(answers["chosen"], list) else {"prompt": "p"}
        for values, odd in (((8.5, 2), 0), ((5, 5), 1), ((2, 8), 1), (("8.5", "2"), 0)):
            data, report = load_lists([asked | answers | dict(zip(names, values))], return_report=True)
            assert data[0]["rewards"] == [float(v) for v in values] and sum("score" in name
                                                                            for name in report.oddities) == odd
            assert not set(names) & data[0]["meta"].keys() and data[0]["sources"] == ["chosen", "rejected"]


def test_20_half_a_score_is_none():
    for rejected in (None, float("nan"), ""):
        record = one({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": rejected})
        assert record["rewards"] == [1.0, 0.0] and record["meta"]["score_chosen"] == 8.5


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_20_our_own_pairs_come_back_with_their_rewards(tmp_path, pairs):
    for prompt in ("p", [BRIEF, Q]):
        made = [make_record(prompt, ["a", "b", "c"], [0.25, 0.75, -3.5], ["m", "n", "o"],
                            meta={"finish_reasons": ["stop", "length", "stop"]})]
        found = to_trl_pairs(made, pairs=pairs)
        found.to_json(tmp_path / "x.jsonl")
        for source in (found, tmp_path / "x.jsonl"):
            (back,) = merge_lists(load_lists(source))
            known = dict(zip(made[0]["completions"], zip(made[0]["rewards"], made[0]["sources"], ended(made[0]))))
            assert back["prompt"] == prompt and dict(zip(back["completions"],
                                                         zip(back["rewards"], back["sources"],
                                                             ended(back)))) == {c: known[c]
                                                                                for c in back["completions"]}


# 21: other projects' rows
# -----------------------------------------------------------------------------------------------


def test_21_conversational_kto():
    rows = [{"prompt": [Q], "completion": [FOUR], "label": True}, {"prompt": [Q], "completion": [FIVE], "label": False},
            {"prompt": [BRIEF, Q], "completion": [FOUR], "label": True}]
    first, second = load_lists(rows)
    assert (first["prompt"], first["completions"], first["rewards"]) == ([Q], ["4", "5"],
                                                                         [1.0, 0.0]) and second["prompt"] == [BRIEF, Q]
    assert one([{"prompt": "2+2?", "completion": [BRIEF, Q, FOUR], "label": True}])["prompt"] == [BRIEF, Q]
    assert one([{"prompt": "2+2?", "completion": "4", "label": True}])["rewards"] == [1.0]


def turn(who, text):
    return {"from": who, "value": text}


def test_21_sharegpt():
    said = [turn("human", "Hi"), turn("gpt", "Hello"), turn("human", "2+2?")]
    row = {"conversations": said, "chosen": turn("gpt", "4"), "rejected": turn("gpt", "5"), "system": "Be brief."}
    assert one(row)["prompt"] == [BRIEF, Q0, A0,
                                  Q] and one(row)["completions"] == ["4", "5"] and one(row)["rewards"] == [1, 0]
    assert one(row | {"chosen": [turn("gpt", "4")], "rejected": [turn("gpt", "5")],
                      "system": ""})["prompt"] == [Q0, A0, Q]
    assert one(row | {"conversations": [turn("system", "Be brief."), *said]})["prompt"] == [BRIEF, Q0, A0, Q]
    whole = {"chosen": [*said, turn("gpt", "4")], "rejected": [*said, turn("gpt", "5")]}
    assert one(whole)["prompt"] == [Q0, A0, Q] and one(whole | {"prompt": "2+2?"})["prompt"] == [Q0, A0, Q]
    liked = [{"conversations": [*said, turn("gpt", text)], "label": text == "4"} for text in "45"]
    assert one(liked)["prompt"] == [Q0, A0, Q] and one(liked)["rewards"] == [1, 0]
    with pytest.raises(ListError, match="unknown role"):
        one(row | {"conversations": [turn("bot", "Hi"), *said]})
    assert one({**row, "conversations": [turn("bot", "Hi"), *said], "system": ""},
               {"roles": {"bot": "assistant"}})["prompt"] == [A("Hi"), Q0, A0, Q]


def test_21_renamed_roles():
    row = {"prompt": [said("human", "Hi"), said("gpt", "Hello"), said("human", "2+2?")], "chosen": [said("gpt", "4")],
           "rejected": [said("gpt", "5")]}
    with pytest.raises(ListError, match="unknown role"):
        one(row)
    names = {"roles": {"human": "user", "gpt": "assistant"}}
    assert one(row, names)["prompt"] == [Q0, A0, Q]
    assert one({"p": row["prompt"], "a": ["4", "5"]},
               names | {"prompt": "p", "completions": "a"})["prompt"] == [Q0, A0, Q]
    for wrong in ({"roles": {"human": "person"}}, {"roles": "user"}, {"keys": {"role": "who"}}):
        with pytest.raises(ListError, match="not a renaming"):
            one(row, wrong)


def test_21_nemo_rl():
    row = {"context": [BRIEF, Q],
           "completions": [{"rank": 1, "completion": [FIVE]}, {"rank": 0, "completion": [FOUR]},
                           {"rank": 2, "completion": [A("6")]}]}
    record = one(row)
    assert (record["prompt"], record["completions"], record["rewards"]) == ([BRIEF, Q], ["5", "4", "6"],
                                                                            [0.5, 1.0, 0.0]) and record["meta"] == {}
    assert one(row | {"context": [Q],
                      "completions": [{"rank": 0, "completion": [BRIEF, Q, FOUR]},
                                      {"rank": 1, "completion": [BRIEF, Q, FIVE]}]})["prompt"] == [BRIEF, Q]
    with pytest.raises(ListError, match="does not continue the prompt"):
        one(row | {"completions": [{"rank": 0, "completion": [FOUR]}, {"rank": 1, "completion": [A("x"), Q, FIVE]}]})
    with pytest.raises(ListError, match="part before the last answer"):
        one(row | {"completions": [{"rank": 0, "completion": [FOUR]},
                                   {"rank": 1, "completion": [A("x"), U("y"), FIVE]}]})


def test_21_halos():
    both = {"prompt_id": 7, "prompt": [Q]}
    rows = [both | {"output": [answer], "label": int(reward > 0), "reward": reward, "type": "binary_feedback"}
            for answer, reward in ((FOUR, 1.5), (FIVE, -0.5))]
    record = one(rows)
    assert (record["prompt"], record["completions"], record["rewards"],
            record["id"]) == ([Q], ["4", "5"], [1.5, -0.5], "7")
    pair = both | {"output_A": [FIVE], "output_B": [FOUR], "label": 0, "reward_A": -0.5, "reward_B": 1.5,
                   "reward_difference": 2.0, "type": "pairwise_feedback"}
    record = one(pair)
    assert (record["completions"], record["rewards"]) == (["5", "4"], [-0.5, 1.5])
    assert one({k: v for k, v in pair.items() if k[:6] != "reward"})["rewards"] == [0.0, 1.0]
    grouped = {"prompt": [Q], "generations": [[FOUR], [FIVE]], "scores": [1.5, -0.5]}
    assert one(grouped)["rewards"] == [1.5, -0.5] and one(grouped)["completions"] == ["4", "5"]


def test_21_lists_of_message_answers():
    record = one({"prompt": "2+2?", "completions": [[BRIEF, Q, FOUR], [BRIEF, Q, FIVE]], "rewards": [1, 0]})
    assert record["prompt"] == [BRIEF, Q] and record["completions"] == ["4", "5"]


# 22: lines
# ---------------------------------------------------------------------------------------------------------------

ODD = "a\u2028b\u0085c\x0bd\x0ce\x1cf\u2029g\rh"


def test_22_a_line_of_prompts_ends_with_a_line_feed(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(f"\ufeff{ODD}\r\n\n  second \t\n \nthird".encode())
    assert [p["prompt"] for p in cli.read_prompts(str(path))] == [ODD, "second", "third"]
    path.write_bytes("only".encode())
    assert [p["prompt"] for p in cli.read_prompts(str(path))] == ["only"]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LireError, match="not UTF-8"):
        cli.read_prompts(str(path))


def test_22_rows_of_json_too(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"list": ODD + str(i), "logps": [0.5], "prompt": ODD + str(i)},
                                       ensure_ascii=False) + "\n" for i in range(2)), newline="")
    from lire_nb.base.files import read_jsonl
    from lire_nb.logprobs import _read_cache

    assert list(_read_cache(path)) == [f"{ODD}0", f"{ODD}1"] and len(read_jsonl(path)) == 2
    assert [p["prompt"] for p in cli.read_prompts(str(path))] == [f"{ODD}0", f"{ODD}1"]


# 25, 29: prompts are checked first
# --------------------------------------------------------------------------------------


class Spy:
    """A policy that says when it is asked."""

    asked = 0

    def sample(self, prompts, *args):
        self.asked += len(prompts)
        raise AssertionError("sampled before the prompts were checked")


BAD = {
    "role": [said("human", "Hi")], "number": 5, "nothing": None, "blank": " ", "no turns": [], "blank turns": [U(" ")],
    "flag": True,
    "no content": [{"role": "user"}], "number in a turn": [U(5)], "surrogate": "\ud800", "list of texts": ["Hi"],
}


@pytest.mark.parametrize("name", BAD)
def test_25_the_hundredth_prompt_is_checked_before_the_first_is_sampled(tmp_path, name):
    from lire_nb.enhancement import self_enhance
    from lire_nb.evaluation import judge_policy
    from lire_nb.sampling import sample_lists

    prompts = [{"prompt": f"Question {i}"} for i in range(99)] + [{"prompt": BAD[name]}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    policy = Spy()
    calls = {
        "read_prompts": lambda: cli.read_prompts(str(path)),
        "read_prompts with a limit": lambda: cli.read_prompts(str(path), limit=1),
        "sample_lists": lambda: sample_lists(policy, prompts, 2),
        "self_enhance": lambda: self_enhance("no-such-policy", prompts, len, tmp_path / "run"),
        "judge_policy": lambda: judge_policy("no-such-policy", prompts, {}, start="no-such-policy"),
    }
    for call in calls.values():
        with pytest.raises(LireError) as caught:
            call()
        said = str(caught.value)
        assert "prompt" in caught.value.field and "\n" not in said and "100" in said, said
    assert policy.asked == 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("row",
                         [{"prompt": 5}, {"prompt": {"a": 1}}, {"prompt": [1]}, {"text": "x"}, [1], 5,
                          {"prompt": "x", "meta": [1]}, {"prompt": "x", "id": [1]}])
def test_29_a_prompt_that_is_no_prompt_is_one_line(tmp_path, row):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(LireError) as caught:
        cli.read_prompts(str(path))
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_25_ids_belong_to_one_prompt(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "p"}\n{"id": "b", "prompt": "q"}\n{"id": "a", "prompt": "p"}\n')
    assert [p["id"] for p in cli.read_prompts(str(path))] == ["a", "b"]
    path.write_text('{"id": "a", "prompt": "p"}\n{"id": "a", "prompt": "q"}\n')
    with pytest.raises(LireError, match="already belongs to another prompt") as caught:
        cli.read_prompts(str(path))
    assert caught.value.line == 2
    from lire_nb.sampling import sample_lists

    with pytest.raises(LireError, match="already belongs to another prompt"):
        sample_lists(Spy(), [{"id": "a", "prompt": "p"}, {"id": "a", "prompt": "q"}], 2)


def test_25_prompts_of_every_layout(tmp_path):
    rows = [ASK, ASK | {"system": "Be brief."},
            {"prompt": "2+2?", "chosen": [BRIEF, Q, FOUR], "rejected": [BRIEF, Q, FIVE]},
            {"conversations": [turn("human", "Hi")]}]
    rows += [{"chosen": "\n\nHuman: Yo\n\nAssistant: a", "rejected": "\n\nHuman: Yo\n\nAssistant: b"},
             {"prompt": "p", "completions": []}]
    rows += [make_record("own", ["a", "b"], meta={"finish_reasons": ["stop", "length"], "topic": "t"})]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cli.read_prompts(str(path))
    assert [p["prompt"] for p in found] == [[U(ASKED)], [BRIEF, U(ASKED)], [BRIEF, Q], [Q0], [U("Yo")], "p",
                                            "own"] and found[-1]["meta"] == {"topic": "t"}
    path.write_text(json.dumps({"prompt": "p", "input": "lost?"}) + "\n")
    with pytest.raises(LireError, match="would be lost"):
        cli.read_prompts(str(path))


# 37: text prompts and chat models
# ---------------------------------------------------------------------------------------


def test_37_chat_is_a_stated_choice(tmp_path):
    row = {"prompt": "2+2?", "completions": ["4"], "id": "given"}
    assert one(row)["prompt"] == "2+2?" and one(row)["meta"] == {}
    assert one(row, chat=True)["prompt"] == [Q] and one(row, chat=True)["id"] == "given"
    assert one(row, chat=True)["meta"] == {}
    assert one(row, chat=False)["prompt"] == "2+2?" and one(row, chat=False)["meta"] == {"chat": False}
    assert one(row | {"prompt": [BRIEF, Q]}, chat=True)["prompt"] == [BRIEF,
                                                                      Q] and one(row | {"prompt": [Q]},
                                                                                 chat=False)["meta"] == {}
    assert one(load_lists([row], chat=False), chat=True) == one(row, chat=True)
    path = tmp_path / "p.txt"
    path.write_text("2+2?\n")
    assert cli.read_prompts(str(path), chat=True)[0]["prompt"] == [Q] and cli.read_prompts(str(path), chat=False)[0][
        "meta"
    ] == {"chat": False}
    long = [{"instruction": "2+2?", "output": text, "score": score} for text, score in (("4", 1), ("5", 0))]
    assert one(long, chat=True)["prompt"] == [Q] and len(one(long, chat=True)["completions"]) == 2
    with pytest.raises(ListError, match="chat"):
        load_lists([row], chat="yes")


def test_37_the_command_line_states_it(tmp_path, monkeypatch):
    seen = {}
    from lire_nb import sampling

    monkeypatch.setattr(sampling, "sample_lists", lambda policy, prompts, *a,
                        **k: seen.update(prompts=prompts) or [make_record(p["prompt"], ["x"]) for p in prompts])
    (tmp_path / "p.txt").write_text("2+2?\n")
    for chat, prompt in (("yes", [Q]), ("no", "2+2?"), (None, "2+2?")):
        out = tmp_path / f"{chat}.jsonl"
        assert cli.main(["sample", "--prompts", str(tmp_path / "p.txt"), "--policy", "http://localhost:1/v1#m", "--out",
                         str(out), *(["--chat", chat] if chat else [])]) == 0
        assert seen["prompts"][0]["prompt"] == prompt
        assert seen["prompts"][0]["meta"].get("chat") is (False if chat == "no" else None)
    lists_file, made = save_lists([make_record("2+2?", ["4", "55"])], tmp_path / "l.jsonl"), tmp_path / "s.jsonl"
    assert cli.main(["score", "--lists", str(lists_file), "--reward", "length", "--chat", "yes", "--out",
                     str(made)]) == 0
    assert one(made)["prompt"] == [Q]
    # another choice, another output
    assert cli.main(["score", "--lists", str(lists_file), "--reward", "length", "--out", str(made)]) == 2


def test_37_sample_lists_takes_the_choice():
    from lire_nb.sampling import sample_lists

    seen = []

    class Echo:
        def sample(self, prompts, number, settings, seed):
            seen.extend(prompts)
            raise KeyboardInterrupt

    for chat in (True, False, None):
        with pytest.raises(KeyboardInterrupt):
            sample_lists(Echo(), ["2+2?"], 2, chat=chat)
    assert seen == [[Q], "2+2?", "2+2?"]


def test_37_tasks_state_their_choice(tmp_path):
    from lire_nb.tasks import load_task

    table = tmp_path / "reviews.csv"
    with table.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label", "source"])
        writer.writerows([" ".join(f"w{i}x{j}" for j in range(60)), i % 2, "imdb"] for i in range(60))
    plain, chat = load_task("sentiment", table), load_task("sentiment", table, chat=True)
    assert all(p["meta"]["chat"] is False for split in plain.prompts.values()
               for p in split) and any(plain.prompts.values())
    assert all(r["meta"]["chat"] is False for data in plain.reward_lists.values() for r in data)
    assert all("chat" not in p["meta"] for split in chat.prompts.values() for p in split)
    posts = save_lists([make_record(f"post {i}", ["a", "b"], [1, 0], meta={"notes": ["x", "y"], "topic": "t"})
                        for i in range(20)], tmp_path / "posts.jsonl")
    plain = load_task("summarization", posts, chat=False)
    assert {json.dumps(p["meta"], sort_keys=True) for split in plain.prompts.values()
            for p in split} == {'{"chat": false, "topic": "t"}'}


# Relatives that were found on the way
# -----------------------------------------------------------------------------------


def test_relatives_of_17():
    assert one({"instruction": "Sort this list", "input": "[]", "generations": ["[]"],
                "ratings": [1]})["prompt"] == [U("Sort this list\n\n[]")]
    with pytest.raises(ListError, match="would be lost"):
        one({"instruction": "Sort", "prompt": "something else", "generations": ["a"], "ratings": [1]})
    assert one({"instruction": "Sort", "prompt": "[INST] Sort [/INST]", "generations": ["a"],
                "ratings": [1]})["prompt"] == [U("Sort")]


def test_relatives_of_18(tmp_path):
    rows = [{"instruction": "Sort", "input": "[3, 1]", "output": "[1, 3]", "score": 1, "system": "['x']"}]
    record = one(as_pandas_writes(rows, tmp_path / "x.csv"))
    assert record["prompt"] == [S("['x']"), U("Sort\n\n[3, 1]")] and record["completions"] == ["[1, 3]"]
    rows = [{"prompt": [Q], "completion": [answer], "label": answer is FOUR} for answer in (FOUR, FIVE)]
    record = one(as_pandas_writes(rows, tmp_path / "k.csv"))
    assert (record["prompt"], record["completions"], record["rewards"]) == ([Q], ["4", "5"], [1.0, 0.0])


def test_relatives_of_20():
    record = one({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": "N/A", "score_rejected": 3})
    assert record["rewards"] == [1.0, 0.0] and record["meta"] == {"score_chosen": "N/A", "score_rejected": 3}
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad", "rewards": ["s1", "s2"]}
    assert one({"q": "p", "good": "a", "bad": "b", "s1": 3, "s2": "4"}, mapping)["rewards"] == [3.0, 4.0]


def test_relatives_of_21(tmp_path):
    with pytest.raises(ListError, match="ends with an answer"):
        one({"conversations": [turn("human", "2+2?"), turn("gpt", "4")], "chosen": turn("gpt", "4"),
             "rejected": turn("gpt", "5")})
    prefill = {"prompt": [Q, A("It is")], "chosen": [A(" 4")], "rejected": [A(" 5")]}
    assert one(prefill)["prompt"] == [Q, A("It is")] and one(prefill)["completions"] == [" 4", " 5"]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "2+2?", "completion": [BRIEF, Q, FOUR],
                                "label": True}) + "\n" + json.dumps({"messages": [Q0]}) + "\n")
    assert [p["prompt"] for p in cli.read_prompts(str(path))] == [[BRIEF, Q], [Q0]]
    path.write_text(json.dumps({"messages": [Q, FOUR]}) + "\n")
    with pytest.raises(LireError, match="ends with an answer"):
        cli.read_prompts(str(path))


def test_relatives_of_18_in_memory():
    printed = {"prompt": str([Q]), "completion": str([FOUR]), "label": True}
    assert one(printed)["prompt"] == [Q] and one(printed)["completions"] == ["4"]
    whole = {"chosen": json.dumps([BRIEF, Q, FOUR]), "rejected": json.dumps([BRIEF, Q, FIVE])}
    assert one(whole)["prompt"] == [BRIEF, Q] and one(whole)["completions"] == ["4", "5"]
    answer = json.dumps([FOUR])  # asked for, as text
    assert one({"prompt": "Write a chat as JSON.", "completion": answer, "score": 1})["completions"] == [answer]
    assert one({"prompt": "Write a chat as JSON.", "chosen": answer, "rejected": "no"})["completions"] == [answer, "no"]
    assert one({"prompt": "p", "completions": ["a", "b"], "scores": ["1.5", "N/A"]})["rewards"] == [1.5, None]


JUNK = [None, True, 0, -1.5, 10**30, "", "x", "[1", "[None]", "[[1]]", [], {}, [None], [[]], [{}], {"a": 1}, ["a", 1],
        [["a"]], [["a", "b"]], [[None, 1]], [{"role": "user"}]]
JUNK += [[U("x")], [U("x"), None], U("x"), [turn("human", 1)], [turn(1, "x")], [{"role": ["user"], "content": "x"}],
         [{"completion": 1}], [{"rank": "x", "completion": "y"}], float("nan")]


def test_no_value_of_any_column_is_a_crash(tmp_path):
    rows = [ASK | more for more in WITH_INPUT.values()]
    rows += [{"prompt": "2+2?", "chosen": [BRIEF, Q, FOUR], "rejected": [BRIEF, Q, FIVE], "score_chosen": 1,
              "score_rejected": 2}]
    rows += [{"conversations": [turn("human", "Hi")], "chosen": turn("gpt", "4"), "rejected": turn("gpt", "5"),
              "system": "Be brief."}]
    rows += [{"context": [Q], "completions": [{"rank": 0, "completion": [FOUR]}]},
             {"prompt": [Q], "completion": [FOUR], "label": True}]
    rows += [{"prompt": [Q], "output_A": [FOUR], "output_B": [FIVE], "label": 1, "reward_A": 1, "reward_B": 0},
             {"messages": [Q, FOUR], "score": 1}]
    made = [row | {name: junk} for row in rows
            for name in [*row, "system", "history", "input", "finish_reason_chosen", "meta", "id"] for junk in JUNK]
    kept = refused = 0
    for row in made:
        try:
            record = one(row)
            assert records.validate_record(record) == record
            kept += 1
        except ListError as error:
            assert "\n" not in str(error)
            refused += 1
        try:
            lists.checked_prompts([lists._prompt_record(row)])
        except ListError:
            pass
    assert kept > 100 and refused > 500


def test_20_pair_scores_by_longer_names():
    for good, bad in (("chosen_avg_rating", "rejected_avg_rating"), ("chosen_rewards", "rejected_rewards"),
                      ("avg_score_chosen", "avg_score_rejected")):
        record = one({"prompt": "p", "chosen": "a", "rejected": "b", good: 4.25, bad: 1.5})
        assert record["rewards"] == [4.25, 1.5] and record["meta"] == {}


TORN = ["[{'role': 'user', 'content': 'hi th", "[{'role': 'user', 'content': 'hi'}, ...]",
        "[{'content': 'hi', 'role': 'user'}, {'content'...", '[{"from": "human", "value": "hi"},',
        "{'role': 'user', 'content': 'h"]
TORN += ["array([{'role': 'user', 'content': 'hi'}, ..., {'role': 'user', 'content': 'x'}], dtype=object)",
         "[{'role': 'user', 'content': 'hi']"]


@pytest.mark.parametrize("text", TORN)
def test_18_torn_messages_are_no_text(tmp_path, text):
    for source in ({"prompt": text, "chosen": "a", "rejected": "b"},
                   as_pandas_writes([{"prompt": text, "completion": "a", "score": 1}], tmp_path / "x.csv")):
        with pytest.raises(ListError, match="printed messages that cannot be read"):
            one(source)


@pytest.mark.parametrize("text",
                         [f"{json.dumps([Q])} is JSON. Why?", f"{[Q]} sorted?", '{"role": "admin"} is what?',
                          '{"content": 1}', "[{'name': 'torn", "{'a': "])
def test_18_text_after_whole_messages_is_text(text):
    assert one({"prompt": text, "completions": ["a"]})["prompt"] == text


def test_17_texts_beside_a_prompt_are_not_lost(tmp_path):
    row = {"title": "My cat", "query": "What does it eat?", "responses": ["fish", "hay"], "scores": [1, 0]}
    for wrong in (row, {"prompt": "Sum it up.", "document": "A cat came.", "chosen": "a", "rejected": "b"},
                  {"question": "Who?", "passage": "Ann.", "completion": "Ann", "score": 1}):
        with pytest.raises(ListError, match="would be lost"):
            one(wrong)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"title": "My cat", "prompt": "What does it eat?"}) + "\n")
    with pytest.raises(LireError, match="would be lost"):
        cli.read_prompts(str(path))
    mapping = {"prompt": ["title", "query"], "completions": "responses", "rewards": "scores"}
    assert one(row, mapping)["prompt"] == "My cat\n\nWhat does it eat?"
    assert one(row, mapping | {"prompt": "query"})["meta"] == {"title": "My cat"}  # said to be no part of it
    assert one(row | {"query": "My cat: what does it eat?"})["meta"] == {"title": "My cat"}
    assert one(row | {"title": None})["prompt"] == row["query"]
    assert one(row | {"title": {"id": 3}})["meta"] == {"title": {"id": 3}}
    assert one({"prompt": "p", "completions": ["a"], "rewards": [1], "sources": ["m"], "meta": {"title": "x"},
                "id": "i"})["meta"] == {"title": "x"}


# Rows in memory come in by the same door as rows of a file
# ------------------------------------------------------------------------------------------

OWN = {"id": "1", "prompt": "2+2?", "completions": ["4", "5"], "rewards": [1.0, 0.0]}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"history": [["Hi", "Hello"]]},
                                  {"finish_reasons": ["length", "stop"]}, {"topic": "t", "sources": ["a", "b"]}])
def test_rows_in_memory_are_read_like_a_file(tmp_path, more):
    row = OWN | more
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = load_lists(path)
    for given in ([row], Dataset.from_list([row])):
        assert [dict(r) for r in lists.as_lists(given)] == [read]


@pytest.mark.parametrize("kind", ["own", "four columns", "dataset"])
@pytest.mark.parametrize("change", [
    {"completions": ["bad", "good"], "rewards": [0.5, 0.0, 1.0]}, {"completions": ["4", "5", "6"]},
    {"completions": ["4", None]}, {"rewards": ["high", "low"]}, {"rewards": [1.0, float("nan")]}, {"prompt": " "},
    {"completions": []},
])
def test_what_no_file_may_hold_is_refused_in_memory(kind, change):
    row = OWN | change
    if kind == "own":
        row |= {"sources": ["a"] * len(row["completions"]), "meta": {}}
    with pytest.raises(LireError) as caught:
        lists.as_lists(Dataset.from_list([row]) if kind == "dataset" else [row])
    assert caught.value.field.startswith("train_dataset: ") and len(str(caught.value)) < 900


def test_messages_as_answers_are_read_in_memory_too():
    (record,) = lists.as_lists([OWN | {"prompt": [Q], "completions": [[FOUR], [FIVE]]}])
    assert record["completions"] == ["4", "5"] and record["prompt"] == [Q]


def test_a_data_set_of_ours_is_checked_and_stays_where_it_is():
    good = load_lists([OWN, OWN | {"id": "2"}])
    assert lists.as_lists(good) is good
    rows = [make_record("p", ["a", "b"], [1, 0], id="x"), make_record("q", ["a", "b"], [1, 0], id="x")]
    for given in (rows, records.lists_dataset(rows)):
        with pytest.raises(LireError, match="already belongs to another prompt"):
            lists.as_lists(given)
    table = good.data.table.set_column(3, "rewards", [[[1.0, 0.0, 2.0], [1.0, 0.0]]])
    with pytest.raises(LireError, match="unequal lengths"):
        lists.as_lists(Dataset(table, info=good.info))
    assert lists.as_lists(rows[:1]) == rows[:1] and lists.as_lists([]) == []


@pytest.mark.parametrize("row", [
    {"prompt": "2+2?", "system": "Be brief."}, {"prompt": [Q], "tools": TOOLS}, {"prompt": "2+2?", "context": "x"},
    {"prompt": "Translate", "input": "Hello"}, {"prompt": "2+2?", "tools": TOOLS}, {"prompt": "2+2?", "images": ["x"]},
    {"instruction": "Say hi", "generations": ["a"], "ratings": [1]}, ASK | {"system": "Be brief."}, {"question": "2+2?"},
    {"prompt": "2+2?", "chosen": [BRIEF, Q, FOUR], "rejected": [BRIEF, Q, FIVE]}, {"messages": [Q0]},
    {"prompt": "2+2?", "query": "And?", "responses": ["4"], "scores": [1]},
])
def test_prompts_in_memory_are_read_like_a_file(tmp_path, row):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        expected = lists.load_prompts(path)
    except ListError as error:
        with pytest.raises(ListError) as caught:
            lists.checked_prompts([row])
        assert (caught.value.reason, caught.value.field) == (error.reason, error.field)
        return
    found = lists.checked_prompts([row])
    assert found == expected == lists.checked_prompts(found)


@pytest.mark.parametrize("row", [
    {"instruction": "Say hi", "generations": ["a", "b"], "ratings": [1, 2]}, ASK | WITH_INPUT["pairs"],
    {"id": "i", "instruction": "Say hi", "output": "a", "score": 1},
])
def test_an_instruction_is_the_same_prompt_alone(tmp_path, row):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for chat in (None, True, False):
        ((prompt, record),) = zip(lists.load_prompts(path, chat), load_lists(path, chat=chat))
        assert (prompt["id"], prompt["prompt"]) == (record["id"], record["prompt"])
    name = record["id"]
    assert lists.prompt_row_of(path, name, False) == lists.row_of(path, name, chat=False)


def test_the_record_of_a_checked_prompt_stays_as_it_is():
    record = make_record("[{'role': 'user', 'content': 'Hi'}]", ["a"], [1], meta={"topic": "t"})
    assert lists.checked_prompts([record]) == [record]


# Layouts that lost a text or a score
# ------------------------------------------------------------------------------------------


def test_a_query_beside_another_prompt_is_not_dropped(tmp_path):
    row = {"prompt": "You are a pirate.", "query": "What is 2+2?", "responses": ["4", "5"], "scores": [1, 0]}
    with pytest.raises(ListError, match="would be lost"):
        one(row)
    for query in ("You are a pirate.", "\n\nHuman: You are a pirate.\n\nAssistant:"):
        assert one(row | {"query": query}) == make_record("You are a pirate.", ["4", "5"], [1, 0])
    assert one(row | {"prompt": None})["prompt"] == "What is 2+2?"
    kept = [make_record([BRIEF, Q, A(" So")], ["4", "5"], [1, 0]), make_record("\n\nHuman: x\n\nAssistant:", ["a"], [1])]
    assert list(load_lists(to_rrhf(kept, tmp_path / "x.jsonl"))) == kept
    assert [p["prompt"] for p in lists.load_prompts(tmp_path / "x.jsonl")] == [r["prompt"] for r in kept]


def test_pairs_have_no_place_for_tools():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    for prompt in ([Q | {"tools": TOOLS}], [Q, call, {"role": "tool", "content": "4"}]):
        with pytest.raises(ListError, match="tools have no place"):
            to_trl_pairs([make_record(prompt, ["4", "5"], [1, 0])])


@pytest.mark.parametrize("row, rewards", [
    ({"completions": ["a", "b"], "rewards": None, "scores": [1, 0]}, [1, 0]),
    ({"completions": ["a", "b"], "rewards": [None, None], "ratings": [2, 1]}, [2, 1]),
    ({"generations": ["a", "b"], "ratings": None, "scores": [1, 0]}, [1, 0]),
    ({"generations": ["a", "b"], "ratings": ["N/A", "N/A"], "scores": [1, 0]}, [1, 0]),
    ({"completion": "a", "label": True, "score": None}, [1]),
    ({"completion": "a", "rating": "3", "score": "N/A", "reward": float("nan")}, [3]),
    ({"completion": None, "response": "a", "score": 2}, [2]),
    ({"completions": [{"completion": "a", "rank": None, "score": 2}, {"completion": "b", "rank": None, "score": 1}]},
     [2, 1]),
    ({"chosen": "a", "rejected": "b", "score_chosen": "N/A", "score_rejected": "N/A", "chosen_rating": 5,
      "rejected_rating": 3}, [5, 3]),
    ({"chosen": "a", "rejected": "b", "rewards": [None, None], "score_chosen": 5, "score_rejected": 3}, [5, 3]),
    ({"completion": "a", "score": None, "label": None}, [None]),
    ({"completions": ["a", "b"], "rewards": None, "scores": None}, [None, None]),
])
def test_a_null_column_hides_no_other(row, rewards):
    assert one({"prompt": "q", **row})["rewards"] == rewards


def test_candidates_of_one_prompt_are_judged_by_one_column(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "rank": 1}, {"prompt": "q", "completion": "b", "rank": 2, "score": 0.3}]
    with pytest.raises(ListError, match="judged in different columns"):
        load_lists(rows)
    ranked = {"prompt": "prompt", "completion": "completion", "rank": "rank"}
    assert one(rows, ranked)["rewards"] == [1.0, 0.0]
    with pytest.raises(ListError, match="rating and score"):
        load_lists([{"prompt": "q", "completion": c, name: 1} for c, name in (("a", "score"), ("b", "rating"))])
    apart = [rows[0], rows[1] | {"prompt": "r"}, {"prompt": "q", "completion": "c", "score": None}]
    assert [r["rewards"] for r in load_lists(apart)] == [[0.5, None], [0.3]]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "r", "completion": "c", "score": 1}]))
    data, report = load_lists(path, on_error="quarantine", return_report=True)
    assert list(data["prompt"]) == ["r"] and (report.good_rows, report.quarantined_rows) == (1, 2)


@pytest.mark.parametrize("names, rewards", [
    (["desirable", "undesirable"], [1, 0]), (["undesirable", "desirable"], [0, 1]), (["False", "True"], [0, 1]),
    (["1", "0"], [1, 0]), (["toxic", "odd"], None),
])
def test_the_names_of_a_label_decide(tmp_path, names, rewards):
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"prompt": ["q", "q"], "completion": ["a", "b"], "label": [0, 1]}, features=features)
    data.to_parquet(tmp_path / "x.parquet")
    words = [{"prompt": "q", "completion": c, "label": names[i]} for i, c in enumerate("ab")]
    for source in (data, tmp_path / "x.parquet", words):
        if rewards is None:
            with pytest.raises(ListError, match="meaning is not known"):
                load_lists(source)
        else:
            assert one(source)["rewards"] == rewards
    unknown = Dataset.from_dict({"prompt": ["q"], "completion": ["a"], "label": [-1]}, features=features)
    assert one(unknown)["rewards"] == [None]


@pytest.mark.parametrize("about", [b"{", b"[1]", b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 1}}}}'])
def test_a_description_that_cannot_be_read_costs_no_row(tmp_path, about):
    table = pa.table({"prompt": ["q"], "completion": ["a"], "label": [1]}).replace_schema_metadata({"huggingface": about})
    pq.write_table(table, tmp_path / "x.parquet")
    assert one(tmp_path / "x.parquet")["rewards"] == [1.0]


@pytest.mark.parametrize("part", [{"type": "image", "text": ""}, {"type": "reasoning", "text": "hmm"},
                                  {"text": "", "image": "x.png"}])
def test_only_parts_of_text_are_joined(part):
    parts = [{"type": "text", "text": "2+"}, {"text": "2?", "type": None, "image": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "completions": ["4"]}
    assert one(row)["prompt"] == [Q]
    with pytest.raises(ListError, match="not a string"):
        one({"prompt": [{"role": "user", "content": [*parts, part]}], "completions": ["4"]})
    with pytest.raises(ListError, match="not a string"):
        one({"prompt": [Q], "chosen": [{"role": "assistant", "content": [part, *parts]}], "rejected": [FIVE]})


def test_a_deeply_nested_score_is_one_error():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ListError):
        one({"prompt": "q", "completions": ["a"], "rewards": [deep]})


@pytest.mark.parametrize("reasons", [["length", None], [None, "length"], ["stop", "length"], [None, None]])
def test_how_an_answer_ended_is_read_from_every_layout(reasons):
    def read(rows):
        return one(rows)["meta"].get("finish_reasons", [None, None])

    record = make_record("q", ["a", "b"], [1, 0], meta={"finish_reasons": reasons})
    back = one(to_trl_pairs([record]))
    assert back["meta"].get("finish_reasons", [None, None]) == reasons and not {
        "finish_reason_chosen", "finish_reason_rejected"} & back["meta"].keys()
    long = [{"prompt": "q", "completion": c, "reward": r, "finish_reason": end}
            for c, r, end in zip("ab", (1, 0), reasons)]
    assert read(long) == reasons
    dicts = [{"completion": c, "score": r, "finish_reason": end} for c, r, end in zip("ab", (1, 0), reasons)]
    assert read({"prompt": "q", "completions": dicts}) == reasons
    judged = [{"response": c, "overall_score": r, "finish_reason": end} for c, r, end in zip("ab", (1, 0), reasons)]
    assert read({"prompt": "q", "completions": judged}) == reasons
    if any(reasons):
        assert read({"prompt": "q", "completions": ["a", "b"], "rewards": [1, 0], "finish_reason": reasons}) == reasons
        assert "candidates" not in one({"prompt": "q", "completions": dicts})["meta"]


def test_one_source_of_two_is_kept():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "source_chosen": "gpt", "source_rejected": None}
    assert one(row)["sources"] == ["gpt", "unknown"]


@pytest.mark.parametrize("names", [("answer", "output"), ("answer", "generation"), ("response", "answer"),
                                   ("completion", "output")])
def test_two_answers_in_a_row_are_not_chosen_from(names):
    gold, own = names
    rows = [{"question": "2+2?", gold: "4 (gold)", own: text, "score": score}
            for text, score in (("five", 0.0), ("4", 1.0))]
    with pytest.raises(ListError, match="two columns that may be the answer.*--map completion="):
        load_lists(rows)
    mapped = one(rows, {"prompt": "question", "completion": own, "reward": "score"})
    assert (mapped["completions"], mapped["rewards"]) == (["five", "4"], [0.0, 1.0])
    with pytest.raises(ListError, match="two columns that may be the answer"):  # an empty one is an answer, too
        load_lists([rows[0] | {own: ""}])
    assert one([rows[0] | {gold: "five"}, rows[1] | {gold: "4"}])["completions"] == ["five", "4"]  # the same twice
    assert [p["prompt"] for p in lists.checked_prompts(rows)] == ["2+2?"] * 2  # prompts need no answer


def test_another_column_does_not_step_in_for_an_empty_answer(tmp_path):
    table = "question,response,answer,score\n2+2?,,4 (gold),0\n2+2?,4!,4 (gold),1\n2+2?,5,4 (gold),-1\n"
    (tmp_path / "x.csv").write_text(table)
    with pytest.raises(ListError, match="answers? in different columns|may be the answer"):
        load_lists(tmp_path / "x.csv")
    data, report = load_lists(tmp_path / "x.csv", on_error="quarantine", return_report=True)
    assert (len(data), report.quarantined_rows) == (0, 3)
    lone = {"question": "2+2?", "response": None, "answer": "4 (gold)", "score": 0}
    assert one([lone])["completions"] == ["4 (gold)"]  # nothing in the file answers in the other column
    for other in ({"question": "3+3?", "response": "6", "answer": None, "score": 1},
                  {"question": "3+3?", "response": "6", "score": 1}):
        for rows in ([lone, other], [other, lone]):
            with pytest.raises(ListError, match="answers in different columns"):
                load_lists(rows)
    apart = [{"prompt": p, name: name, "score": 1} for p, name in zip("qq", ("completion", "response"))]
    with pytest.raises(ListError, match="completion and response: answers in different columns"):
        load_lists(apart)
    assert len(load_lists([apart[0], apart[1] | {"prompt": "r"}])) == 2  # two kinds of rows, nothing null


def test_rewards_beside_ranks_are_taken_or_refused():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [0.9, 0.85, -3.0], "ranks": [1, 2, 3]}
    assert one(row)["rewards"] == [0.9, 0.85, -3.0] and one(row)["meta"] == {"ranks": [1, 2, 3]}
    renamed = {("scores" if k == "rewards" else k): v for k, v in row.items()}
    assert one(renamed)["rewards"] == [0.9, 0.85, -3.0]
    assert one(row | {"ranks": [1, 1, 2]})["rewards"] == one(row | {"ranks": ["1", None, "2"]})["rewards"] == [
        0.9, 0.85, -3.0]  # a tie on either side contradicts nothing
    assert one(row | {"rewards": [0, 0, 0]})["rewards"] == [0, 0, 0]
    assert one(row | {"rewards": None})["rewards"] == one(row | {"rewards": [None] * 3})["rewards"] == [1.0, 0.5, 0.0]
    for wrong in (row | {"ranks": [3, 2, 1]}, renamed | {"ranks": [0, 2, 1]},
                  row | {"rewards": [0.1, None, 3.0], "ranks": [0, 1, 2]}):
        with pytest.raises(ListError, match="ranks that contradict the rewards.*--map rewards="):
            load_lists([wrong])
    best_highest = {"prompt": "prompt", "completions": "completions", "rewards": "rewards"}
    assert one(row | {"ranks": [3, 2, 1]}, best_highest)["rewards"] == [0.9, 0.85, -3.0]
    dicts = [{"completion": c, "rank": rank, "reward": reward} for c, rank, reward in (("a", 0, 9), ("b", 1, -9))]
    assert one({"prompt": "p", "completions": dicts})["rewards"] == [1.0, 0.0]
    with pytest.raises(ListError, match="ranks that contradict"):
        load_lists([{"prompt": "p", "completions": [dicts[0] | {"rank": 1}, dicts[1] | {"rank": 0}]}])


ENDED = ["length", "stop"]


@pytest.mark.parametrize("rows, mapping", [
    ([{"q": "q", "a": c, "s": s, "finish_reason": e} for c, s, e in zip("ab", (1, 0), ENDED)],
     {"prompt": "q", "completion": "a", "reward": "s"}),
    ([{"q": "q", "a": c, "s": s, "why": e, "year": 3} for c, s, e in zip("ab", (1, 0), ENDED)],
     {"prompt": "q", "completion": "a", "reward": "s", "finish_reason": "why", "meta": ["year"]}),
    ([{"q": "q", "a": {"text": c, "finish_reason": e}, "s": s} for c, s, e in zip("ab", (1, 0), ENDED)],
     {"prompt": "q", "completion": "a.text", "reward": "s"}),
    ({"q": "q", "good": "a", "bad": "b", "finish_reason_chosen": "length", "finish_reason_rejected": "stop"},
     {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ({"q": "q", "good": "a", "bad": "b", "good_finish_reason": "length", "bad_finish_reason": "stop"},
     {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    ({"q": "q", "chosen": "b", "rejected": "a", "finish_reason_chosen": "stop", "finish_reason_rejected": "length"},
     {"prompt": "q", "chosen": "rejected", "rejected": "chosen"}),  # each follows its own column
    ({"q": "q", "good": "a", "bad": "b", "e1": "length", "e2": "stop"},
     {"prompt": "q", "chosen": "good", "rejected": "bad", "finish_reason_chosen": "e1", "finish_reason_rejected": "e2"}),
    ({"q": "q", "good": "a", "bad": "b", "e": ENDED}, {"prompt": "q", "chosen": "good", "rejected": "bad",
                                                       "finish_reason": "e"}),
    ({"q": "q", "answers": [{"text": c, "finish_reason": e} for c, e in zip("ab", ENDED)]},
     {"prompt": "q", "completions": "answers.text"}),
    ({"q": "q", "x": "a", "y": "b", "finish_reason_x": "length", "finish_reason_y": "stop"},
     {"prompt": "q", "completions": ["x", "y"]}),
    ({"q": "q", "c": ["a", "b"], "finish_reason": ENDED}, {"prompt": "q", "completions": "c", "meta": []}),
    ({"q": "q", "c": ["a", "b"], "finish_reasons": ENDED}, {"prompt": "q", "completions": "c"}),
    ({"q": "q", "c": ["a", "b"], "why": ENDED}, {"prompt": "q", "completions": "c", "finish_reasons": "why"}),
])
def test_how_an_answer_ended_travels_with_a_mapping(rows, mapping):
    if mapping.get("meta") == []:
        mapping = mapping | {"meta": ["q"]}
    record = one(rows, mapping)
    assert record["completions"] == ["a", "b"] and record["meta"]["finish_reasons"] == ENDED
    tokenizer = tokenizer_kinds.letters()
    ids, _ = completion_ids(record | {"completions": ["abc", "abd"]}, tokenizer)
    assert [answer[-1] == tokenizer.eos_token_id for answer in ids] == [False, True]


def test_an_ending_of_another_column_is_not_taken():
    row = {"q": "q", "chosen": "x", "good": "a", "bad": "b", "finish_reason_chosen": "length"}
    record = one(row, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert "finish_reasons" not in record["meta"] and record["meta"]["finish_reason_chosen"] == "length"
    assert "finish_reasons" not in one({"q": "q", "c": ["a"]}, {"prompt": "q", "completions": "c"})["meta"]


@pytest.mark.parametrize("names", [["desirable", "undesirable"], ["undesirable", "desirable"]])
def test_the_names_of_a_label_decide_in_a_stream(names):
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"prompt": ["q", "q", "r"], "completion": ["a", "b", "c"], "label": [0, 1, -1]},
                             features=features)
    stream = data.to_iterable_dataset()
    wanted = [[float(name == "desirable") for name in names], [None]]
    for source in (data, stream, stream.with_format("torch"), stream.with_format("arrow"), stream.take(3),
                   data.to_iterable_dataset(num_shards=2), stream.filter(lambda row: row["completion"] != "x")):
        assert [record["rewards"] for record in load_lists(source)] == wanted
    plain = Dataset.from_dict({"prompt": ["q"], "completions": [["a", "b"]], "rewards": [[1.0, 0.0]]})
    assert list(load_lists(plain.to_iterable_dataset())) == list(load_lists(plain))
    assert list(load_lists(load_lists(plain).to_iterable_dataset())) == list(load_lists(plain))  # our own columns


def test_a_function_that_only_changes_what_is_shown_is_refused(tmp_path):
    stored = Dataset.from_dict({"prompt": ["q"], "completions": [["a", "b"]], "rewards": [[1.0, 0.0]]})
    turned = lambda rows: {**rows, "rewards": [[-x for x in r] for r in rows["rewards"]]}  # noqa: E731
    shown = stored.with_transform(turned)
    assert shown[0]["rewards"] == [-1.0, 0.0]
    splits = DatasetDict(train=stored).with_transform(turned)
    own = load_lists(stored).with_transform(turned)
    for read in (lambda: load_lists(shown), lambda: load_lists(splits["train"]), lambda: list(iter_lists(shown)),
                 lambda: lists.as_lists(dict(splits), "eval_dataset"), lambda: lists.as_lists(own),
                 lambda: lists.checked_prompts(shown), lambda: save_lists(own, tmp_path / "x.jsonl")):
        with pytest.raises(LireError, match="changes when they are looked at.*ds.map.*ds.reset_format"):
            read()
    assert load_lists(stored.map(turned, batched=True))[0]["rewards"] == [-1.0, 0.0]
    shown.reset_format()
    assert load_lists(shown)[0]["rewards"] == load_lists(stored.with_format("torch"))[0]["rewards"] == [1.0, 0.0]


def split_in(folder):
    """The first words of the prompts in each split of a task, from files in a folder."""
    task = load_task("dialogue", path=folder)
    return {split: {r["prompt"][0]["content"].split(" ")[0] for r in found} for split, found in task.prompts.items()}


@pytest.mark.parametrize("train, test", [
    ("train/data.jsonl", "test/data.jsonl"), ("train.jsonl", "test.jsonl"),
    ("data/train/part-0.jsonl", "data/Test/part-0.jsonl"),
    ("tests-of-ours/train.jsonl", "tests-of-ours/test.jsonl"), ("a/train/device.jsonl", "a/test/device.jsonl"),
    ("train-00000-of-00001.jsonl", "Test-00000-of-00001.jsonl"), ("validation/x.jsonl", "test_prefs/x.jsonl"),
])
def test_the_name_of_a_folder_tells_the_split(tmp_path, train, test):
    for name, word in ((train, "Old"), (test, "New")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_lists([make_record([U(f"{word} {i}")], ["a", "b"], [1, 0]) for i in range(12)], tmp_path / name)
    found = split_in(tmp_path)
    assert found["test"] == {"New"} and found["train"] | found["validation"] == {"Old"}


@pytest.mark.parametrize("here, there", [
    ("\u00e9t\u00e9 {}", "e\u0301te\u0301 {}"), ("What is it {}?", "what is  it, {}"), ("Na\u00efve {}", "NAI\u0308VE {}!"),
    ("ﬁne {}", "fine {}"), ("Straße {}", "STRASSE {}"),
])
def test_a_test_prompt_in_another_spelling_is_not_trained_on(tmp_path, here, there):
    for name, text, count in (("train", here, 12), ("test", there, 5)):
        save_lists([make_record([U(text.format(i))], ["a", "b"], [1, 0]) for i in range(count)],
                   tmp_path / f"{name}.jsonl")
    task = load_task("dialogue", path=tmp_path)
    kept = {r["prompt"][0]["content"] for name in ("train", "validation") for r in task.prompts[name]}
    assert kept == {here.format(i) for i in range(5, 12)} and task.notes["also in test, taken out"] == 5
    assert same_text is own_lists.same_text


@pytest.mark.parametrize("text", ["Why is the  sky BLUE?", "\u00c9t\u00e9", "e\u0301te\u0301", "ﬁne …", "दिल्ली", "ΐ"])
def test_the_hash_of_a_text_is_that_of_its_composed_form(text):
    composed = unicodedata.normalize("NFC", text)
    digest = hashlib.sha256(b"s\n" + " ".join(composed.lower().split()).encode()).hexdigest()[:16]
    assert text_hash(text, "s") == text_hash(unicodedata.normalize("NFD", text), "s") == int(digest, 16) / 2**64


@pytest.mark.parametrize("one, other, same", [
    ("What is 7+3?", "what is 7 + 3", True), ("What is 7+3?", "What is 7-3?", False), ("7 - 3", "7 3", False),
    ("3.5 stars", "35 stars", False), ("Costs $5.", "Costs 5.", False), ("film 1.", "Film 1", True),
    ("a `word`, (so)", "a word so", True), ("\u0915\u093f", "\u0915\u0941", False), ("C++", "C", False),
    ("caf\u00e9 \uff01", "cafe\u0301", True), ("so\r\n  what", "so what", True), ("x_1", "x 1", False)])
def test_signs_that_are_part_of_what_is_asked_tell_prompts_apart(one, other, same):
    assert (same_text(one) == same_text(other)) == same


def test_tools_tell_prompts_of_the_same_words_apart():
    """Of a call, which may say nothing itself, and of the list of tools; plain chats are the same as ever."""
    def asked(city, tool="weather"):
        call = {"type": "function", "function": {"name": tool, "arguments": {"city": city}}}
        return [{"role": "user", "content": "Warm?", "tools": [{"name": tool}]},
                {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "5"}]

    assert same_text(asked("Bern")) == same_text(make_record(asked("Bern"), ["a", "b"])["prompt"])
    assert len({same_text(asked(*one)) for one in (["Bern"], ["Rome"], ["Bern", "climate"])}) == 3
    assert same_text([{"role": "user", "content": "Warm?", "tools": None}]) == same_text("warm")
