"""Faults in reports, figures and packaging: each line of the list with its right value, and relatives of it."""
import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny_policy import make_start

from lire_nb import evaluation, preferences, proxy, statistics, tasks
from lire_nb.base import errors as lists
from lire_nb.base import files
from lire_nb.base.errors import LireError
from lire_nb.base.files import json_digest
from lire_nb.cli import main
from lire_nb.identity import lists_identity, policy_identity
from lire_nb.judges import sheets, verdicts
from lire_nb.lab import claims, experiments, figures, plans, published, report, results, runner

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def rows_of(texts, shift=0.0, judges=("proxy", "gold"), prompts=None, seed=0):
    """Rows of a judged policy: one completion a prompt."""
    rng = np.random.default_rng(seed)
    return [{"id": f"p{i}", "prompt": (prompts or [f"prompt {i}" for i in range(len(texts))])[i], "completions": [t],
             "finish_reasons": ["stop"], "tokens": [5],
             "scores": {j: [float(rng.normal() + shift)] for j in judges}, "logps": [-5.0 + shift],
             "start_logps": [-5.0], "sampling": None} for i, t in enumerate(texts)]


def write_run(folder: Path, systems: dict, config: dict | None = None) -> Path:
    """A run folder as `lire evaluate` leaves it."""
    (folder / "evaluation").mkdir(parents=True)
    for name, rows in systems.items():
        files.write_jsonl(folder / "evaluation" / f"{files.slug(name)}.jsonl", rows)
    files.write_jsonl(folder / "metrics.jsonl", evaluation.compare_systems(systems))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


