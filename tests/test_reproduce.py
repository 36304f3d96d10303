"""The paper's tables: every one can be made, a killed command goes on, a stored number comes out again."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lire_nb import reproduce as R
from lire_nb import tables as T
from lire_nb.cli import main
from lire_nb.experiments import code_version, run_experiment
from lire_nb.lists import LireError

ROOT = Path(__file__).resolve().parents[1]
LAPTOP = ROOT / "data" / "results"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def plain(result: dict) -> dict:
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every table at the smoke scale, and the seconds of the processor that took: other tests may run beside."""
    folder, began = tmp_path_factory.mktemp("smoke"), time.process_time()
    code = main(["reproduce", "all", "--scale", "smoke", "--jobs", "1", "--results", str(folder / "results"), "--work", str(folder / "work")])
    assert code == 0
    return folder, time.process_time() - began


def test_every_table_is_made_at_the_smoke_scale(smoke):
    folder, seconds = smoke
    assert seconds < 180
    done = R.progress_rows(folder / "results", "smoke")
    assert {row["table"]: (row["done"], row["more"]) for row in done} == {row["table"]: (row["planned"], False) for row in done}
    keys = [row["key"] for row in rows_of(folder / "results")]
    assert len(keys) == len(set(keys)) > 60
    for row in rows_of(folder / "results"):
        assert row["code"] == code_version() and row["machine"]["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])


def test_nothing_is_run_twice(smoke, capsys):
    folder, _ = smoke
    before = {p.name: p.read_bytes() for p in (folder / "results").iterdir()}
    assert main(["reproduce", "all", "--scale", "smoke", "--jobs", "1", "--results", str(folder / "results"), "--work", str(folder / "work")]) == 0
    assert "0 experiments run" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in (folder / "results").iterdir()}


def test_two_numbers_come_out_again_in_an_empty_folder(smoke, tmp_path):
    stored = [row for row in rows_of(smoke[0] / "results") if row["config"]["kind"] in ("train", "enhance")]
    for row in random.Random(0).sample(stored, 2):
        assert plain(run_experiment(row["config"], tmp_path / "work")) == plain(row["result"])


