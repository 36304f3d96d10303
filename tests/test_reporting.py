"""The report as a reader meets it: one page, opened in a browser, wide and narrow; and the data behind its figures."""
import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lire_nb.base.errors import LireError, in_markdown
from lire_nb.lab import claims, figures, report, results
from lire_nb.proxy import calibration, overoptimization_steps, parting_point

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "data" / "results" / "quickstart"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The committed run with the held-out scores of a reward model, and a report drawn from it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(RUN, folder, ignore=shutil.ignore_patterns("figures", "table.*", "samples.md"))
    shutil.copytree(ROOT / "data" / "results" / "rewards", folder / "rewards", dirs_exist_ok=True)
    assert report.report(folder) == folder / "report.html"
    return folder


FIGURES = ["before_after", "calibration-dialogue", "calibration-gold", "calibration-proxy", "frontier",
           "overoptimization", "reward_kl", "training", "win_matrix"]


def test_report_writes_every_figure_as_png_and_svg(run):
    assert sorted(p.name for p in (run / "figures").iterdir()) == sorted(f"{name}.{kind}" for name in FIGURES
                                                                         for kind in ("png", "svg"))
    for path in (run / "figures").iterdir():
        head = path.read_bytes()
        if path.suffix == ".png":
            assert head[:8] == b"\x89PNG\r\n\x1a\n"
        else:
            assert b"<svg" in head and head.rstrip().endswith(b"</svg>")


def test_report_is_the_same_for_the_same_files(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("figures", "report.*"))
    systems = results.read_systems(again)
    for name, figure in report._figures(again, systems):
        for path in figures.save_figure(figure, again / "figures", name):
            assert path.read_bytes() == (run / "figures" / path.name).read_bytes(), path.name


def test_report_leaves_out_what_has_no_files(tmp_path):
    """An evaluation of two systems by one judge, without training logs, reward models or a configuration."""
    (tmp_path / "evaluation").mkdir()
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["system"] in ("start", "LIRE") and r["judge"] in (None, "vader")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("start", "lire"):
        lines = [json.loads(line) for line in (RUN / "evaluation" / f"{name}.jsonl").read_text().splitlines()]
        lines = [r | {"scores": {"vader": r["scores"]["vader"]}} for r in lines]
        (tmp_path / "evaluation" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    page = report.report(tmp_path).read_text()
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"before_after", "reward_kl"}
    assert "Over-optimization" not in page and "What got worse" in page