class Page(HTMLParser):
    """Tags, attributes and the text that a reader sees."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def no_pictures(monkeypatch):
    """A report whose text alone counts: drawing takes most of its time."""
    monkeypatch.setattr(report, "png", lambda figure: b"")
    monkeypatch.setattr(report, "save_figure", lambda *args: [])


# ---------------------------------------------------------------- 31: nothing of the run folder is run

TRAPS = {
    "lire_nb/__init__.py": "{trap}", "sitecustomize.py": "{trap}", "usercustomize.py": "{trap}", "json.py": "{trap}",
    "pandas.py": "{trap}", "matplotlib.py": "{trap}", "base64.py": "{trap}",
    "IPython/__init__.py": "{trap}", "ipykernel_launcher.py": "{trap}", "jupyter_config.py": "{trap}",
    "ipython_config.py": "{trap}", "nbconvert/__init__.py": "{trap}",
    "profile_default/startup/00.py": "{trap}", ".ipython/profile_default/startup/00.py": "{trap}",
    "matplotlibrc": "text.usetex: True\nlines.linewidth: 40\n",
}


@pytest.mark.parametrize("where", ["elsewhere", "inside"])
def test_31_report_runs_nothing_that_lies_in_the_run_folder(tmp_path, where):
    """A run folder with a lire_nb/ of its own, start files, profiles and settings: the page appears, and none of them
    ran."""
    run, proof = write_run(tmp_path / "run",
                           {"start": rows_of(["a"] * 24), "new": rows_of(["b"] * 24, 1.0)}), tmp_path / "ran"
    for name, text in TRAPS.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text.format(trap=f"open({str(proof)!r}, 'a').write(__file__ + chr(10))"))
    command = ("import sys; sys.path = [p for p in sys.path if p]; from lire_nb.cli import main; "
               "sys.exit(main(['report', '--out', sys.argv[1]]))")
    done = subprocess.run([sys.executable, "-P", "-c", command, "." if where == "inside" else str(run)],
                          cwd=run if where == "inside" else tmp_path,
                          env={**ENV, "PYTHONPATH": str(Path(report.__file__).parents[1])},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not proof.exists(), proof.read_text()
    assert (run / "report.html").stat().st_size > 20_000 and b"<svg" in (run / "figures"
                                                                         / "before_after.svg").read_bytes()


def test_31_page_needs_no_network_and_forbids_scripts(tmp_path):
    run = write_run(tmp_path / "run", {"start": rows_of(["a"] * 24), "new": rows_of(["b"] * 24, 1.0)}, {"seed": 0})
    text = report.report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not [tag
        for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base", "form", "video",
                                          "audio")]
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")
    assert not [attrs for _, attrs in page.tags if "href" in attrs or any(name.startswith("on") for name in attrs)]
    assert not re.search(r"url\(|@import|https?:", text)
    assert [a
            for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
            and "default-src 'none'" in a["content"]]
    assert not (run / "report.ipynb").exists(), "a notebook that is started in the folder would run what lies there"


# ---------------------------------------------------------------- 32: text is shown as text

HOSTILE = ["[x](javascript:alert(1))", "![](http://example.org/pixel.png)",
           "<img src=http://example.org/p onerror=alert(1)>", "<script>alert(1)</script>", "a | b | c",
           "`code` *bold* _it_ ~~gone~~",
           "price $5 and $x^2$", "line\n\n# heading\n- item\n1. one",
           "http://example.org www.example.org <http://example.org>", "\u202egnp.exe\u202c \u2066x\u2069 \u200b",
           "\x1b[31mred\x1b[0m \x9b2J \x07",
           "&lt;b&gt; &amp;", "\\[x\\](y) \\(f\\)", "=HYPERLINK(\"http://example.org\")", "[x]: http://example.org",
           "</td></tr></table><h1>mine</h1>"]
BAD_NAMES = ["start", "[x](javascript:alert(1)) <img src=x onerror=alert(1)>", "a | b `c` $d$ \u202e\x1b[31m"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose prompts, answers, systems, judges and reward models are all meant to be more than text."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    judges = ("proxy <b>x</b> | $y$", "_gold_ [a](http://example.org)")
    texts = (HOSTILE * 2)[:24]
    systems = {name: rows_of(texts, shift, judges, prompts=[f"{t} {i}" for i, t in enumerate(texts)], seed=k)
               for k, (name, shift) in enumerate(zip(BAD_NAMES, (0.0, 0.7, -0.4)))}
    write_run(folder, systems,
              {"systems": {n: "x" for n in BAD_NAMES},
               "note": "<script>alert(1)</script> http://me:pw@example.org/?api_key=s3cret"})
    rng = np.random.default_rng(0)
    aside = folder / "rewards" / "<b>$x$"
    aside.mkdir(parents=True)
    files.write_jsonl(aside / "held_out.jsonl",
                      [{"id": str(i), "grades": [2, 1, 0], "scores": rng.normal(size=3).tolist()} for i in range(24)])
    report.report(folder)
    return folder


def test_32_page_shows_every_letter_and_no_markup(hostile):
    text = (hostile / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p",
                                             "ul", "li", "b", "i", "table", "thead", "tbody", "tr", "th", "td", "div",
                                             "img", "pre"}
    assert sum(tag == "h1" for tag, _ in page.tags) == 1 and not [a
        for _, a in page.tags if "href" in a or "onerror" in a]
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert "[x](javascript:alert(1)) <img src=x onerror=alert(1)>" in page.text
    assert "_gold_ [a](http://example.org)" in page.text
    assert "\\u202e" in page.text and "\\x1b[31m" in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x9b\x07\u200b]", text)
    assert "s3cret" not in text and "pw@" not in text


def links(text: str) -> list[str]:
    """What a reader of Markdown would make live: links, pictures, addresses, HTML, code, formulas."""
    patterns = (r"\]\(", r"\]\[", r"(?m)^\s*[-*]?\s*\[[^\]]+\]:", r"https?://", r"\bwww\.", r"<[a-zA-Z/!]",
                r"(?<!\\)\$", r"`")
    return [p for p in patterns if re.search(p, text)]


@pytest.mark.parametrize("name", ["samples.md", "table.md"])
def test_32_markdown_files_have_no_live_markup(hostile, name):
    text = (hostile / name).read_text(encoding="utf-8")
    assert links(text) == [] and "javascript" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\x9b\x07\u200b]", text)
    if name == "table.md":
        assert len({line.count("|") for line in text.splitlines()}) == 1, "a bar in a name is no column"


def test_32_rendered_markdown_is_only_text(hostile):
    mistune = pytest.importorskip("mistune")
    page = Page(mistune.html((hostile / "samples.md").read_text(encoding="utf-8")))
    assert {tag for tag, _ in page.tags} <= {"p", "strong", "ul", "li", "em"}
    shown = report.pick_samples(results.read_systems(hostile))
    for prompt in shown["prompt"]:
        assert re.sub(r"\s+", "", prompt.split("\u202e")[0].split("\x1b")[0])[:12] in re.sub(r"\s+", "", page.text)


def test_32_tables_for_spreadsheets_hold_no_formula(hostile):
    for name in ("worse.csv", "table.csv", "worse_reasons.csv"):
        cells = [cell for row in csv.reader((hostile / name).open(encoding="utf-8")) for cell in row]
        assert not [c for c in cells if re.match(r"\s*[=+@＝＋＠]", c) or re.match(r"\s*-(?![\d.])", c)], name


def test_32_labels_of_figures_are_letters(hostile):
    """A dollar in a name is no formula, and a name with _ in front stays in the legend."""
    systems = results.read_systems(hostile)
    for name, figure in report._figures(hostile, systems):
        labels = [t.get_text() for axis in figure.axes
                  for t in (*axis.get_xticklabels(), *axis.get_yticklabels(), axis.title, axis.xaxis.label,
                            axis.yaxis.label)]
        labels += [t.get_text() for axis in figure.axes if axis.get_legend() for t in axis.get_legend().get_texts()]
        assert not [t for t in labels if len(re.findall(r"(?<!\\)\$", t)) > 1], (name, labels)
        assert not [t for t in labels if re.search("[\u202a-\u202e\x1b]", t)]
        if name == "reward_kl":
            assert sum("gold" in t for t in labels) == 1


def test_32_screen_obeys_no_name(hostile, capsys, no_pictures):
    assert main(["report", "--out", str(hostile)]) == 0
    said = capsys.readouterr()
    assert not re.search("[\x1b\x9b\x07\u202e]", said.out + said.err) and "\\x1b[31m" in said.out
    assert main(["report", "--out", f"{hostile}\x1b[31m\nsecond line"]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.err and said.err.count("\n") == 1


def test_32_sheets_hold_no_formula_and_can_be_read_back(tmp_path):
    answers = ["=1+1", "+2", "-3", "@x", "＝1", "\t=1", "plain", "<b>x</b>"]
    systems = {"start": rows_of(["zero"] * 8), "new": rows_of(answers)}
    for sheet in sheets.make_sheets(systems, tmp_path, judges=["ann"], overlap=1):
        table = list(csv.DictReader(sheet.open(encoding="utf-8-sig", newline="")))
        assert not [c for row in table for c in row.values() if re.match(r"\s*[=+\-@＝]", c)]
        # a spreadsheet eats the apostrophe
        sheets._write_sheet(sheet, [{**row, "verdict": "tie", "first": row["first"].lstrip("'")} for row in table])
    verdicts, problems = sheets.check_sheets(tmp_path)
    assert not problems and len(verdicts) == 8


def test_32_sample_text_and_tables_of_strangers():
    frame = claims.pd.DataFrame({"a | b": ["[x](javascript:1)", "2"]},
                                index=claims.pd.Index(["<b>", "![](http://x)"], name="n"))
    text = report.markdown_table(frame)
    assert links(text) == [] and [line.count("|") for line in text.splitlines()] == [3] * 4
    run = claims.pd.DataFrame([{"seed": 0,
                                "result": {"examples": [{"prompt": HOSTILE[0], "completion": "\n".join(HOSTILE)}]}}])
    assert links(claims.sample_text({"*a* [b](c)": run})) == []


# ---------------------------------------------------------------- 33: passwords


@pytest.mark.parametrize("address",
                         ["http://user:s3cret@127.0.0.1:9/v1", "https://s3cret@127.0.0.1:9/v1#m",
                          "http://user:s3/cret@127.0.0.1:9/", "http://127.0.0.1:9/v1?api_key=s3cret#m",
                          "http://127.0.0.1:9/?access_token=s3cret"])
def test_33_no_error_shows_a_password(address):
    error = LireError(f"cannot be reached at {address}", field="policy", value=address, allowed=address,
                      remedy=f"start {address}", file=address)
    nested = LireError("no", field="x", value={"systems": {"a": [address]}})
    for text in (str(error), str(nested)):
        assert "s3cret" not in text and "s3/cret" not in text and "127.0.0.1:9" in str(error)


def test_33_no_file_keeps_a_password(tmp_path):
    from lire_nb.base.files import write_json
    from lire_nb.identity import claim_folder

    systems = {"start": "http://me:s3cret@h/v1#m", "new": "http://h/v1?api_key=s3cret&model=a"}
    run = claim_folder(tmp_path / "run", {"systems": systems, "deep": [{"judge": systems["new"]}]})
    assert claim_folder(run, {"systems": systems,
                              "deep": [{"judge": systems["new"]}]}) == run, "the same again is the same"
    with pytest.raises(LireError, match="another configuration") as e:
        claim_folder(run, {"systems": {**systems, "new": "http://h/v1?api_key=other&model=b"}})
    write_json(tmp_path / "x.json", systems)
    for text in ((run / "config.json").read_text(), (tmp_path / "x.json").read_text(), str(e.value)):
        assert "s3cret" not in text and "other&" not in text
    assert "model=a" in (run / "config.json").read_text(), "the rest of the query stays"


def test_33_no_door_takes_a_password(capsys, tmp_path):
    from lire_nb.rewards import ServerReward

    with pytest.raises(LireError) as e:
        ServerReward("http://me:s3cret@127.0.0.1:9/score")
    assert "s3cret" not in str(e.value)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    for command in (["sample", "--prompts", str(tmp_path / "p.jsonl"), "--policy", "http://me:s3cret@127.0.0.1:9/v1#m",
                     "--out", str(tmp_path / "a" / "lists.jsonl")],
                    ["score", "--lists", str(tmp_path / "p.jsonl"), "--reward", "http://me:s3cret@127.0.0.1:9/",
                     "--out", str(tmp_path / "b" / "lists.jsonl")]):
        if command[0] == "sample":
            continue  # refused by the sampler itself, tested there; it would ask the server for minutes
        assert main(command) == 2
        said = capsys.readouterr()
        assert "s3cret" not in said.out + said.err
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "s3cret" in p.read_text()]


# ---------------------------------------------------------------- 34: intervals with few prompts


@pytest.mark.parametrize("prompts", [2, 4, 19])
def test_34_interval_of_a_mean_covers_with_few_prompts(prompts):
    values = np.random.default_rng(prompts).normal(0, 1, (1000, prompts))
    found = np.array([statistics.bootstrap_interval(v, resamples=99)[:3] for v in values])
    assert 0.93 <= np.mean((found[:, 1] <= 0) & (0 <= found[:, 2])) <= 0.97


@pytest.mark.parametrize("prompts, rate", [(2, 0.5), (4, 0.9), (16, 0.9)])
def test_34_interval_of_a_win_rate_covers_with_few_prompts(prompts, rate):
    values = np.random.default_rng(prompts).choice([1.0, 0.5, 0.0], (400, prompts), p=[rate - 0.05, 0.1, 0.95 - rate])
    found = [preferences.win_rate(v) for v in values]
    assert np.mean([f["low"] <= rate <= f["high"] for f in found]) >= 0.9
    assert all(f["high"] - f["low"] > 0.05 for f in found), "n of n won is no proof"


def test_34_results_say_their_method():
    draw = np.random.default_rng(0)
    assert statistics.bootstrap_interval(draw.normal(size=10)).method == "t"
    assert statistics.bootstrap_interval(draw.normal(size=20)).method == "bootstrap"
    assert (
        preferences.win_rate([1.0] * 12)["method"] == "wilson"
        and preferences.win_rate([1.0] * 50)["method"] == "wilson"
        and preferences.win_rate([1.0, 0.0] * 10)["method"] == "bootstrap"
    )
    value, low, high = statistics.bootstrap_interval([1.0, 2.0, 4.0])  # three numbers to unpack, as before
    expected = stats.t.interval(0.9, 2, np.mean([1, 2, 4]), stats.sem([1, 2, 4]))
    assert np.allclose(statistics.bootstrap_interval([1.0, 2.0, 4.0], confidence=0.9)[1:],
                       expected) and low < value < high
    expected = stats.binomtest(7, 9).proportion_ci(0.9, method="wilson")
    won = preferences.win_rate([1.0] * 7 + [0.0] * 2, confidence=0.9)
    assert np.allclose((won["low"], won["high"]), (expected.low, expected.high))
    rows = evaluation.compare_systems({"start": rows_of(["a"] * 5), "new": rows_of(["b"] * 5, 1.0)})
    assert {r["metric"]: r["method"] for r in rows if r["value"] is not None and r["system"] == "new"} == {
        "reward": "t", "reward difference": "no spread", "win rate": "wilson", "KL to start": "no spread",
        "perplexity under start": "no spread", "tokens": "no spread", "ended": "wilson"}


def test_34_what_does_not_cover_has_no_interval():
    with pytest.raises(LireError, match="too few for a bootstrap"):
        statistics.bootstrap_interval([1.0, 2.0, 3.0], statistic=np.median)
    for short in ([], [1.0]):
        with pytest.raises(LireError):
            statistics.bootstrap_interval(short)
        with pytest.raises(LireError):
            preferences.win_rate(short)
    controlled = preferences.length_controlled_win_rate([1.0, 0.0, 1.0], [3, 4, 5], [4, 4, 4])
    assert 0 < controlled["win_rate"] < 1 and controlled["low"] is controlled["high"] is controlled["method"] is None
    pytest.importorskip("krippendorff")
    agreement = preferences.judge_agreement({"a": [1, 0, 1, 0], "b": [1, 0, 0, 0]})
    assert np.isfinite(agreement.value) and np.isnan(agreement.low) and agreement.method is None


@pytest.mark.parametrize("prompts, rate", [(3, 0.5), (5, 0.1), (12, 0.95)])
def test_34_interval_of_zeros_and_ones_covers(prompts, rate):
    values = (np.random.default_rng(0).random((300, prompts)) < rate).astype(float)
    for interval in (statistics.bootstrap_interval, preferences.share_interval):
        found = [interval(v) for v in values]
        assert np.mean([low <= rate <= high for _, low, high in found]) >= 0.88
        assert all(0 <= f.low < f.high <= 1 and f.method == "wilson" for f in found)


def test_34_equal_values_have_no_spread():
    for values, options in (([2.5] * 6, {}), ([0.5] * 6, {}), ([0.0] * 6, {"share": False}), ([1.0] * 25, {}), ([2.5] * 200, {})):
        found = statistics.bootstrap_interval(values, **options)
        assert found == (values[0],) * 3 and found.method == "no spread"
    found = statistics.paired_difference([1.0, 1.0, 0.0], [1.0, 1.0, 0.0])  # a difference is no share
    assert found == (0, 0, 0) and found.method == "no spread"
    assert statistics.paired_difference([1.0, 1.0, 0.0], [0.0, 1.0, 0.0]).method == "t"
    accuracy = evaluation.PairAccuracy().compute(predictions=[[1.0, 0.0]] * 4, references=[[1.0, 0.0]] * 4)
    assert accuracy["method"] == "wilson" and accuracy["low"] < 0.6 and accuracy["high"] == 1
    kl = evaluation.KLDivergence().compute(predictions=[[-1.0]] * 4, references=[[-1.0]] * 4)
    assert kl["method"] == "no spread"
    assert statistics.crossed_interval(np.ones((5, 30))).method == "no spread"
    mean = lambda rows, columns: np.einsum("ds,sn,dn->d", rows, np.full((5, 32), 2.0), columns)  # noqa: E731
    assert statistics.crossed_bootstrap((4, 32), lambda r, c: np.full(len(r), 2.0)).method == "no spread"
    assert statistics.crossed_bootstrap((5, 32), lambda r, c: mean(r, c) + r[:, 0]).method == "bootstrap"


def test_34_shares_of_judged_prompts_stay_in_range():
    for flips, first in (([0.0, 0.0, 0.0, 1.0], [0.5, 1.0, 0.5, 1.0]), ([0.0] * 3, [1.0] * 3),
                         ([0.0, 0.5, 0.0], [0.5] * 3)):
        ids = [str(i) for i in range(len(flips))]
        found = verdicts.JudgedPrompts("new", "old", ids, [1.0] * len(ids), flips, first, {}).summary()
        for name in ("flip_rate", "first_share"):
            value, low, high = found[name]
            assert 0 <= low <= value <= high <= 1 and high - low > 0.2 and found[name].method == "wilson"


@pytest.mark.parametrize("said", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("slope", [None, 0.7])
def test_34_equal_preferences_at_equal_length_keep_an_interval(said, slope):
    draw = np.random.default_rng(0)
    for lengths in (np.full(30, 9.0), draw.normal(9, 3, 30)):
        found = preferences.length_controlled_win_rate([said] * 30, lengths, np.full(30, 9.0), slope=slope,
                                                       resamples=19)
        won = preferences.win_rate([said] * 30)
        assert found["low"] <= found["win_rate"] <= found["high"] and found["method"] == "wilson"
        assert found["high"] - found["low"] > 0.8 * (won["high"] - won["low"])


def test_34_perplexity_covers_with_few_prompts():
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        lengths = draw.integers(20, 30, 6)
        logps = -lengths * draw.normal(3.0, 0.3, 6)
        found = evaluation._perplexity_interval(logps.tolist(), lengths.tolist(), 0)
        hits += found.low <= np.exp(3.0) <= found.high
    assert hits >= 0.91 * 300


def test_34_tables_and_reports_with_few_prompts(tmp_path, no_pictures):
    wins = results.wins(*(claims.pd.DataFrame([{"seed": 0, "result": {"ids": "x", "scores": {"gold": [[v]] * 6}}}])
                          for v in (1.0, 0.0)))
    assert wins.value == 1 and wins.low < 0.7 and wins.method == "wilson"
    assert np.isnan(statistics.crossed_bootstrap((2, 6), lambda r, c: np.ones(len(r))).low)
    run = write_run(tmp_path / "few", {"start": rows_of(["a"] * 4), "new": rows_of(["b"] * 4, 3.0)})
    page = Page(report.report(run).read_text()).text
    assert "4 prompts, 95 % Student and Wilson intervals" in page and "bootstrap" not in page
    old = results.read_metrics(run).drop(columns="method")
    assert "too narrow" in report.findings(old)[-1]


# ---------------------------------------------------------------- 35: figures and tables that agree


def made_up(means: dict[int, float], prompts: int = 6) -> claims.pd.DataFrame:
    def result(seed, mean):
        scores = [[mean + 0.1 * ((k * 7 + seed) % 5)] for k in range(prompts)]
        return {"ids": "x", "scores": {"gold": scores, "proxy": scores}, "ended": [[1]] * prompts,
                **{k: [[1.0]] * prompts for k in ("tokens", "logps", "start_logps")}}

    return claims.pd.DataFrame([{"seed": seed, "result": result(seed, mean)} for seed, mean in means.items()])


def test_35_points_are_joined_over_common_seeds_only():
    line = figures.along({2: made_up({0: 0.0, 1: 0.2}), 4: made_up({0: 0.1, 1: 0.3, 2: 9.0})},
                         lambda runs: results.values_of(runs, "gold"))
    assert line.seeds == 2 and line.points[4].value < 1 and len(line.dots[4]) == 2
    figure = figures.plot_lines({"one": figures.along({2: made_up({0: 0.0}), 4: made_up({0: 1.0, 1: 1.0})},
                                                      lambda runs: results.values_of(runs, "gold")), "two": line}, "M",
                                "gain", "t")
    faces = {c.get_label(): c.lines[0].get_markerfacecolor() for c in figure.axes[0].containers}
    assert faces["one (1 seed)"] == "white" and faces["two (2 seeds)"] != "white"


def test_35_matrix_says_what_the_table_says():
    systems = results.systems_of(results.load_runs("sentiment", ROOT / "data" / "results"))
    shown = {t.get_position(): t.get_text() for t in figures.plot_matrix(systems).axes[0].texts}
    names = list(systems)
    table = results.system_table(systems)["gold win rate"]
    for name in names[1:]:
        assert shown[0, names.index(name)].replace("\n", " ") == table[name]


def test_35_one_seed_is_hollow_and_not_on_the_frontier():
    systems = {"start": made_up({0: 0.0, 1: 0.0}), "A": made_up({0: 1.0, 1: 1.1}), "B": made_up({0: 5.0})}
    axis = figures.plot_frontier(figures.frontier_points(systems)).axes[0]
    faces = {c.get_label(): c.lines[0].get_markerfacecolor() for c in axis.containers}
    assert faces["B (1 seed)"] == "white" and faces["A"] != "white"
    joined = next(line for line in axis.get_lines() if line.get_label() == "frontier")
    assert 1 < max(joined.get_ydata()) / results.gain(systems["A"],
                                                      systems["start"]).value + 1 < 2.1, "the frontier ends at A"


def test_35_no_text_counts_the_claims_by_hand():
    words = "sixteen seventeen eighteen nineteen twenty".split()
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not re.search(rf"\b({'|'.join(words)}) claims", "".join(cell["source"]), re.IGNORECASE), path.name


def test_35_stored_samples_hold_no_slur():
    # beginnings of words that a policy of random letters may come upon
    parts = ("nigg", "fagg", "kike", "spic ", "tranny", "retard")
    for path in (ROOT / "nbs").glob("9*.ipynb"):  # the pages of findings
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = (
                json.dumps(cell.get("outputs", []), ensure_ascii=False)
                if "image/png" not in json.dumps(cell.get("outputs", []))[:2000]
                else ""
            )
            assert not [p for p in parts if re.search(rf"\b{p}", text, re.IGNORECASE)], path.name


# ---------------------------------------------------------------- 38: only what the records know


def trained(folder: Path, prompts: list, start: str, reward: str, rounds: int = 2, **more) -> Path:
    """The records of a self-enhancement."""
    for k in range(1, rounds + 1):
        (folder / f"round-{k}" / "policy").mkdir(parents=True)
    made = {"policy": start, "reward": reward, "prompts": [[f"t{i}", p] for i, p in enumerate(prompts)],
            "given": lists_identity([]), "stop": None}
    (folder / "enhancement.json").write_text(json.dumps({**made, **more}))
    return folder


@pytest.fixture
def judged(tmp_path, no_pictures):
    def make(prompts, config, names=("start", "LIRE", "DPO")):
        systems = {n: rows_of(["x"] * len(prompts), 0.5 * k, prompts=prompts, seed=k) for k, n in enumerate(names)}
        return write_run(tmp_path / "eval", systems, config)

    return make


PROMPTS = [f"question {i}" for i in range(24)]


def page_of(run: Path) -> str:
    return Page(report.report(run).read_text()).text


def test_38_nothing_is_said_without_a_record(judged):
    run = judged(PROMPTS,
                 {"systems": {"start": "smollm2", "LIRE": "nowhere/a", "DPO": "nowhere/b"},
                  "judges": {"proxy": "a", "gold": "b"}})
    page = page_of(run)
    assert "held-out prompt" not in page and "raining saw" not in page and "24 prompts" in page
    assert "Over-optimization" not in page, "alternatives are no course"
    axis = next(f for n, f in report._figures(run, results.read_systems(run)) if n == "reward_kl").axes[0]
    assert not [line for line in axis.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) > 1
                and len(set(line.get_xdata())) > 2], "LIRE and DPO are not joined"


def test_38_records_are_read(judged, tmp_path):
    home = trained(tmp_path / "train", ["other 1", "other 2"], "smollm2", "vader-1")
    systems = {"start": "smollm2", "LIRE": str(home / "round-1" / "policy"), "LIRE 2": str(home / "round-2" / "policy"),
               "DPO": "elsewhere"}
    run = judged(PROMPTS, {"systems": systems, "judges": {"proxy": "vader-1", "gold": "b"}}, names=tuple(systems))
    found = results.read_records(run)
    assert (
        found.courses == [["start", "LIRE", "LIRE 2"]]
        and found.seen == {"LIRE": 0, "LIRE 2": 0}
        and found.rewards == {"LIRE": "proxy", "LIRE 2": "proxy"}
    )
    assert "held-out prompt" not in page_of(run), "of DPO nothing is known"


def test_38_training_prompts_are_no_held_out_prompts(judged, tmp_path):
    home = trained(tmp_path / "train", PROMPTS[:10], "smollm2", "other-reward")
    systems = {"start": "smollm2", "LIRE": str(home / "round-1" / "policy"), "LIRE 2": str(home / "round-2" / "policy")}
    run = judged(PROMPTS, {"systems": systems, "judges": {"proxy": "vader-1", "gold": "b"}}, names=tuple(systems))
    page = page_of(run)
    assert "24 prompts, 10 of which training saw" in page
    assert "held-out prompts" not in page and "reward only" not in page
    home2 = trained(tmp_path / "again", ["new"], "smollm2", "vader-1")
    systems = {n: p.replace(str(home), str(home2)) for n, p in systems.items()}
    (run / "config.json").write_text(json.dumps({"systems": systems, "judges": {"proxy": "vader-1", "gold": "b"}}))
    page = page_of(run)
    assert "24 held-out prompts" in page and "Training saw the proxy reward only." in page
    assert "Over-optimization" in page


@pytest.mark.parametrize("more, seen, reward", [
    ({}, 0, "proxy"),
    ({"stop": {"gold": "gold-1"}, "about": {"watched": [json_digest(p) for p in PROMPTS[:7]]}}, 7, None),
    ({"stop": {"gold": None, "max_kl": 3.0, "prompts": "d"}, "about": {"watched": []}}, 0, "proxy"),
    ({"stop": {"gold": "gold-1", "prompts": "d"}}, None, None),  # written before the prompts of a rule were noted
    ({"stop": "my_rule-1234"}, None, None),  # a function may look at anything
    ({"trainer": {"eval_dataset": "1234"}}, None, None),
    ({"refit": {"lists": "1234"}}, None, None),
    ({"given": "1234"}, 0, None), ({"given": "1234", "about": {"rewards given": 2}}, 0, None),
    ({"given": "1234", "about": {"rewards given": 0}}, 0, "proxy"),
    ({"fingerprint": "another", "about": {"policy": "nowhere/round-1/policy"}}, None, None)])
def test_38_only_what_all_of_a_training_saw_is_said(judged, tmp_path, more, seen, reward):
    """Stop rules, rewards that the prompts brought, lists that decide when to stop, a start that is no system here."""
    home = trained(tmp_path / "train", ["other"], "smollm2", "vader-1", rounds=1, **more)
    run = judged(PROMPTS, {"systems": {"start": "smollm2", "new": str(home / "round-1" / "policy")},
                           "judges": {"proxy": "vader-1", "gold": "gold-1"}}, names=("start", "new"))
    found = results.read_records(run)
    assert found.seen.get("new") == seen and found.rewards.get("new") == reward
    said = report.findings(results.read_metrics(run), found)[-1]
    assert ("held-out" in said) == (seen == 0) and ("proxy reward only" in said) == (reward is not None)


def test_38_the_ancestors_of_a_policy_count(judged, tmp_path):
    """Two self-enhancements in a row: what the first saw, the policy has seen; not where its folder holds another."""
    start, first = make_start(tmp_path / "start"), trained(tmp_path / "a", PROMPTS, "start", "gold-1", rounds=1)
    between = make_start(first / "round-1" / "policy", seed=1)
    identity = {"start": policy_identity(start), "between": policy_identity(between)}
    files.write_json(first / "enhancement.json", json.loads((first / "enhancement.json").read_text())
               | {"fingerprint": identity["start"], "about": {"policy": str(start)}})
    last = trained(tmp_path / "b", ["other"], "", "vader-1", rounds=1, fingerprint=identity["between"],
                   about={"policy": str(between)})
    run = judged(PROMPTS, {"systems": {"start": identity["start"], "new": "n"}, "about": {"systems": {
        "start": str(start), "new": str(last / "round-1" / "policy")}},
        "judges": {"proxy": "vader-1", "gold": "gold-1"}}, names=("start", "new"))
    assert results.read_records(run)[1:3] == ({"new": len(PROMPTS)}, {})
    make_start(between, seed=2)
    assert results.read_records(run)[1:3] == ({}, {})


def test_38_a_self_enhancement_notes_what_its_rule_watched(tmp_path, monkeypatch):
    """The record of a run with a rule and with rewards that were given: what is in it is what `read_records` needs."""
    from lire_nb import enhancement

    monkeypatch.setattr(enhancement, "run_round", lambda *a, **k: None)
    monkeypatch.setattr(enhancement, "should_stop", lambda *a, **k: None)
    prompts = [{"id": "a", "prompt": "film was", "meta": {}, "completions": ["x", "y"], "rewards": [1.0, None]},
               {"id": "b", "prompt": "plot was", "meta": {}}]
    rule = enhancement.StopRule([{"id": "h", "prompt": "held out", "meta": {}}], gold=lambda p, c: [0.0 for _ in c])
    enhancement.self_enhance(make_start(tmp_path / "start"), prompts, lambda p, c: [0.0 for _ in c], tmp_path / "run",
                             evolve=1, stop=rule)
    about = json.loads((tmp_path / "run" / "enhancement.json").read_text())["about"]
    assert about["watched"] == [json_digest(tasks.same_text("held out"))] and about["rewards given"] == 1


@pytest.mark.parametrize("other", [
    "Question  {}!", "question {} ", "QUESTION\u00a0{}", "\uff51uestion {}", [{"role": "user", "content": "question {}"}]])
def test_a_prompt_in_another_form_is_no_held_out_prompt(judged, tmp_path, other):
    """Whichever side has the other form; also where a stop rule watched it. Another prompt is held out still."""
    chat = isinstance(other, list)
    forms = [[{**other[0], "content": p}] if chat else other.format(p.partition(" ")[2]) for p in PROMPTS]
    same, none = {"seen": (forms, PROMPTS), "judged": (PROMPTS, forms)}, [f"answer {i}" for i in range(24)]
    for name, (before, asked) in same.items():
        home = trained(tmp_path / name, before[:5], "smollm2", "a", rounds=1)
        watch = trained(tmp_path / f"{name} watched", none, "smollm2", "a", rounds=1, stop={"gold": "b"}, about={
            "watched": [json_digest(tasks.same_text(p)) for p in before[:7]]})
        systems = {"start": "smollm2", "one": str(home / "round-1" / "policy"), "two": str(watch / "round-1" / "policy")}
        run = judged(asked, {"systems": systems, "judges": {"proxy": "a"}}, names=tuple(systems))
        assert results.read_records(run).seen == {"one": 5, "two": 7}
        said = report.findings(results.read_metrics(run), results.read_records(run))[-1]
        assert "7 of which training saw" in said and "held-out" not in said
        shutil.rmtree(run)


@pytest.mark.parametrize("names, identities, noisy, apart", [
    (("proxy", "gold"), ("a-1", "a-1"), False, None), (("gold", "proxy"), ("a-1", "a-1"), False, None),
    (("proxy", "gold"), ("a-1", "a-1"), True, None), (("proxy", "gold"), ("a-1", "b-1"), False, "gold"),
    (("proxy", "gold", "vader"), ("a-1", "a-1", "v-1"), False, "vader"), (("mine",), ("a-1",), False, None),
    (("mine", "again"), ("a-1", "a-1"), False, None)])
def test_one_reward_under_two_names_checks_nothing(judged, tmp_path, names, identities, noisy, apart):
    """By the identities, and by the scores where a judge is asked once; `noisy`: it answers otherwise when asked again."""
    home = trained(tmp_path / "train", ["other"], "smollm2", "a-1", rounds=1)
    systems = {"start": "smollm2", "new": str(home / "round-1" / "policy")}
    run = judged(PROMPTS, {"systems": systems, "judges": dict(zip(names, identities))}, names=tuple(systems))
    rng = np.random.default_rng(0)
    for k, name in enumerate(systems):
        path = run / "evaluation" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            given = {one: [float(rng.normal() + k)] for one in sorted(set(identities))}
            row["scores"] = {j: given[i] if not noisy else [float(rng.normal() + k)] for j, i in zip(names, identities)}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        systems[name] = rows
    files.write_jsonl(run / "metrics.jsonl", evaluation.compare_systems(systems))
    page, twins = page_of(run), [n for n, i in zip(names, identities) if i == "a-1"]
    assert ("one reward under several names" in page) == (len(twins) > 1)
    assert ("the independent judge's reward" in page) == (apart is not None)
    assert ("no independent judge" in page) == (apart is None)
    assert ("Over-optimization" in page) == (apart is not None)
    if apart:
        assert proxy.independent_judge(results.read_systems(run)) == apart


@pytest.mark.parametrize("config",
                         ["[]", "{", '{"systems": []}', '{"systems": {"new": 5}, "judges": 3}',
                          '{"systems": {"new": "a/round-1/policy"}}'])
def test_38_strange_records_are_no_records(judged, config):
    run = judged(PROMPTS, None, names=("start", "new"))
    (run / "config.json").write_text(config)
    assert "held-out prompt" not in page_of(run)


# ---------------------------------------------------------------- the version of the code


def versions(folder: Path, **edits) -> dict:
    from lire_nb.base.versions import Package

    copy, home = folder / f"copy{len(list(folder.iterdir()))}" / "lire_nb", Path(experiments.__file__).parents[1]
    for path in home.rglob("*.py"):
        (copy / path.relative_to(home)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(home)).write_text(edits.get(path.stem, str)(path.read_text()))
    package = Package(copy)
    return {kind: plans.code_version(kind, package) for kind in ("train", "reward")}


def test_code_version_follows_definitions_not_files(tmp_path):
    import ast

    now = versions(tmp_path)
    source = (Path(experiments.__file__)).read_text()
    node = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "ragged_lengths")
    text = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"
    moved = versions(
        tmp_path,
        experiments=lambda t: t.replace(text, "").replace(
            "\nimport torch\n", "\nimport torch\nfrom .memory import ragged_lengths\n", 1
        ),
        memory=lambda t: f"{t}\nimport random\n\n\n{text}",
    )
    assert moved == now, "a function moved to another module stales nothing"
    remarked = versions(tmp_path, losses=lambda t: "# a remark\n" + t.replace('"""AUTO', '"""auto'),
                        report=lambda t: t + "\nX = 1\n", bench=lambda t: t.replace("5", "6"))
    assert remarked == now, "remarks and what is not reached stale nothing"
    changed = versions(tmp_path, losses=lambda t: t.replace("temperature: float = 2.0", "temperature: float = 3.0"))
    assert changed["train"] != now["train"] and changed["reward"] == now["reward"]
    changed = versions(tmp_path, rewards=lambda t: t.replace("weight_decay=0.01", "weight_decay=0.02", 1))
    assert changed["reward"] != now["reward"]


def test_rows_of_other_code_stay_readable_and_do_not_count(tmp_path):
    run = plans.Run("toy", {"kind": "reward", "seed": 0})
    results.Results(tmp_path).append(run, {"x": 1}, {"date": "2026-01-01"})
    row = json.loads((tmp_path / "toy.jsonl").read_text())
    assert row["code"] == plans.code_version("reward") != plans.code_version("train")
    assert results.Results(tmp_path, current=True).find(run.config) == {"x": 1}
    (tmp_path / "toy.jsonl").write_text(json.dumps({**row, "code": "0ld0ld0"}) + "\n")
    assert results.Results(tmp_path, current=True).find(run.config) is None and results.Results(tmp_path).find(
        run.config
    ) == {"x": 1}
    assert results.Results(tmp_path, ["0ld0ld0"], current=True).find(run.config) == {"x": 1}


# ---------------------------------------------------------------- 41: reproduce says what is so


@pytest.mark.parametrize("more",
                         [["--policy", "./mine"], ["--reward", "runs/mine"], ["--policy", "x", "--list"],
                          ["--reward", "x", "--dry-run"]])
def test_41_a_policy_that_would_not_be_used_is_refused(tmp_path, capsys, more):
    """--policy stands in every table now, so the first one is refused because it is not there."""
    assert main(["reproduce", "sentiment", "--scale", "smoke", "--most", "0", "--results", str(tmp_path / "r"),
                 "--work", str(tmp_path / "w"), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and more[0] in said and "remedy" in said and not (tmp_path / "w").exists()


def test_41_counts_are_true(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_experiment", lambda config, work, keep: {"seconds": {"total": 0.0}})
    told = []
    count = runner.reproduce(["sentiment"], "smoke", results=tmp_path / "r", work=tmp_path / "w", jobs=1, most=1,
                             say=told.append)
    planned = len({r.key for r in plans.plan("sentiment", "smoke")})
    assert count == 1 and any(line.startswith(f"0 of {planned} runs are there; {planned} to go, of which 1 now")
                              for line in told), told


# ---------------------------------------------------------------- 42: the wheel and the working directory


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The installed package, outside of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source",
                    ignore=shutil.ignore_patterns(".venv", ".git", "nbs", "tests", "runs", "build", "*.egg-info",
                                                  "__pycache__"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                           "--wheel-dir", str(folder), "."], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "site")
    shutil.rmtree(folder / "source")
    (folder / "empty").mkdir()
    return folder


def test_42_the_wheel_works_in_an_empty_directory(wheel):
    code = """
