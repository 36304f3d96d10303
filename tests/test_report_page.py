"""The page of a run: what was run stands first, all gains share one unit, and records are found as the commands write them."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lire_nb.base.files import read_jsonl, write_json
from lire_nb.identity import claim_folder, lists_identity
from lire_nb.lab import report, results

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "data" / "results" / "quickstart"


@pytest.fixture
def page(tmp_path, monkeypatch) -> str:
    "The text of the page of the stored run; its pictures count as their captions."
    monkeypatch.setattr(report, "png", lambda figure: b"")
    monkeypatch.setattr(report, "save_figure", lambda *args: [])
    shutil.copytree(RUN, tmp_path / "run")
    return report.report(tmp_path / "run").read_text(encoding="utf-8")


def test_what_was_run_stands_before_samples_and_these_before_figures(page):
    ran = json.loads((RUN / "machine.json").read_text())
    marks = ["<h1>", "what was run", "smollm2", "sentiment", "2 rounds of 64 prompts", "<td>seed</td><td>0</td>",
             ran["date"], ran["processor"], f"{ran['minutes']} minutes", "What was found", "<h2>Samples", "<img",
             "<h2>Results", "Can the judges see more?", "More figures", "All measures"]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)


def test_every_figure_has_a_sentence_under_it(page):
    figures = re.findall(r'<div class="figure[^"]*"><img [^>]*>(.*?)</div>', page)
    assert len(figures) == 8 and all(re.fullmatch(r"<p>[A-Z].{40,}\.</p>", said) for said in figures), figures


def test_sentences_and_table_are_in_the_unit_of_the_figure(page):
    """One division, done here from the rows: the same number in the sentence, in the table and as a point."""
    start, last = (read_jsonl(RUN / "evaluation" / f"{name}.jsonl") for name in ("start", "lire--round-2"))
    means = [np.array([np.mean(r["scores"]["gold"]) for r in rows]) for rows in (start, last)]
    gain = (means[1] - means[0]).mean() / means[0].std(ddof=1)
    assert f"gold up by +{gain:.2f} sd [" in page
    row = re.search(r"<tr><td>gold gain</td>(.*?)</tr>", page)[1]
    assert f"<td>{gain:.2f} [" in row
    points = report.run_points(RUN).set_index(["system", "judge"])["gain"]
    assert np.isclose(points["LIRE, round 2", "gold"], gain)


def test_a_ceiling_is_said_and_its_absence_too():
    rows = lambda scores: [{"scores": {"x": list(pair)}} for pair in scores]  # noqa: E731
    start, capped = rows([(0, 1), (2, 3), (4, 5), (6, 9.9)]), rows([(10, 10), (10, 9.9), (10, 10), (3, 2)])
    found = report.saturation({"start": start, "new": capped})
    assert found.loc["x"].tolist() == [1 / 8, 6 / 8]  # within a tenth of 2.98 of the highest: 9.9 and 10
    assert "at its ceiling: what" in report.saturation_sentences(found)[0]
    assert "not at its ceiling" in report.saturation_sentences(found * 0.1)[0]
    same = report.saturation({"start": rows([(1, 1)] * 4), "new": rows([(1, 1)] * 4)})
    assert same.loc["x"].tolist() == [1, 1], "a judge with one score for all tells nothing apart"


def test_records_are_found_as_lire_evaluate_writes_them(tmp_path):
    """Identities in the claim, places beside it; the start is recognized by what it is, not by its name."""
    home, run = tmp_path / "train", tmp_path / "run"
    shutil.copytree(RUN, run, ignore=shutil.ignore_patterns("config.json", "round-*"))
    for k in (1, 2):
        (home / f"round-{k}" / "policy").mkdir(parents=True)
        (home / f"round-{k}" / "lists.jsonl").write_text(json.dumps({"prompt": f"seen {k}"}) + "\n")
        write_json(home / f"round-{k}" / "policy" / "lire_config.json", {"temperature": 5.0 * k, "loss_type": "lire"})
    claim_folder(home, {"fingerprint": "f0", "reward": "vader-1", "prompts": {"a": "digest"},
                        "given": lists_identity([]), "stop": None}, "enhancement.json",
                 about={"policy": "smollm2"})
    places = {"start": "./smollm2", "LIRE": str(home / "round-1" / "policy"),
              "LIRE, round 2": str(home / "round-2" / "policy")}
    claim_folder(run, {"systems": {"start": "f0", "LIRE": "f1", "LIRE, round 2": "f2"},
                       "judges": {"vader": "vader-1", "gold": "other"}, "seed": 3, "samples": 2},
                 about={"systems": places})
    found = results.read_records(run)
    assert found.courses == [["start", "LIRE", "LIRE, round 2"]]
    assert found.seen == {"LIRE": 0, "LIRE, round 2": 0} and set(found.rewards.values()) == {"vader"}
    facts = report.run_facts(run)[""]
    assert facts["LIRE, round 2 was trained with"] == "temperature 10.0, loss_type lire" and facts["seed"] == "3"
    assert facts["start policy"] == "./smollm2" and "2 answers each" in facts["judged"]
    # another start policy: the rounds are one course, and it does not begin there
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(about | {"systems": about["systems"] | {"start": "f9"}}))
    assert results.read_records(run).courses == [["LIRE", "LIRE, round 2"]]


@pytest.mark.parametrize("config", [{"rounds": "many"}, {"systems": [1], "about": 3}, {"about": {"systems": "x"}},
                                    {"training": [1], "eval_samples": None}, {"seed": {"<b>": "\u202e"}}])
def test_strange_files_give_fewer_facts_and_no_error(tmp_path, config):
    shutil.copy(RUN / "metrics.jsonl", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "machine.json").write_text("[1, 2")
    facts = report.run_facts(tmp_path)[""]
    assert facts["judged"].startswith("96 prompts") and "\u202e" not in " ".join(facts)


def test_a_password_in_an_address_is_not_shown(tmp_path):
    shutil.copy(RUN / "metrics.jsonl", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"policy": "http://me:pw@example.org/?api_key=s3cret"}))
    assert not {"pw@", "s3cret"} & set(re.findall(r"pw@|s3cret", report.run_facts(tmp_path).to_string()))