PROBE = """<script>
addEventListener('load', () => setTimeout(() => {
  const small = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, box = node.parentElement.getBoundingClientRect();
    if (node.data.trim() && box.width && !['SCRIPT', 'STYLE'].includes(node.parentElement.tagName)) {
      const size = parseFloat(getComputedStyle(node.parentElement).fontSize);
      if (size < 12) small.push([size, node.data.trim().slice(0, 40)]);
    }
  }
  parent.postMessage({
    width: innerWidth, scroll: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth), small: small,
    images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt]),
    words: document.body.innerText.length
  }, '*');
}, 50));
</script></body>"""
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe src="probe.html" style="border:0;width:{width}px;height:900px"></iframe><script>
addEventListener('message', e => {{
  const out = document.createElement('script');
  out.type = 'application/json'; out.id = 'found'; out.textContent = JSON.stringify(e.data);
  document.body.append(out);
}});
</script></body>"""


def browse(run: Path, width: int, folder: Path) -> tuple[dict, str]:
    """The page in a frame of that width: (what a script in a copy of the page measured, the browser's log)."""
    page = (run / "report.html").read_text(encoding="utf-8")
    # it forbids scripts, and the probe is one
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert page.count("</body>") == 1
    (folder / "probe.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               "--enable-logging=stderr", "--v=0", f"--window-size={width + 40},1000",
               f"--user-data-dir={folder / 'profile'}", "--no-first-run", "--virtual-time-budget=20000", "--dump-dom",
               (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<script type="application/json" id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1]), done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not opened in a browser")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(run, width, tmp_path):
    seen, log = browse(run, width, tmp_path)
    assert seen["width"] == width
    assert seen["scroll"] <= width, f"the page is {seen['scroll']} px wide"
    assert seen["small"] == []
    assert len(seen["images"]) == len(FIGURES)
    # figures are drawn at 10 points and 110 dots an inch: letters of 15 px at their natural width
    for natural, shown, alt in seen["images"]:
        assert natural > 300 and 15 * shown / natural >= 12, (alt, natural, shown)
    assert all(len(alt) > 10 for *_, alt in seen["images"])
    assert seen["words"] > 2000
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    assert console == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is not opened in a browser")
def test_the_browser_check_can_fail(tmp_path):
    """A page with every fault: too wide, text too small, a broken picture, an error in the console."""
    (tmp_path / "report.html").write_text("<!DOCTYPE html><html><body><div "
                                          "style='width:900px;font-size:9px'>small</div><img src='none.png' "
                                          "alt=''><script>console.error('oh no')</script></body></html>")
    seen, log = browse(tmp_path, 400, tmp_path)
    assert seen["scroll"] >= 900 and seen["small"] and seen["images"][0][0] == 0
    assert any("oh no" in line for line in log.splitlines() if "CONSOLE" in line)


# ---------------------------------------------------------------- the data behind the figures


def curves(turn, after, prompts, seed, points=9, step=0.25):
    rng, k = np.random.default_rng(seed), np.arange(points)
    means = step * k, step * np.minimum(k, turn) + after * np.maximum(k - turn, 0)
    level = rng.normal(0, 1, prompts)  # a hard prompt is hard for both judges at all points
    return [m[:, None] + level + rng.normal(0, 0.6, (points, prompts)) for m in means]


@pytest.mark.parametrize("turn", [0, 3, 6])
@pytest.mark.parametrize("after, kind", [(-0.25, "falls"), (0.0, "stalls")])
def test_parting_point_of_known_curves(turn, after, kind):
    found = [parting_point(*curves(turn, after, 200, seed), resamples=1000) for seed in range(40)]
    near = [p is not None and (p == (turn, kind) if kind == "falls" else abs(p[0] - turn) <= 1) for p in found]
    assert sum(near) >= 36, found  # measured over 150 draws: a stall within one point in 94 % or more


def test_no_parting_point_where_gold_follows():
    assert sum(parting_point(*curves(99, 0.0, 200, seed), resamples=1000) is None for seed in range(40)) >= 38
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (2, 6, 200))
    assert parting_point(*noise, resamples=1000) is None  # nothing rises: not over-optimised
    falling = -0.3 * np.arange(6)[:, None] + noise
    assert parting_point(*falling, resamples=1000) is None
    few = [parting_point(*curves(99, 0.0, 20, seed), resamples=500) for seed in range(40)]
    assert sum(p is None for p in few) >= 34  # measured: 74 of 80 with 20 prompts


def test_parting_does_not_depend_on_units():
    proxy, gold = curves(4, -0.2, 200, 0)
    assert parting_point(proxy, gold) == parting_point(100 * proxy - 7, 0.01 * gold + 3) == (4, "falls")


@pytest.mark.parametrize("after, kind", [(-0.25, "falls"), (0.0, "stalls")])
def test_parting_point_from_the_log_of_a_trainer(after, kind):
    """Means and standard errors instead of prompts: differences are not paired, so a known turn is found there or a
    little later, never before."""
    found = []
    for seed in range(20):
        proxy, gold = curves(4, after, 300, seed)
        history = [{"loss": 1.0, "step": 1}] + [{"step": 5 * k, "eval_proxy_reward": p.mean(),
                                                 "eval_proxy_reward_se": p.std(ddof=1) / 300**0.5,
                                                  "eval_gold_reward": g.mean(),
                                                 "eval_gold_reward_se": g.std(ddof=1) / 300**0.5}
                                                for k, (p, g) in enumerate(zip(proxy, gold))]
        frame = overoptimization_steps(history, 300)
        found += frame[frame["parts"] != ""][["position", "parts"]].values.tolist()
    assert len(found) == 20 and sum(abs(position - 20) <= 5 and what == kind for position, what in found) >= 18, found
    with pytest.raises(LireError, match="too few evaluations.*eval_gold_reward"):
        overoptimization_steps([{"step": 1, "loss": 0.1}], 300)


def test_frontier_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cost, value = rng.integers(1, 6, 12).tolist(), rng.integers(-2, 5, 12).tolist()
        points = [*zip(cost, value), (0, 0)]
        expected = []
        for x, y in points[:-1]:
            better = [(c, v) for c, v in points if c <= x and v >= y and (c < x or v > y)]
            expected.append(not better)
        assert figures.non_dominated(cost, value) == expected


