"""What lies on the disk is what was in memory: records, reports, identities, token ids, weights."""
import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from many_lists import write_lists
from tiny_policy import make_start

from lire_nb import enhancement, logprobs, many_lists, rewards, training
from lire_nb.enhancement import train_policy
from lire_nb.identity import lists_identity
from lire_nb.lists import load_lists
from lire_nb.logprobs import dataset_logps, reference_logps
from lire_nb.many_lists import table_on_disk
from lire_nb.models import load_policy, load_tokenizer
from lire_nb.records import lists_dataset, make_record, turns_text
from lire_nb.rewards import score_lists
from lire_nb.training import check_teaching, LIREConfig, prepare_lists

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = [" good", " bad", " dull and long", " fine"]
LISTS = [make_record(f"film {n % 9} was", WORDS[: 2 + n % 3], [1.0, -0.5, None, 0.25][: 2 + n % 3], id=f"{n % 9}-{n:02}",
                     sources=["policy", "human", "human", "policy"][: 2 + n % 3]) for n in range(23)]
TALK = [{"role": role, "content": text} for role, text in (("assistant", "good"), ("user", "why"), ("assistant", "so"))]
TALKS = [make_record([{"role": "user", "content": "film"}], [turns_text(TALK), "bad"], [1.0, 0.0], id=f"t{n}",
                     meta={"turns": [TALK, None]}) for n in range(2)]
TEMPLATE = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
SETTINGS = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_prompt_length=8,
                max_completion_length=6)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return make_start(tmp_path_factory.mktemp("many") / "start", dropout=0.1)


@pytest.fixture
def on_disk(monkeypatch):
    """Everything goes to the disk, whatever its size."""
    def switch(on: bool = True):
        monkeypatch.setattr(many_lists, "IN_MEMORY", 0 if on else 2**26)
        for module in (training, enhancement):
            monkeypatch.setattr(module, "MANY", 1 if on else 2**60)
    return switch


def test_a_file_of_lists_with_bad_and_double_rows(tmp_path, on_disk):
    path, found = tmp_path / "lists.jsonl", []
    rows = [json.dumps(r) for r in (*LISTS, LISTS[3], {**LISTS[4], "completions": [" more", " less"], "rewards": [1, 2],
                                                      "sources": ["x", "y"]})]
    path.write_text("\n".join([*rows[:5], '{"id": "broken"', *rows[5:], json.dumps({**LISTS[5], "prompt": "other"})]) + "\n")
    for on in (False, True):
        on_disk(on)
        lists, report = load_lists(path, on_error="quarantine", return_report=True)
        put = Path(f"{path}.quarantine.jsonl").read_text()
        found.append(([dict(r) for r in lists], report, put, lists._fingerprint, lists_identity(lists)))
    assert found[0] == found[1]
    report = found[0][1]
    assert (report.duplicates, report.quarantined_rows, report.lists) == (1, 2, 24)


@pytest.mark.parametrize("lists, more", [(LISTS, {}), (LISTS, {"demo_weight": 0.1, "optimism": 0.1}), (TALKS, {})],
                         ids=["plain", "terms", "conversations"])
def test_token_ids_of_both_ways(start, tmp_path, on_disk, caplog, lists, more):
    tokenizer, found = load_tokenizer(start), []
    tokenizer.chat_template = TEMPLATE if lists is TALKS else None
    data = lists_dataset({**r, "meta": {**r["meta"], "token_ids": [[1], *[None] * (len(r["completions"]) - 1)],
                                        "tokenizer": "another"}} if lists is LISTS else r for r in lists)
    limits = {} if lists is LISTS else {"max_completion_length": 60, "max_prompt_length": 60}
    args = LIREConfig(str(tmp_path), **{**SETTINGS, **limits, **more})
    for on in (False, True, True):
        on_disk(on)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_teaching(data, args)
            prepared = prepare_lists(data, tokenizer, args, context=128)
        found.append(([dict(r) for r in prepared], set(prepared.column_names), caplog.messages))
    assert found[0] == found[1] == found[2]
    assert lists is TALKS or any("cut to the length limits" in m for m in found[2][2])  # said again by the second run
    assert lists is TALKS or any("drawn as other tokens" in m for m in found[2][2])
    assert len(list(tmp_path.glob(".tokens/*.arrow"))) == 1
    other = prepare_lists(data, tokenizer, LIREConfig(str(tmp_path), **{**SETTINGS, **limits, **more,
                                                                       "max_completion_length": 59}))
    assert len(list(tmp_path.glob(".tokens/*.arrow"))) == 2 and len(other) == len(data)