def test_a_killed_command_goes_on_with_what_is_left(smoke, tmp_path):
    """SIGKILL for the command in the middle of its runs: its workers end with it, every row is whole, and the rest is as if nothing had happened."""
    command = [sys.executable, "-m", "lire_nb.cli", "reproduce", "dialogue", "--scale", "smoke", "--seeds", "1", "--jobs", "2", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, until = tmp_path / "results" / "dialogue.jsonl", time.monotonic() + 240
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == running.pid]
    assert len(workers) == 2
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    done = kept.count(b"\n")
    with open(path, "ab") as f:
        f.write(b'{"key": "half a row')
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]
    assert path.read_bytes().startswith(kept)
    rows = rows_of(tmp_path / "results")
    assert f"{done} of {len(rows)} runs are there; {len(rows) - done} to go" in again.stdout
    uninterrupted = {row["key"]: plain(row["result"]) for row in rows_of(smoke[0] / "results")}
    assert len(rows) == len({row["key"] for row in rows}) and all(plain(row["result"]) == uninterrupted[row["key"]] for row in rows)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def test_bad_input_is_one_line(tmp_path, capsys, smoke):
    import torch

    cases = [(["poetry"], "unknown table"), (["dialogue", "--scale", "huge"], "unknown scale"), (["dialogue", "--seeds", "0"], "too few"), (["candidates", "--scale", "paper"], "paper's recipes"),
             (["cost"], "lire bench"), ([], "--list")]
    if not torch.cuda.is_available():
        cases += [(["dialogue", "--scale", "gpu"], "--scale laptop"), (["dialogue", "--scale", "paper"], "--dry-run")]
    for arguments, expected in cases:
        assert main(["reproduce", *arguments, "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]) == 2
        said = capsys.readouterr()
        assert expected in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "results").exists()


def test_results_of_other_code_do_not_count_unless_accepted(smoke, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for path in (smoke[0] / "results").iterdir():
        (tmp_path / "results" / path.name).write_text(path.read_text().replace(f'"code": "{code_version()}"', '"code": "0ld0ld0"'))
    common = ["reproduce", "sentiment", "--scale", "smoke", "--jobs", "1", "--most", "0", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert main(common) == 0
    said = capsys.readouterr().out
    assert "0ld0ld0" in said and "--accept 0ld0ld0" in said
    assert main([*common, "--accept", "0ld0ld0", "--most", "9"]) == 0
    assert "0 experiments run" in capsys.readouterr().out


def test_one_command_at_a_time_in_a_work_folder(tmp_path):
    with R._only_one(tmp_path):
        with pytest.raises(LireError, match="another lire reproduce"):
            R.reproduce(["sentiment"], "smoke", results=tmp_path / "results", work=tmp_path, jobs=1)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    good = R.plan("sentiment", "smoke")[2]
    bad = R.Run("sentiment", {**good.config, "kind": "guess"}, {"method": "start", "seed": 9})
    monkeypatch.setattr(R, "plan", lambda *a, **k: [bad, good])
    said = []
    with pytest.raises(LireError, match="1 runs failed; 1 are kept"):
        R.reproduce(["sentiment"], "smoke", results=tmp_path / "results", work=tmp_path / "work", jobs=1, say=said.append)
    assert [row["key"] for row in rows_of(tmp_path / "results")] == [good.key] and any("unknown kind" in line for line in said)


def test_the_search_budget_is_the_same_for_every_method():
    assert {len(points) for points in R.SEARCH.values()} == {3}
    assert {tuple(sorted({p["learning_rate"] for p in points[:2]})) for points in R.SEARCH.values()} == {(5e-5, 1e-4)}
    runs = [r for r in R.plan("dialogue") if r.labels["stage"] == "search"]
    assert {r.config["judge"]["split"] for r in runs} == {"validation"} and {tuple(r.config["judge"]["judges"]) for r in runs} == {("proxy",)}


@pytest.mark.parametrize("task", ["sentiment", "dialogue", "summarization"])
def test_no_prompt_that_judges_is_trained_on(task):
    from lire_nb.experiments import prompts_of, reward_lists
    from lire_nb.tasks import load_task

    loaded, sizes = load_task(task), R.SCALES["laptop"]["tasks"][task]
    ids = {split: {p["id"] for p in prompts_of(loaded, split, count)} for split, count in (("train", sizes["pool"]), ("validation", sizes["validation"]), ("test", sizes["test"]))}
    assert [len(v) for v in ids.values()] == [sizes["pool"], sizes["validation"], sizes["test"]]
    assert not ids["train"] & ids["validation"] and not ids["train"] & ids["test"] and not ids["validation"] & ids["test"]
    texts = {name: {c for r in reward_lists(loaded, name)[0] for c in r["completions"]} for name in ("proxy", "gold")}
    assert not texts["proxy"] & texts["gold"]


# The stored results.


def test_stored_rows_are_what_their_key_says():
    rows = [row for row in rows_of(LAPTOP) if "key" in row]
    assert rows
    for row in rows:
        assert row["key"] == R.config_key(row["config"]) and row["code"] and row["machine"]["torch"] and "seed" in {**row["config"], **row["config"].get("rewards", {}).get(row["config"].get("task"), {})}
        for part in [row["result"], *row["result"].get("rounds", []), *row["result"].get("points", [])]:
            for judge, values in part.get("scores", {}).items():
                assert np.isfinite(np.array(values)).all() and len(values) == len(part["tokens"]), (row["key"], judge)


def test_intervals_cover_what_they_should():
    """Student's interval where only prompts or only seeds vary; the full count is in the notebook."""
    draw = np.random.default_rng(0)
    hits = sum(i.low <= 0 <= i.high for i in (T.crossed_interval(draw.normal(size=(1, 40)) + draw.normal(0, 0.5, (3, 1)) + draw.normal(size=(3, 40))) for _ in range(400)))
    assert hits >= 0.9 * 400


def test_a_difference_needs_common_seeds_and_prompts(smoke):
    systems = T.systems_of(T.load_runs("sentiment", smoke[0] / "results", "smoke"))
    other = T.systems_of(T.load_runs("dialogue", smoke[0] / "results", "smoke"))
    with pytest.raises(LireError, match="2 sets of prompts"):
        T.difference(systems["LIRE"], other["start"])
    with pytest.raises(LireError, match="0 common seeds"):
        T.difference(systems["LIRE"], systems["start"].assign(seed=7))
    gain = T.difference(systems["LIRE"], systems["start"])
    back = T.difference(systems["start"], systems["LIRE"])
    assert gain.value == pytest.approx(-back.value) and gain.low == pytest.approx(-back.high)