def test_frontier_of_runs_carries_both_intervals(run):
    frame = figures.reward_kl_frontier({"a": run, "b": run}, judge="vader")
    assert list(frame["run"]) == ["a", "a", "b", "b"] and frame["frontier"].all()
    assert (
        (frame["kl_low"] < frame["kl"])
        & (frame["kl"] < frame["kl_high"])
        & (frame["gain_low"] < frame["gain"])
        & (frame["gain"] < frame["gain_high"])
    ).all()
    with pytest.raises(LireError, match="no such judge.*gpt.*proxy, gold, vader"):
        figures.reward_kl_frontier([run], judge="gpt")


def test_worse_prompts_are_those_of_the_rows(run):
    systems = results.read_systems(run)
    for name in ("LIRE", "LIRE, round 2"):
        for judge in ("proxy", "gold", "vader"):
            found = report.explain_worse(systems, judge, name)
            mean = {n: {r["id"]: sum(r["scores"][judge]) / len(r["scores"][judge]) for r in systems[n]}
                    for n in ("start", name)}
            change = {i: mean[name][i] - mean["start"][i] for i in mean["start"]}
            assert dict(found.prompts["change"]) == pytest.approx({i: c for i, c in change.items() if c < 0})
            assert list(found.prompts["change"]) == sorted(found.prompts["change"])
            for reason, share in found.reasons["worse"].items():
                told = sum(reason in text.split(", ") for text in found.prompts["reasons"])
                assert share == pytest.approx(told / len(found.prompts)) if len(found.prompts) else math.isnan(share)
    assert "models disagree" not in " ".join(report.explain_worse(systems, "proxy").prompts["reasons"])
    with pytest.raises(LireError, match="no such judge"):
        report.explain_worse(systems, "gpt")
    with pytest.raises(LireError, match="not the same prompts"):
        report.explain_worse({"start": systems["start"], "LIRE": systems["LIRE"][::-1]})


def test_nothing_got_worse():
    row = {"id": "a", "prompt": "p", "completions": ["x"], "tokens": [3], "logps": [-1.0], "start_logps": [-1.0]}
    systems = {"start": [row | {"scores": {"gold": [0.0]}}] * 3, "new": [row | {"scores": {"gold": [1.0]}}] * 3}
    found = report.explain_worse(systems)
    assert found.prompts.empty and found.reasons["worse"].isna().all()
    assert "No prompt got worse." in [content for _, content in report._worse_parts(found)]


def test_calibration_against_a_plain_loop():
    rng = np.random.default_rng(1)
    rows = [{"id": str(i), "grades": rng.integers(0, 4, 5).tolist(), "scores": rng.normal(0, 2, 5).tolist()}
            for i in range(30)]
    pairs = []
    for row in rows:
        for i in range(5):
            for j in range(i):
                if row["grades"][i] != row["grades"][j]:
                    a, b = (i, j) if row["scores"][i] > row["scores"][j] else (j, i)
                    pairs.append((1 / (1 + math.exp(row["scores"][b] - row["scores"][a])),
                                  row["grades"][a] > row["grades"][b]))
    pairs.sort()
    found = calibration(rows, bins=5)
    assert found.pairs == len(pairs) and found.lists == 30 and found.bins["pairs"].sum() == len(pairs)
    error, start = 0.0, 0
    for size, predicted, observed in found.bins[["pairs", "predicted", "observed"]].itertuples(index=False):
        part = pairs[start : start + int(size)]
        start += int(size)
        assert predicted == pytest.approx(sum(p for p, _ in part) / size) and observed == pytest.approx(
            sum(r for _, r in part) / size
        )
        error += abs(predicted - observed) * size / len(pairs)
    assert found.error.value == pytest.approx(error)
    assert found.accuracy.value == pytest.approx(sum(r for _, r in pairs) / len(pairs))


