"""The paper's tables: every one can be made, a killed command goes on, a stored number comes out again."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import warm
from yardstick import import_seconds

from lire_nb import statistics
from lire_nb.base.errors import LireError
from lire_nb.cli import main
from lire_nb.lab import again, claims, plans, protocol, results, runner
from lire_nb.lab.experiments import run_experiment
from lire_nb.lab.plans import code_version

ROOT = Path(__file__).resolve().parents[1]
LAPTOP = ROOT / "data" / "results"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().split(b"\n")
            if line]


def files_of(folder: Path) -> dict[Path, bytes]:
    "Rows, and the texts that lie beside them."
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain(result: dict) -> dict:
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every table at the smoke scale, and the seconds of the processor that took: other tests may run beside."""
    from lire_nb import models

    folder, began = tmp_path_factory.mktemp("smoke"), time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        # read once from each folder; the killed command below reads each anew, and its numbers are the same
        patch.setattr(models, "load_tokenizer", cache(models.load_tokenizer))
        code = main(["reproduce", "all", "--scale", "smoke", "--jobs", "1", "--results", str(folder / "results"),
                     "--work", str(folder / "work")])
    assert code == 0
    return folder, time.process_time() - began


def test_every_table_is_made_at_the_smoke_scale(smoke):
    folder, seconds = smoke
    # processor time of 63 experiments: 180 s where an import takes 3 to 4, 290 s where it takes 8
    assert seconds < 50 * import_seconds()
    done = runner.progress_rows(folder / "results", "smoke")
    assert {row["table"]: (row["done"], row["more"]) for row in done} == {row["table"]: (row["planned"], False)
                                                                          for row in done}
    keys = [row["key"] for row in rows_of(folder / "results")]
    assert len(keys) == len(set(keys)) > 50
    for row in rows_of(folder / "results"):
        assert row["code"] == code_version(row["config"]["kind"]) and row["machine"]["torch"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])


def test_nothing_is_run_twice(smoke, capsys):
    folder, _ = smoke
    before = files_of(folder / "results")
    assert main(["reproduce", "all", "--scale", "smoke", "--jobs", "1", "--results", str(folder / "results"), "--work",
                 str(folder / "work")]) == 0
    assert "0 experiments run" in capsys.readouterr().out
    assert before == files_of(folder / "results") and any("texts" in path.parts for path in before)


def test_two_numbers_come_out_again_in_an_empty_folder(smoke, tmp_path):
    stored = [row for row in rows_of(smoke[0] / "results") if row["config"]["kind"] in ("train", "enhance")]
    for row in random.Random(0).sample(stored, 2):
        assert plain(run_experiment(row["config"], tmp_path / "work")) == plain(row["result"])


