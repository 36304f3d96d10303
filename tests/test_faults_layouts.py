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


# 16: pairs whose answers repeat the prompt ------------------------------------------------------------------------------

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
    mixed = {"prompt": prompt, "chosen": [*before, FOUR], "rejected": [*before, FIVE], "id": "x"}
    assert one(pd.DataFrame([mixed]).to_dict("records"))["prompt"] == expected


def test_16_text_answers_of_message_prompts():
    assert one({"prompt": [BRIEF, Q], "chosen": "4", "rejected": "5"})["prompt"] == [BRIEF, Q]
    assert one({"prompt": "2+2?", "chosen": "4", "rejected": [BRIEF, Q, FIVE], "system": "Be brief."})["prompt"] == [BRIEF, Q]
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


# 17: the columns of a prompt --------------------------------------------------------------------------------------------

ASK = {"instruction": "Translate to French", "input": "Hello"}
ASKED = "Translate to French\n\nHello"
WITH_INPUT = {
    "distilabel": {"generations": ["Bonjour", "Hi"], "ratings": [9, 2]},
    "UltraFeedback": {"completions": [{"response": "Bonjour", "overall_score": 9}, {"response": "Hi", "overall_score": 2}]},
    "pairs": {"chosen": "Bonjour", "rejected": "Hi"},
    "two outputs": {"output_1": "Bonjour", "output_2": "Hi", "preference": 1},
    "ranked": {"completions": [{"completion": "Bonjour", "rank": 0}, {"completion": "Hi", "rank": 1}]},
}


@pytest.mark.parametrize("name", WITH_INPUT)
def test_17_instruction_and_input_are_one_prompt(name):
    record = one(ASK | WITH_INPUT[name])
    assert record["prompt"] == ASKED and record["completions"] == ["Bonjour", "Hi"] and record["rewards"][0] > record["rewards"][1]
    assert "input" not in record["meta"] and "instruction" not in record["meta"]
    for empty in ("", None, float("nan"), "  "):
        assert one(ASK | {"input": empty} | WITH_INPUT[name])["prompt"] == "Translate to French"


@pytest.mark.parametrize("name", WITH_INPUT)
def test_17_system_and_history_come_before(name):
    row = ASK | WITH_INPUT[name]
    assert one(row | {"system": "Be brief."})["prompt"] == [BRIEF, U(ASKED)]
    assert one(row | {"system_prompt": "Be brief.", "system": ""})["prompt"] == [BRIEF, U(ASKED)]
    for history in ([["Hi", "Hello"]], [Q0, A0], "[['Hi', 'Hello']]", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]):
        record = one(row | {"system": "Be brief.", "history": history})
        assert record["prompt"] == [BRIEF, Q0, A0, U(ASKED)] and not {"system", "history"} & record["meta"].keys()
    assert one(row | {"history": [], "system": None, "subreddit": "french"})["meta"]["subreddit"] == "french"


def test_17_long_rows(tmp_path):
    rows = [ASK | {"output": text, "score": score} for text, score in (("Bonjour", 9), ("Hi", 2))] + [ASK | {"input": "Bye", "output": "Salut", "score": 5}]
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    for source in (rows, tmp_path / "x.csv"):
        first, second = load_lists(source)
        assert first["prompt"] == ASKED and first["completions"] == ["Bonjour", "Hi"] and first["rewards"] == [9, 2] and second["prompt"] == "Translate to French\n\nBye"
    record = one([row | {"system": "Be brief."} for row in rows[:2]])
    assert record["prompt"] == [BRIEF, U(ASKED)] and record["completions"] == ["Bonjour", "Hi"]


@pytest.mark.parametrize("preference, rewards", [(1, [1, 0]), (2, [0, 1]), (1.5, [0.5, 0.5]), (0, [0.5, 0.5]), ("1.25", [0.75, 0.25]), (None, [None, None])])
def test_17_alpaca_farm_preferences(preference, rewards):
    assert one(ASK | {"output_1": "Bonjour", "output_2": "Hi", "preference": preference, "raw_preference": 3})["rewards"] == rewards
    with pytest.raises(ListError, match="not a preference"):
        one(ASK | {"output_1": "Bonjour", "output_2": "Hi", "preference": 3})