def test_calibration_intervals_draw_lists_and_cover():
    """Perfectly calibrated scores with lists of several pairs that share their luck: 95 % intervals hold the truth
    about that often, and those over pairs would not."""
    covered, total = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(120):
            gap, flip = abs(rng.normal(0, 1.2)) + 0.05, rng.random()
            good = flip < 1 / (1 + math.exp(-gap))
            rows.append({"id": str(i), "grades": [1.0, 0.0, 0.0, 0.0] if good else [0.0, 1.0, 1.0, 1.0],
                         "scores": [gap, 0.0, 0.0, 0.0]})
        bins = calibration(rows, bins=3, resamples=400, seed=seed).bins
        covered += int(((bins["low"] <= bins["predicted"]) & (bins["predicted"] <= bins["high"])).sum())
        total += len(bins)
    assert 0.88 <= covered / total <= 0.99, covered / total


def test_calibration_says_when_there_is_too_little():
    with pytest.raises(LireError, match="too few pairs"):
        calibration([{"id": "a", "grades": [1, 0], "scores": [0.1, 0.2]}] * 3)
    with pytest.raises(LireError, match="unequal numbers"):
        calibration([{"id": "a", "grades": [1, 0], "scores": [0.1]}])


def test_win_matrix_shows_every_pair_with_its_interval(run):
    systems = results.read_systems(run)
    axis = figures.plot_win_matrix(systems, "vader").axes[0]
    cells = {t.get_position(): t.get_text() for t in axis.texts}
    assert len(cells) == 6
    for i, x in enumerate(systems):
        for j, y in enumerate(systems):
            if i != j:
                wins = [np.mean([(a > b) + (a == b) / 2 for a in p["scores"]["vader"] for b in q["scores"]["vader"]])
                        for p, q in zip(systems[x], systems[y])]
                rate, low, high = (int(n) for n in re.findall(r"(\d+)%", cells[(j, i)]))
                assert abs(rate - 100 * np.mean(wins)) <= 0.5 + 1e-9 and low <= rate <= high and low < high