def test_stored_rows_are_run_again_by_a_command(smoke, tmp_path, capsys):
    """Rows with texts and rows without come out the same in an empty folder; a row that somebody changed does not, and
    what is said of it is what was changed."""
    rows = [row for row in rows_of(smoke[0] / "results") if row["table"] == "matched_sentiment"]
    first, second = random.Random(0).sample([row for row in rows if row["config"]["kind"] == "trial"], 2)
    shutil.copytree(smoke[0] / "results", tmp_path / "results")
    path = tmp_path / "results" / "matched_sentiment.jsonl"
    changed = json.loads(json.dumps(second))
    changed["result"]["points"][-1]["scores"]["gold"][0][0] += 2.0
    path.write_text("".join(json.dumps(row) + "\n" for row in [*(r for r in rows if r != second), changed]))
    texts = tmp_path / "results" / "texts" / f"{second['key']}.parquet"
    frame = pd.read_parquet(texts)
    frame.loc[0, "completion"] += " and more"
    frame.to_parquet(texts)
    command = ["reproduce", "matched_sentiment", "--scale", "smoke", "--results", str(tmp_path / "results")]
    assert main([*command, "--again", f"{first['key']}, {second['key']}", "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert "the same, all" in said and "1 of 2 rows came out the same" in said and "of the texts; no judge's" in said
    same, other = again.again_table(tmp_path / "results").to_dict("records")
    scores = np.array(changed["result"]["points"][-1]["scores"]["gold"])
    assert (same["other"], same["other texts"], other["other"]) == (0, 0, 1) and not same["drawn"]
    assert other["means apart"] == pytest.approx(2.0 / scores.size / scores.std())
    assert other["other texts"] == pytest.approx(1 / len(frame))
    before = files_of(tmp_path / "results")
    for asked, expected in ((["--again", "0"], "1 to "), (["--again", "x1"], "no stored row has this key"),
                            (["--again", "1", "--list"], "exclude each other"),
                            (["--again", "1", "--policy", "smollm2"], "is not used by --again"),
                            (["--again", "1", "--most", "0"], "--most: is not used by --again"),
                            (["--again", "1", "--work", "w"], "--work: is not used by --again")):
        assert main([*command, *asked]) == 2 and expected in capsys.readouterr().err
    texts.write_bytes(b"no parquet")
    assert main([*command, "--again", second["key"]]) == 2 and "restore the file" in capsys.readouterr().err
    texts.write_bytes(before[texts])
    assert before == files_of(tmp_path / "results")  # what was run again is no row, and nothing was begun


def test_what_stops_or_fails_on_the_second_way_is_said(smoke, tmp_path, monkeypatch, capsys):
    shutil.copytree(smoke[0] / "results", tmp_path / "results")
    rows = [row for row in rows_of(tmp_path / "results") if row["table"] == "sentiment"][:3]
    ways = iter([lambda row: row["result"], lambda row: 1 / 0, lambda row: row["result"]])
    stored = {json.dumps(row["config"], sort_keys=True): row for row in rows}
    monkeypatch.setattr(runner, "run_experiment", lambda config, *rest: next(ways)(
        stored[json.dumps(config, sort_keys=True)]))
    keys = [row["key"] for row in rows]
    command = ["reproduce", "sentiment", "--scale", "smoke", "--jobs", "1", "--results", str(tmp_path / "results")]
    assert main([*command, "--again", ",".join(keys)]) == 2
    said = capsys.readouterr()
    assert said.out.count("the same") == 2 and f"then --again {keys[1]}" in said.err
    lines = rows_of_file(tmp_path / "results" / "again" / "sentiment.jsonl")
    assert [line["key"] for line in lines] == [keys[0], keys[2], keys[1]]  # what failed is told at the end
    assert "ZeroDivisionError" in lines[2]["failed"]
    assert again.again_table(tmp_path / "results")["values"].isna().tolist() == [False, False, True]
    monkeypatch.setattr(runner, "run_experiment", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*command, "--again", ",".join(keys[:2])]) == 130
    assert f"0 of 2 rows were compared; --again {','.join(keys[:2])} runs the rest" in capsys.readouterr().err


def rows_of_file(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stored,now,other", [
    ({"a": [[1, 2], [3]]}, {"a": [[1], [2, 3]]}, 3), ({"a": [1, 2]}, {"a": [1, 2]}, 0), ({"a": [True]}, {"a": [1]}, 1),
    ({"a": [float("nan")]}, {"a": [float("nan")]}, 0), ({"a": 1}, {"a": [1]}, 2), ({}, {"a": {}}, 1), ({}, {}, 0),
    ({"a": []}, {}, 1), ({"seconds": {"total": 3}}, {"seconds": {"total": 4}}, 0), ({"a": {"seconds": 1}}, {"a": {}}, 2),
    ({"p": [{"x": [1]}, {"x": [2]}]}, {"p": [{"x": [1]}]}, 1), ({"a": 1.0}, {"a": None}, 1)])
def test_unlike_results_are_told_apart(stored, now, other):
    assert again.differences(stored, now)["other"].sum() == other


def test_the_scale_of_the_paper_is_not_run_again(tmp_path):
    with pytest.raises(LireError, match="is not run again"):
        again.run_again("dialogue", scale="paper", results=tmp_path)