def test_17_own_and_rrhf_rows_read_their_system_too():
    assert one({"prompt": "2+2?", "completions": ["4"], "system": "Be brief."})["prompt"] == [BRIEF, Q]
    assert one({"query": "2+2?", "responses": ["4"], "scores": [1], "history": [["Hi", "Hello"]]})["prompt"] == [Q0, A0, Q]
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
    assert record["prompt"] == template and record["meta"] == ASK


def test_17_a_mapping_joins_columns():
    row = {"task": "Translate to French", "text": "Hello", "a": ["Bonjour", "Hi"], "m1": 9, "m2": 2, "who": "Be brief.", "note": "n"}
    mapping = {"prompt": ["task", "text"], "completions": "a", "rewards": ["m1", "m2"]}
    record = one(row, mapping)
    assert record == make_record(ASKED, ["Bonjour", "Hi"], [9, 2], meta={"who": "Be brief.", "note": "n"})
    assert one(row | {"text": ""}, mapping)["prompt"] == "Translate to French"
    assert one(row, mapping | {"system": "who"})["prompt"] == [BRIEF, U(ASKED)]
    record = one(row | {"text": "x"}, {"prompt": ["task", "text"], "chosen": "a.0"} if False else mapping | {"history": "h"}) if False else record
    talk = {"h": [{"speaker": "human", "said": "Hi"}, {"speaker": "bot", "said": "Hello"}], "q": "2+2?", "a": ["4"]}
    names = {"roles": {"bot": "assistant", "human": "user"}, "keys": {"role": "speaker", "content": "said"}}
    assert one(talk, {"prompt": ["h", "q"], "completions": "a"} | names)["prompt"] == [Q0, A0, Q]


# 18: printed messages -------------------------------------------------------------------------------------------------------


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
    for text in ("[1, 2]", "['a', 'b']", "{'a': 1}", '{"a": 1}', "[INST] hi [/INST]", "[1] First", "[open('x')]", "[1, 2] sorted?"):
        assert one({"prompt": text, "completions": [text]})["prompt"] == text
        record = one(as_pandas_writes([{"prompt": text, "completion": text, "score": 1}], tmp_path / "x.csv"))
        assert record["prompt"] == text and record["completions"] == [text]
    own = make_record(json.dumps([Q]), [json.dumps([FOUR])])  # a text that reads like messages
    assert one(save_lists([own], tmp_path / "x.jsonl")) == own == one(to_rrhf([own], tmp_path / "r.jsonl"))


def test_18_nothing_is_evaluated(tmp_path):
    flag = tmp_path / "flag"
    for text in (f"[__import__('pathlib').Path('{flag}').touch()]", f"[{{'role': 'user', 'content': open('{flag}', 'w')}}]", "[" * 100_000):
        try:
            one(as_pandas_writes([{"prompt": text, "completion": "a", "score": 1}], tmp_path / "x.csv"))
        except ListError:
            pass
    assert not flag.exists()


# 19: long cells ---------------------------------------------------------------------------------------------------------


def test_19_a_cell_of_any_length(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "x" * size, "score": 1} for i, size in enumerate((10, 131_072, 131_073, 400_000))]
    limit = csv.field_size_limit()
    data, report = load_lists(as_pandas_writes(rows, tmp_path / "x.csv"), on_error="quarantine", return_report=True)
    assert len(data) == 4 and report.quarantined_rows == 0 and [len(c[0]) for c in data["completions"]] == [10, 131_072, 131_073, 400_000]
    stream = lists.read_rows(tmp_path / "x.csv")
    next(stream), next(stream)
    assert csv.field_size_limit() == limit  # also while a reading goes on
