"""One, two and three processes: the same candidates, scores, metrics and weights; an error of one ends all; a killed
one loses nothing that was finished."""
import json
import os
from pathlib import Path

import pytest
import torch
import warm
from tiny_policy import make_start

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def run(place: Path, count: int, what: str, **env) -> list[dict]:
    "What each of some processes found."
    warm.ranks(count, HERE / "share_processes.py", place, what, env={**ENV, **env}, timeout=120)
    found = [place / f"{what}-{count}-{rank}.json" for rank in range(count)]
    return [json.loads(path.read_text()) if path.exists() else None for path in found]


def make_encoder(folder: Path, start: Path) -> None:
    "A random BERT with dropout, for the letters of the tiny policy."
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    BertForSequenceClassification(BertConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    make_start(place / "start", dropout=0.0)
    make_start(place / "start-dropout")
    make_encoder(place / "bert", place / "start")
    return place


@pytest.fixture(scope="module")
def found(place) -> dict[int, list[dict]]:
    return {count: run(place, count, "whole_round,pieces,fails") for count in (1, 3)}


def close(a, b, where="") -> None:
    "Equal texts, numbers within 1e-5."
    assert type(a) is type(b) or {type(a), type(b)} == {int, float}, (where, a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys(), (where, a.keys() ^ b.keys())
        [close(a[k], b[k], f"{where}.{k}") for k in a]
    elif isinstance(a, list):
        assert len(a) == len(b), where
        [close(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))]
    else:
        assert a == b or isinstance(a, float) and abs(a - b) < 1e-5 * max(1, abs(a)), (where, a, b)


def rows(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_is_the_same_on_three_processes(found, place):
    """Candidates, rewards of a model that was fitted in the round, weights and log, the stop rule, the evaluation.
    ranks_matrix.py does it on two as well."""
    from safetensors.torch import load_file

    one, many = place / "run-1", place / "run-3"
    files = {p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()}
    assert {p.relative_to(many).as_posix() for p in many.rglob("*") if p.is_file()} == files
    for name in ("round-1/candidates.jsonl", "round-1/lists.jsonl", "evaluation/start.jsonl", "evaluation/lire.jsonl",
                 "metrics.jsonl"):
        close(rows(one / name), rows(many / name), name)
    close(json.loads((one / "stop.json").read_text()), json.loads((many / "stop.json").read_text()), "stop")
    for name in ("round-1/policy/model.safetensors", "round-1/reward/model.safetensors"):
        a, b = load_file(one / name), load_file(many / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
    assert all(rank["whole_round"]["worked"] > 0 for rank in found[3])  # every process sampled


def test_whole_batches_are_the_same_bit_for_bit(found):
    one, many = found[1][0]["pieces"], [rank["pieces"] for rank in found[3]]
    assert all(rank["lists"] == one["lists"] for rank in many)
    for name in ("rewards", "history", "weights", "none", "seen"):  # dropout and a latent that draws
        [close(one[name], rank[name], name) for rank in many]
    assert all(rank["weights"] == many[0]["weights"] for rank in many)
    assert one["lists"][-1]["completions"] != one["lists"][0]["completions"]  # a prompt that comes twice


def test_an_error_of_one_is_the_error_of_all(found):
    said = [rank["fails"] for rank in found[3]]
    assert {s["one"][0] for s in said} == {found[1][0]["fails"]["one"][0]} and "list 'g3'" in said[0]["one"][0]
    assert len({s["each"][0] for s in said}) == 1 and "process" in said[0]["each"][0]
    assert all(seconds < 5 for s in said for _, seconds in s.values())


def test_a_killed_process_loses_nothing(place):
    """Process 1 of two dies without a word; one goes on after what is kept, to the bytes of a run alone."""
    alone = run(place, 1, "killed", RUN="alone")[0]["killed"]
    first, dead = run(place, 2, "killed", RUN="died", DIES="1")
    assert dead is None and "process 1 of this launch: has ended without a word" in first["killed"]["error"]
    kept = [row for p in (place / "died").rglob("rank-*.jsonl") for row in rows(p)]
    again = run(place, 1, "killed", RUN="died")[0]["killed"]
    assert kept and again["worked"] == alone["worked"] - len(kept)
    for name in ("candidates.jsonl", "lists.jsonl"):
        assert (place / "died/round-1" / name).read_bytes() == (place / "alone/round-1" / name).read_bytes()
    assert not list((place / "died").rglob("*.parts"))