def test_weights_of_both_ways_and_nothing_left(start, tmp_path, on_disk):
    data, found = lists_dataset(reversed(LISTS)), []
    for on in (False, True):
        on_disk(on)
        for loss in ("lire", "dpo"):
            folder = train_policy(start, data, tmp_path / f"{loss}-{on}", loss_type=loss, max_steps=3, learning_rate=1e-3,
                                  on_mute_lists="warn", **{k: v for k, v in SETTINGS.items() if k != "report_to"})
            found.append([(folder / name).read_bytes() for name in ("model.safetensors", "training.jsonl")])
            assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.partial")) and not list(folder.glob(".*"))
    assert found[:2] == found[2:] and found[0] != found[1]


def test_two_processes_of_a_machine_make_it_once(tmp_path):
    """Both ask at the same time; one makes it, while the other waits."""
    from datasets import Features, Value

    def rows():
        with open(tmp_path / "made", "a") as f:
            f.write(f"{os.getpid()}\n")
        yield from ({"n": n} for n in range(5000))

    children = []
    for _ in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                found = table_on_disk(tmp_path / "rows.arrow", rows(), Features({"n": Value("int64")}))
                code = 0 if found[4999]["n"] == 4999 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "made"] == ["rows.arrow"]


def test_memory_does_not_grow_with_the_lists(tmp_path, on_disk):
    """What Arrow holds in memory, at 300 and at 3,000 lists."""
    import pyarrow as pa

    on_disk()
    held = {}
    for count in (300, 3000):
        write_lists(tmp_path / "lists.jsonl", count, (6, 2))
        before = pa.total_allocated_bytes()
        lists = load_lists(tmp_path / "lists.jsonl")
        held[count] = pa.total_allocated_bytes() - before, lists.data.nbytes
        del lists
    assert held[3000][1] > 9 * held[300][1] and held[3000][0] < held[300][0] + held[3000][1] / 20, held


def test_scores_pools_and_log_probs_are_made_a_part_at_a_time(start, tmp_path, monkeypatch):
    "The same as in one go, and no list is read before its turn."
    read, asked = [], []

    def length(prompts, texts):
        asked.append((len(read), len(texts)))
        return [float(len(text)) for text in texts]

    def coming():
        for record in LISTS:
            read.append(record["id"])
            yield record

    model, tokenizer = load_policy(start, device="cpu")
    older = [{**r, "completions": [" older", " good"], "rewards": [7.0, 8.0], "sources": ["x", "x"]} for r in LISTS[::2]]
    make = lambda: ([dict(r) for r in score_lists(coming(), length)],  # noqa: E731
                    [dict(r) for r in score_lists(enhancement._joined(lists_dataset(older), LISTS, True), length)],
                    reference_logps(model, tokenizer, LISTS, tmp_path), dataset_logps(model, tokenizer, LISTS))
    whole = make()
    assert asked[0] == (23, sum(len(r["completions"]) for r in LISTS))
    assert whole[1] == [dict(r) for r in score_lists(enhancement._joined(older, LISTS, True), length)]
    read.clear(), asked.clear()
    for module in (rewards, logprobs):
        monkeypatch.setattr(module, "_LISTS", 4)
    for kept in tmp_path.glob("reference-*"):
        kept.unlink()
    sizes, measured = [], logprobs._measured
    monkeypatch.setattr(logprobs, "_measured", lambda model, tokens, *rest: sizes.append(len(tokens)) or measured(
        model, tokens, *rest))
    parts = make()
    assert sizes == [4, 4, 1] + [4, 4, 4, 4, 4, 3]  # nine different lists, and all
    assert [count for count, _ in asked[:6]] == [4, 8, 12, 16, 20, 23]
    assert parts[:2] == whole[:2]
    for some, all_ in zip(parts[2], whole[2]):
        assert some == pytest.approx(all_, rel=1e-6)
    assert [counts for _, counts in parts[3]] == [counts for _, counts in whole[3]]


def test_a_full_disk_is_one_line(tmp_path, on_disk, monkeypatch):
    from lire_nb.base.errors import LireError

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    on_disk()
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(LireError, match="No space left on device.*remedy"):
        lists_dataset(LISTS)