def test_a_mean_that_cannot_be_compared_is_named():
    stored = {"scores": {"gold": [[1.0], [1.0]], "proxy": [[0.0], [2.0]], "linear": [[1.0], [3.0]]}}
    now = {"scores": {"gold": [[50.0], [60.0]], "proxy": [[0.0], [3.0]]}}
    found = again._compared({**stored}, None, now)
    assert found["apart"] == pytest.approx(0.5) and found["not_comparable"] == ["scores.gold", "scores.linear"]
    kept = {(1, "p", 0): ("\"p\"", "a b", [1, 2]), (1, "p", 1): ("\"p\"", "c", [3])}
    point = {"step": 1, "ids": ["p"], "prompts": ["p"], "completions": [["a b"]], "token_ids": [[[1, 2]]]}
    for points, share in (([point], 0.5), ([{**point, "token_ids": [[[1, 9]]]}], 1.0), (None, 1.0)):
        assert again._other_texts(kept, points) == share


def test_a_killed_command_goes_on_with_what_is_left(smoke, tmp_path, capsys):
    """SIGKILL for the command in the middle of its runs: its workers end with it, every row is whole, and the rest is
    as if nothing had happened."""
    command = ["reproduce", "dialogue", "--scale", "smoke", "--seeds", "1", "--results", str(tmp_path / "results"),
               "--work", str(tmp_path / "work")]
    running = warm.start("lire_nb.cli", *command, "--jobs", "2", cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    path, until = tmp_path / "results" / "dialogue.jsonl", time.monotonic() + 240
    while not (path.exists() and path.read_bytes().count(b"\n") >= 4):
        assert running.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == running.pid]
    assert len(workers) == 2
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    done = kept.count(b"\n")
    with open(path, "ab") as f:
        f.write(b'{"key": "half a row')
    assert main([*command, "--jobs", "1"]) == 0  # it need not go on as it began
    said = capsys.readouterr().out
    assert not [w for w in workers if Path(f"/proc/{w}").exists()]
    assert path.read_bytes().startswith(kept)
    rows = rows_of(tmp_path / "results")
    assert f"{done} of {len(rows)} runs are there; {len(rows) - done} to go" in said
    uninterrupted = {row["key"]: plain(row["result"]) for row in rows_of(smoke[0] / "results")}
    assert len(rows) == len({row["key"] for row in rows}) and all(plain(row["result"]) == uninterrupted[row["key"]]
                                                                  for row in rows)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return -1


def test_bad_input_is_one_line(tmp_path, capsys, smoke):
    import torch

    cases = [(["poetry"], "unknown table"), (["dialogue", "--scale", "huge"], "unknown scale"),
             (["dialogue", "--seeds", "0"], "too few"), (["candidates", "--scale", "paper"], "paper's recipes"),
             (["cost"], "lire bench"), ([], "--list")]
    if not torch.cuda.is_available():
        cases += [(["dialogue", "--scale", "gpu"], "--scale laptop"), (["dialogue", "--scale", "paper"], "--dry-run")]
    for arguments, expected in cases:
        assert main(["reproduce", *arguments, "--results", str(tmp_path / "results"), "--work",
                     str(tmp_path / "work")]) == 2
        said = capsys.readouterr()
        assert expected in said.err and said.err.count("\n") == 1, said.err
    assert not (tmp_path / "results").exists()