import lire_nb, pathlib
assert pathlib.Path(lire_nb.__file__).parents[1].name == "site", lire_nb.__file__
from lire_nb.tasks import load_task
from lire_nb.lab import published, results, runner
assert len(load_task("dialogue").reward_lists["train"]) > 100 and len(load_task("summarization").prompts["test"]) > 50
assert not published.paper_table("dialogue").empty and len(runner.paper_plan("summarization")) == 8
assert len(results.load_runs("sentiment")) > 40
from lire_nb.cli import main
raise SystemExit(main(["reproduce", "--list"]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=wheel / "empty",
                          env={**ENV, "PYTHONPATH": str(wheel / "site")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sentiment" in done.stdout and not list((wheel / "empty").iterdir())


def test_42_paths_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    for place in (tmp_path, ROOT, ROOT / "nbs"):
        monkeypatch.chdir(place)
        assert len(results.load_runs("sentiment")) > 40
        assert not published.paper_table("dialogue").empty and runner.paper_plan("dialogue")
        assert tasks.load_task("dialogue").name == "dialogue" and claims.verdict_text("90_methods")


def test_helpers_find_markup():
    """The check above can fail."""
    assert len(links("[x](y) [a][b] http://x www.x <b> $x$ `c`")) == 7 and lists.LireError and html