def test_unmeasured_kl_is_a_dash_and_no_picture(run, tmp_path):
    """Samples at another temperature have no KL: nothing is drawn against it, and the page says so."""
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("figures", "report.*"))
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    (again / "metrics.jsonl").write_text("".join(json.dumps(r | dict.fromkeys(("value", "low", "high"))
                                                            if r["metric"] == "KL to start" else r) + "\n"
                                                 for r in rows))
    for path in (again / "evaluation").iterdir():
        lines = [json.loads(line) | {"sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "stop": []}}
                 for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    systems = results.read_systems(again)
    assert {name for name, _ in report._figures(again, systems)} == set(FIGURES) - {"reward_kl", "frontier"}
    assert "Reward against distance" not in report.report(again).read_text()
    worse = report.explain_worse(systems)
    assert worse.prompts["KL"].isna().all() and "far from the start" not in " ".join(worse.prompts["reasons"])
    assert not [table for table in report.worse_tables(worse) if "nan" in report.markdown_table(table)]
    assert "KL not measured" in report.findings(results.read_metrics(again))[0]
    with pytest.raises(LireError, match="no trained system with a KL"):
        figures.reward_kl_frontier([again])


def test_text_of_strangers_stays_text():
    """Markdown, HTML, tables and formulas in a completion show as they are: every letter is there, none is markup."""
    text = "<script>x</script> | a_b *c* `d` $e$\n\n# f"
    shown = in_markdown(text)
    assert html.unescape(shown) == " ".join(text.split()) and not set(shown) & set("<>|_*`$")


# ---------------------------------------------------------------- one look


def test_a_method_has_its_color_in_every_figure():
    """Points, rows and lines of a method, whatever else is in the figure; judges have colors that no method has."""
    systems = results.systems_of(results.load_runs("sentiment", ROOT / "data" / "results"))
    axes = figures.plot_frontier(figures.frontier_points(systems)).axes[0]
    drawn = {c.get_label(): c.lines[0].get_color() for c in axes.containers}
    assert drawn == {name: figures.METHOD_COLORS[name] for name in systems if name != "start"}
    line = figures.along({k: systems["LIRE"] for k in (1, 2)}, lambda runs: results.values_of(runs, "gold"))
    axes = figures.plot_lines({"mine": line, "LIRE, longer": line, "DPO": line, "vader": line}, "x", "y", "t").axes[0]
    shown = {c.get_label().split(" (")[0]: c.lines[0].get_color() for c in axes.containers}
    assert shown["LIRE, longer"] == figures.METHOD_COLORS["LIRE"] and shown["DPO"] == figures.METHOD_COLORS["DPO"]
    assert shown["vader"] == figures.JUDGE_COLORS["vader"] and shown["mine"] not in figures.METHOD_COLORS.values()
    judges = {c.lines[0].get_color() for c in figures.plot_gains(systems).axes[0].containers}
    assert judges == {figures.JUDGE_COLORS["gold"], figures.JUDGE_COLORS["proxy"]}


def test_fewer_than_five_seeds_are_dots_without_bars():
    systems = results.systems_of(results.load_runs("sentiment", ROOT / "data" / "results"))
    found = figures.frontier_points(systems).set_index("group").loc["LIRE"]
    values = results.gain_values(systems["LIRE"], systems["start"])
    assert [y for _, y in found["dots"]] == pytest.approx(values.mean(1).tolist()) and len(values) == 3
    assert found["gain"] == pytest.approx(values.mean()) and np.isnan([found["gain_low"], found["kl_high"]]).all()
    five = figures.bar_of(np.tile(values, (2, 1))[:5])
    assert five.low < five.value < five.high


def test_claims_of_the_protocol_replace_those_of_the_same_task_alone(monkeypatch):
    from types import SimpleNamespace

    rows = lambda *tables: SimpleNamespace(rows={t: {"table": t} for t in tables})  # noqa: E731
    results_of = claims.rows_in
    monkeypatch.setattr(claims.Claim, "quantities", lambda claim, store: ["one"] if whole else [])
    whole, claims.rows_in = True, lambda store: store
    try:
        films = claims.claims_now(rows("sentiment", "dialogue", "matched_sentiment"))
        rounds = claims.claims_now(rows("self_enhancement", "matched_rounds"))
        whole = False
        early = claims.claims_now(rows("sentiment", "matched_sentiment"))
    finally:
        claims.rows_in = results_of
    tables = lambda found: {c.table for c in found}  # noqa: E731
    assert "dialogue" in tables(films) and "matched_sentiment" in tables(films) and "sentiment" not in tables(films)
    assert [c for c in films if c.table == "dialogue"] == [c for c in claims.CLAIMS if c.table == "dialogue"] != []
    assert "self_enhancement" not in tables(rounds) and "ablations" in tables(rounds)
    assert "sentiment" in tables(early) and "matched_sentiment" not in tables(early), "before all seeds of one are run"


def test_claims_figure_draws_what_decides():
    store = results.Results(ROOT / "data" / "results")
    nowhere = replace(claims.matched_claims()[0], text="of rows that nobody made", measure=lambda store: [])
    found = claims.measure_claims([*claims.claims_now(store), nowhere], store)
    axes, = figures.plot_claims(found).axes
    drawn = sorted((c.lines[0].get_xdata()[0], c.lines[0].get_color()) for c in axes.containers)
    with_rows = {text: m for text, m in found.items() if m.verdict != "not measured"}
    deciding = {text: next(q for q in m.quantities if q.decides) for text, m in with_rows.items()}
    assert len(axes.get_yticks()) == len(with_rows) < len(found), "what has no rows is left out"
    assert drawn == sorted((q.interval.value, figures.VERDICT_COLORS[found[text].verdict])
                           for text, q in deciding.items())
    dots = [line for line in axes.lines if line.get_marker() == "." and line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in dots) == sum(q.seeds for q in deciding.values())


def test_pictures_of_the_readme_follow_from_the_rows(tmp_path):
    """Drawn again they are the stored ones; another matplotlib or another font draws other pixels."""
    import matplotlib

    pinned = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or matplotlib.__version__ != pinned[1]:
        pytest.skip("the stored pictures are those of the pinned matplotlib")
    store = results.Results(ROOT / "data" / "results")
    found = claims.measure_claims(claims.claims_now(store), store)
    for name, made in (("figures/claims", figures.plot_claims(found)),
                       ("figures/claims_narrow", figures.plot_claims(found, slim=True)),
                       ("quickstart/figures/reward_kl", figures.plot_reward_kl(RUN))):
        stored = ROOT / "data" / "results" / f"{name}.png"
        assert figures.save_figure(made, tmp_path, stored.stem)[0].read_bytes() == stored.read_bytes(), name


def test_every_page_is_on_the_map():
    index = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(c["source"]) for c in index["cells"] if c["cell_type"] == "markdown").split("## The map")[1]
    pages = {path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    assert pages <= set(re.findall(r"\]\((\w+)\.ipynb\)", text))