def test_results_of_other_code_do_not_count_unless_accepted(smoke, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for path in (smoke[0] / "results").glob("*.jsonl"):
        (tmp_path / "results" / path.name).write_text(re.sub(r'"code": "[0-9a-f]{7}"', '"code": "0ld0ld0"',
                                                             path.read_text()))
    common = ["reproduce", "sentiment", "--scale", "smoke", "--jobs", "1", "--results", str(tmp_path / "results"),
              "--work", str(tmp_path / "work")]
    assert main([*common, "--most", "0"]) == 0
    said = capsys.readouterr().out
    assert "0ld0ld0" in said and "--accept 0ld0ld0" in said
    assert main(["reproduce", "--list", "--scale", "smoke", "--results", str(tmp_path / "results")]) == 0
    assert "rows of other code: --accept 0ld0ld0" in capsys.readouterr().out
    assert main(["reproduce", "--list", "--scale", "smoke", "--accept", "0ld0ld0", "--results",
                 str(tmp_path / "results")]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sentiment ")]
    assert len(listed) == 1 and re.search(r" (\d+) of +\1  runs", listed[0]) and "other code" not in listed[0]
    path = tmp_path / "results" / "sentiment.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # one is missing
    assert main([*common, "--accept", "0ld0ld0"]) == 0
    assert "1 experiments run" in capsys.readouterr().out
    assert [row["code"] for row in rows_of(tmp_path / "results")
            if row["table"] == "sentiment"].count(code_version("train")) == 1


def test_one_command_at_a_time_in_a_work_folder(tmp_path):
    (tmp_path / "holder.py").write_text(f"import time; from lire_nb.lab import runner\n"
                                        f"with runner._only_one({str(tmp_path)!r}):\n"
                                        "    print('held', flush=True); time.sleep(60)")
    with warm.start(tmp_path / "holder.py", cwd=tmp_path, env=dict(os.environ)) as other:
        while "held" not in other.said()[0]:
            assert other.poll() is None, other.said()
            time.sleep(0.01)
        with pytest.raises(LireError, match="another lire reproduce"):
            runner.reproduce(["sentiment"], "smoke", results=tmp_path / "results", work=tmp_path, jobs=1)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    good = plans.plan("sentiment", "smoke")[2]
    bad = plans.Run("sentiment", {**good.config, "kind": "guess"}, {"method": "start", "seed": 9})
    monkeypatch.setattr(runner, "plan", lambda *a, **k: [bad, good])
    said = []
    with pytest.raises(LireError, match="1 runs failed; 1 are kept"):
        runner.reproduce(["sentiment"], "smoke", results=tmp_path / "results", work=tmp_path / "work", jobs=1,
                         say=said.append)
    assert [row["key"] for row in rows_of(tmp_path / "results")] == [good.key]
    assert any("unknown kind" in line for line in said)


def test_a_worker_that_dies_is_said_and_the_others_go_on(tmp_path, monkeypatch):
    """A process that is killed, as by a machine out of memory, costs its own run only."""
    monkeypatch.setattr(runner._Workers, "_start",
                        lambda self: subprocess.Popen([sys.executable, "-c", DYING], stdin=subprocess.PIPE,
                                                      stdout=subprocess.PIPE, text=True))
    runs, done = [plans.Run("toy", {"kind": "train", "seed": n}, {"seed": n}) for n in range(6)], []
    failed = runner._Workers(2, 1, tmp_path / "log").map(
        runs, tmp_path, lambda run, result: done.append(run.labels["seed"]))
    assert sorted(done) == [0, 1, 2, 4, 5] and [run.labels["seed"] for run, _ in failed] == [3]
    assert "its process ended" in failed[0][1]


def test_a_worker_with_other_code_is_refused(tmp_path, monkeypatch):
    changed = DYING.replace('"result": {}', '"result": {}, "code": "0ther"')
    monkeypatch.setattr(runner._Workers, "_start",
                        lambda self: subprocess.Popen([sys.executable, "-c", changed], stdin=subprocess.PIPE,
                                                      stdout=subprocess.PIPE, text=True))
    failed = runner._Workers(1, 1, tmp_path / "log").map(
        [plans.Run("toy", {"seed": 0})], tmp_path, lambda run, result: pytest.fail("taken"))
    assert "code was changed" in failed[0][1]


DYING = """
import json, os, sys
for line in sys.stdin:
    if json.loads(line)["config"]["seed"] == 3:
        os.kill(os.getpid(), 9)
    print(json.dumps({"result": {}}), flush=True)
"""


def test_rows_survive_odd_letters_and_half_lines(tmp_path):
    """A line separator inside a text is no end of a row, and a write cut in the middle of a letter is no error."""
    run, about = plans.Run("toy", {"seed": 0}), {"date": "2026-01-01"}
    results.Results(tmp_path).append(run, {"text": "one\u2028two\x85three é"}, about)
    with open(tmp_path / "toy.jsonl", "ab") as f:
        f.write('{"key": "é'.encode()[:-1])
    again = results.Results(tmp_path)
    assert again.find(run.config) == {"text": "one\u2028two\x85three é"}
    again.append(plans.Run("toy", {"seed": 1}), {}, about)
    assert len(rows_of(tmp_path)) == 2


def invented(gold: dict, seeds: int = 3, prompts: int = 40):
    """Runs of systems whose gold reward is known: mean, and noise around it."""
    draw, rows = np.random.default_rng(0), []
    base = draw.normal(size=(seeds, prompts))
    for labels, mean in gold.items():
        for seed in range(seeds):
            values = (base[seed] + mean + draw.normal(0, 0.1, prompts)).tolist()
            rows.append({**dict(labels), "seed": seed, "key": f"{labels}{seed}", "table": "toy",
                         "config": {"training": {"temperature": 20.0}},
                         "result": {"ids": "same", "scores": {j: [[v] for v in values] for j in ("gold", "proxy")},
                                    **{k: [[1.0]] * prompts for k in ("tokens", "logps", "start_logps")}}})
    return claims.pd.DataFrame(rows)


@pytest.mark.parametrize("dpo, seeds, expected",
                         [(0.0, 6, "supported"), (1.0, 6, "contradicted"), (0.5, 6, "tie"), (0.0, 4, "too few seeds"),
                          (None, 6, "not measured")])
def test_verdicts_follow_the_numbers(monkeypatch, dpo, seeds, expected):
    """LIRE at 0.5 against opponents below, above, as good, with four seeds, and missing."""
    means = {(("method", "start"),): 0.0, (("method", "lire"),): 0.5, (("method", "rrhf"),): 0.1,
             **({(("method", "dpo"),): dpo} if dpo is not None else {})}
    monkeypatch.setattr(claims, "load_runs", lambda table, results: invented(means, seeds))
    family = [claims.Claim(f"LIRE beats {other}", "us", "toy", partial(claims._against, "toy", other))
              for other in ("dpo", "rrhf")]
    found = claims.measure_claims(family, LAPTOP)
    one = found["LIRE beats dpo"]
    assert one.verdict == expected and one.sentence.startswith(f"LIRE beats dpo: {expected}")
    assert found["LIRE beats rrhf"].verdict == ("supported" if seeds == 6 else "too few seeds")
    assert len(one.table()) == (0 if dpo is None else 1)


def test_a_claim_is_harder_to_decide_in_company(monkeypatch):
    """Holm's correction counts the claims of the same page and family, and no others."""
    draw = np.random.default_rng(4)
    near = np.array([0.05, 0.5, 0.2, 0.45, 0.1, 0.3, 0.02, 0.4])
    make = lambda n, values, family="": claims.Claim(  # noqa: E731
        n, "us", "toy", lambda results: [claims._deciding("d", values)], family)
    others = [make(f"noise {k}", draw.normal(0, 0.3, 8), family="others") for k in range(40)]
    apart = claims.measure_claims([make("near", near), *others], LAPTOP)
    together = claims.measure_claims([make("near", near, "others"), *others], LAPTOP)
    assert (apart["near"].verdict, together["near"].verdict) == ("supported", "undecided")
    assert "seeds would decide it" in together["near"].sentence and together["near"].needed > 8


def test_a_trend_is_the_slope_of_each_seed(monkeypatch):
    means = {(("setting", ""), ("value", ""), ("method", "start")): 0.0,
             **{(("setting", "temperature"), ("value", t), ("method", "lire")): 0.3 * np.log10(t)
                for t in (2.0, 5.0, 10.0, 20.0)}}
    monkeypatch.setattr(claims, "load_runs", lambda table, results: invented(means, 6))
    slope, = claims._temperature(False, None)
    unit = claims.spread_of(invented(means, 6).query("method == 'start'"))
    assert slope.seeds == 6 and slope.interval.value == pytest.approx(0.3 / unit, abs=0.05)


def test_every_claim_can_be_decided(smoke, monkeypatch):
    """At the smoke scale nothing is decided, but every measurement finds its rows; a trend along T has one T there."""
    store = results.Results(smoke[0] / "results")
    monkeypatch.setattr(claims, "load_runs", partial(results.load_runs, scale="smoke"))
    monkeypatch.setitem(claims.SCALES, "laptop", plans.SCALES["smoke"])
    found = claims.measure_claims(claims.CLAIMS, store)
    assert {m.verdict for text, m in found.items()} == {"too few seeds", "not measured"}
    assert {text for text, m in found.items() if m.verdict == "not measured"} == {text for text in found
                                                                                   if "gains with T" in text}
    table = claims.verdict_table(store)
    assert [text for text in table.index if text] == [claim.text for claim in claims.claims_now(store)]
    assert list(table.columns) == ["said by", "quantity", "value [low, high]", "seeds", "verdict", "page"]
    matched = claims.measure_claims([c for c in claims.matched_claims() if c.table == "matched_sentiment"], store)
    assert matched["LIRE gains more than DPO at equal distance, sentiment"].verdict in ("too few seeds", "not measured")


def test_every_claim_has_its_numbers():
    """From the rows that are committed: no claim but the protocol's waits for a row, and every cell is short."""
    waiting = {claim.text for claim in claims.matched_claims()}
    for text, found in claims.measure_claims(claims.claims_now(LAPTOP), LAPTOP).items():
        if found.verdict == "not measured":
            assert text in waiting and "still to be run" in found.sentence
            continue
        assert len(found.table()) and found.verdict in figures_verdicts(), text
        assert len(found.sentence.split()) <= 35, found.sentence
    table = claims.verdict_table(LAPTOP, beside=True)
    assert table.map(lambda cell: len(str(cell).split()) <= 15 and not str(cell).endswith(".")).all(axis=None)


def figures_verdicts() -> set[str]:
    from lire_nb.lab.figures import VERDICT_COLORS

    return VERDICT_COLORS.keys() - {"not measured"}


def test_the_search_budget_is_the_same_for_every_method():
    assert {len(points) for points in plans.SEARCH.values()} == {3}
    assert {tuple(sorted({p["learning_rate"] for p in points[:2]}))
            for points in plans.SEARCH.values()} == {(5e-5, 1e-4)}
    runs = [r for r in plans.plan("dialogue") if r.labels["stage"] == "search"]
    assert {r.config["judge"]["split"] for r in runs} == {"validation"} and {tuple(r.config["judge"]["judges"])
                                                                             for r in runs} == {("proxy",)}


@pytest.mark.parametrize("task", ["sentiment", "dialogue", "summarization"])
def test_no_prompt_that_judges_is_trained_on(task):
    from lire_nb.lab.experiments import prompts_of, reward_lists
    from lire_nb.tasks import load_task

    loaded, sizes = load_task(task), plans.SCALES["laptop"]["tasks"][task]
    ids = {split: {p["id"] for p in prompts_of(loaded, split, count)}
           for split, count in (("train", sizes["pool"]), ("validation", sizes["validation"]), ("test", sizes["test"]))}
    assert [len(v) for v in ids.values()] == [sizes["pool"], sizes["validation"], sizes["test"]]
    assert not ids["train"] & ids["validation"] and not ids["train"] & ids["test"]
    assert not ids["validation"] & ids["test"]
    texts = {name: {c for r in reward_lists(loaded, name)[0] for c in r["completions"]} for name in ("proxy", "gold")}
    assert not texts["proxy"] & texts["gold"]


# The stored results.


def test_stored_rows_are_what_their_key_says():
    rows = [row for row in rows_of(LAPTOP) if "key" in row]
    assert rows
    for row in rows:
        config = row["config"]
        assert row["key"] == plans.config_key(config) and row["code"] and row["machine"]["torch"]
        assert "seed" in {**config, **config.get("rewards", {}).get(config.get("task"), {})}
        for part in [row["result"], *row["result"].get("rounds", []), *row["result"].get("points", [])]:
            for judge, values in part.get("scores", {}).items():
                assert np.isfinite(np.array(values)).all() and len(values) == len(part["tokens"]), (row["key"], judge)


def test_the_laptop_plans_are_those_of_the_stored_rows():
    """The scale's file, the grids and the experiments give the very configurations that were run: every stored row is
    planned by a table, those of the three methods tables have all of their rows."""
    store = results.Results(LAPTOP)
    planned = {table: {run.key for scale in ("laptop", "evidence") if scale in made.scales
                       for run in plans.plan(table, scale, find=store.find)} for table, made in plans.TABLES.items()}
    stored = {row["key"] for row in rows_of(LAPTOP) if "key" in row}
    assert len(stored) > 200 and stored <= set().union(*planned.values())
    assert planned["sentiment"] | planned["dialogue"] | planned["summarization"] <= stored


def test_an_experiment_is_its_json():
    """Every stored configuration is read into dataclasses, and written again as it was."""
    configs = [row["config"] for row in rows_of(LAPTOP) if "key" in row and row["config"]["kind"] != "reward"]
    configs += [run.config for run in plans.plan("neighbors")]
    configs += [run.config for run in plans.plan("matched_rounds", "evidence", find=lambda config: protocol.SUPPOSED)]
    paper = [run.config for table in runner.RECIPES for run in runner.paper_plan(table)]
    for config in [*configs, *paper]:
        assert plans.read_experiment(config).config() == config
    assert {config["kind"] for config in configs} == set(plans.MADE) - {"reward"}


@pytest.mark.parametrize("part, change, says", [
    ("", {"kind": "guess"}, "allowed: train, course, enhance, online, converse, trial, rounds;"),
    ("", {"every": 4}, "exactly the settings of every kind"),
    ("", {"kind": "course"}, "exactly the settings every"), ("", {"sead": 1}, "sead"),
    ("source", {"taks": "dialogue"}, "source.taks: unknown setting"),
    ("source", {"task": None}, "source.task: missing"),
    ("take", {"how": "last"}, "first, ragged, extremes"), ("take", {"prompts": 65}, "1 to source.prompts, 64"),
    ("take", {"sampled": 5}, "1 to source.sampled, 4"), ("judge", {"split": "train"}, "test or validation"),
    ("judge", {"task": "sentiment"}, "the tasks of source and judge"), ("judge", {"judge": "gold"}, "judge.judge"),
    ("source", {"guide": 3}, "source.guide"), ("source", {"guide": {"step": 4}}, "source.guide"),
    ("", {"proxy": {"member": 3}}, "proxy"), ("", {"proxy": {"flipped": 2}}, "proxy"),
    ("", {"proxy": {"members": 3}}, "proxy"),
    ("training", {"loss_type": "dpo"}, "the loss of lire"), ("", {"method": "start"}, "nothing for the method start")])
def test_an_experiment_that_contradicts_itself(part, change, says):
    config = plans.experiment(plans.SCALES["laptop"], "dialogue", "lire", 0, plans.SEARCH["lire"][0]).config()
    inside = config[part] if part else config
    inside.update(change)
    config_without = {k: v for k, v in inside.items() if v is not None or k == "threads"}
    with pytest.raises(LireError, match=re.escape(says)):
        plans.read_experiment({**config, part: config_without} if part else config_without)


def test_run_experiment_takes_what_read_experiment_takes(tmp_path):
    """A wrong configuration is refused by the same words before any work, and the door decides no number: the version
    of the code does not enter it."""
    from lire_nb.base.versions import definitions

    config = plans.experiment(plans.SCALES["smoke"], "dialogue", "lire", 0, plans.SEARCH["lire"][0]).config()
    for wrong in ({**config, "sead": 1}, {**config, "take": {"prompts": 1}}, {**config, "method": "dpo"},
                  {**config, "judge": {**config["judge"], "split": "train"}},
                  {**config, "method": "start"}):
        said = []
        for door in (plans.read_experiment, lambda wrong: run_experiment(wrong, tmp_path / "work")):
            with pytest.raises(LireError) as e:
                door(wrong)
            said.append(str(e.value))
        assert said[0] == said[1]
    assert not (tmp_path / "work").exists()
    reached = definitions(["run_experiment"], without=plans._NAMING)
    assert ("lab.plans", "read_experiment") not in reached and ("lab.plans", "Experiment") not in reached


def test_a_scale_says_every_setting():
    """The files have the same tasks and settings, each explained where it first stands."""
    for name, scale in plans.SCALES.items():
        text = (ROOT / "data" / "scales" / f"{name}.toml").read_text()
        assert scale["tasks"].keys() == {"sentiment", "dialogue", "summarization"}
        for task in scale["tasks"].values():
            assert task.keys() == plans.SCALES["laptop"]["tasks"]["dialogue"].keys()
        for setting in ("seeds", "points", "epochs", "batch", "pool", "sampled", "candidates", "given", "max_length"):
            first = next(line for line in text.splitlines() if line.startswith(f"{setting} = "))
            assert "# " in first, (name, first)


def test_a_table_is_drawn_without_the_trainer():
    """What the tables import, and what drawing them loads: rows, plans, statistics and base; no model, no torch."""
    code = """
import json, sys
from lire_nb.lab import claims, results
def loaded(): return {n: m.__file__ for n, m in sys.modules.items() if n.startswith("lire_nb.") and m.__file__}
first = loaded()
claims.verdict_table(), results.system_table(results.systems_of(results.load_runs("dialogue")))
print(json.dumps([first, loaded(), sorted({"torch", "transformers", "datasets"} & sys.modules.keys())]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    imported, drawn, heavy = json.loads(done.stdout.splitlines()[-1])
    rooms = {"base", "base.errors", "lab", "lab.claims", "lab.plans", "lab.results", "statistics"}
    assert {name.removeprefix("lire_nb.") for name in imported} == rooms and heavy == []
    late = {"base.files", "preferences", "decisions", "frontiers", "lab.protocol", "lab.courses", "lab.texts"}
    assert rooms <= {name.removeprefix("lire_nb.") for name in drawn} <= rooms | late
    assert sum(Path(path).read_text(encoding="utf-8").count("\n") for path in imported.values()) <= 2140
    # 2,000 until `read_records` learned to walk back through the records of a policy's ancestors, some 80 lines; 2,100
    # until intervals refused what they cannot be made from, and differences what float32 cannot tell apart, some 30


def test_a_figure_is_drawn_from_rows_alone():
    """Tables and figures together import no torch; how many lines of this package, test_house holds."""
    code = "import sys; from lire_nb.lab import claims, figures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1] == "False", done.stderr


def test_intervals_cover_what_they_should():
    """Student's interval where only prompts or only seeds vary; the full count is in the notebook."""
    draw = np.random.default_rng(0)
    hits = sum(i.low <= 0 <= i.high
               for i in (statistics.crossed_interval(draw.normal(size=(1, 40)) + draw.normal(0, 0.5, (3, 1))
                                                     + draw.normal(size=(3, 40))) for _ in range(400)))
    assert hits >= 0.9 * 400


def test_a_difference_needs_common_seeds_and_prompts(smoke):
    systems = results.systems_of(results.load_runs("sentiment", smoke[0] / "results", "smoke"))
    other = results.systems_of(results.load_runs("dialogue", smoke[0] / "results", "smoke"))
    with pytest.raises(LireError, match="2 sets of prompts"):
        results.difference(systems["LIRE"], other["start"])
    with pytest.raises(LireError, match="0 common seeds"):
        results.difference(systems["LIRE"], systems["start"].assign(seed=7))
    one = results.difference(systems["LIRE"], systems["start"])
    assert np.isfinite(one.value) and np.isnan(one.low) and np.isnan(one.high)  # one seed has no interval


def test_a_difference_is_that_of_the_other_side_turned():
    systems = results.systems_of(invented({(("method", "start"),): 0.0, (("method", "lire"),): 0.5}, seeds=6))
    gain = results.difference(systems["LIRE"], systems["start"])
    back = results.difference(systems["start"], systems["LIRE"])
    assert gain.low < 0.5 < gain.high and gain.value == pytest.approx(0.5, abs=0.1)
    assert gain.value == pytest.approx(-back.value) and gain.low == pytest.approx(-back.high)
