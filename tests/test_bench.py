"""`lire bench` on a tiny policy: rows, going on, errors, and the same DPO loss as TRL's before anything is timed. About
45 seconds."""
import json
from pathlib import Path

import pytest
from tiny_policy import make_start

from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.lab import bench


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(make_start(tmp_path_factory.mktemp("policy") / "start", dropout=0.0))


def test_rows_are_written_and_not_measured_twice(tmp_path, capsys):
    out, policy = tmp_path / "cost.jsonl", str(make_start(tmp_path / "start", dropout=0.0))
    command = ["bench", "--policy", policy, "--point", "24,6,4", "--repeats", "2", "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["way"] for r in rows] == ["authors", "padded", "shared"]
    assert all(len(r["runs"]) == 2 and r["seconds"] > 0 and r["low"] <= r["seconds"] <= r["high"]
               and r["machine"]["torch"] for r in rows)
    assert all(r["peak_bytes"] > 0
               for r in rows) and rows[0]["flop_limit"] == 1 < rows[1]["flop_limit"] < rows[2]["flop_limit"]
    assert rows[2]["speedup"] == pytest.approx(rows[0]["seconds"] / rows[2]["seconds"])
    before = out.read_bytes()
    assert main(command) == 0 and out.read_bytes() == before
    assert main([*command, "--point", "8,6,2", "--no-memory"]) == 0
    assert out.read_text().startswith(before.decode()) and len(out.read_text().splitlines()) == 6
    assert main([*command, "--no-memory", "--loss", "lipo"]) == 0  # another loss is another measurement
    assert [json.loads(line)["loss"] for line in out.read_text().splitlines()] == ["lire"] * 6 + ["lipo"] * 3
    make_start(Path(policy), dropout=0.0, seed=5)  # another policy under the same name
    assert main([*command, "--no-memory"]) == 0 and len(out.read_text().splitlines()) == 12


def test_a_loss_that_is_none(policy, tmp_path, capsys):
    assert main(["bench", "--policy", policy, "--loss", "lyre", "--out", str(tmp_path / "x.jsonl")]) == 2
    error = capsys.readouterr().err.strip()
    assert "--loss" in error and "lyre" in error and "lipo" in error and "\n" not in error


@pytest.mark.parametrize("point", ["24,6", "24,0,3", "a,b,c", "1,2,3,4,5"])
def test_a_point_that_is_none(policy, tmp_path, capsys, point):
    assert main(["bench", "--policy", policy, "--point", point, "--out", str(tmp_path / "x.jsonl")]) == 2
    error = capsys.readouterr().err.strip()
    assert "--point" in error and point in error and "P,R,M" in error and "\n" not in error
    assert not (tmp_path / "x.jsonl").exists()


def test_a_results_file_that_is_none(policy, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"way": "authors"\n')
    assert main(["bench", "--policy", policy, "--point", "8,4,2", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert (
        "line 1" in capsys.readouterr().err.replace(":1", " line 1")
        and (tmp_path / "x.jsonl").read_text() == '{"way": "authors"\n'
    )


def test_trl_and_we_step_over_the_same_tokens(policy, tmp_path):
    pytest.importorskip("trl")
    texts = [("how do plants grow", " with water and light", " fast"),
             ("why", " because", " no reason at all was given")]
    steps, sizes = bench.trl_steps(policy, texts, tmp_path)  # raises where the losses differ
    assert list(steps) == ["trl", "padded", "shared"] and sizes.M == 2 and sizes.lists == 2
    rows = bench.bench_pairs(policy, texts, repeats=1)
    assert [r["way"] for r in rows] == ["dpo, trl", "dpo, padded", "dpo, shared"] and rows[0]["speedup_over_trl"] == 1.0


def test_too_little_memory_is_said(policy):
    with pytest.raises(LireError, match="measures memory failed"):
        bench.peak_growth(policy, bench.Point(P=4, R=2, M=2), "no such way")
