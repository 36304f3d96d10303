"""The notebooks are the source: each one runs, and what is made from them is in step."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from yardstick import import_seconds

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
EXPECTED = [
    "00_whole_way",
    "10_losses", "11_rivals", "12_records", "13_conversations", "14_sampling", "15_rewards", "16_shared_prompt",
    "17_logprobs", "18_training", "19_enhancement",
    "20_statistics", "21_preferences", "22_evaluation", "23_watching", "24_temperature", "25_path_check",
    "26_settings", "27_adapters", "28_proxy", "29_decisions",
    "30_errors", "31_files", "32_layouts", "33_lists", "34_tasks", "35_models", "36_identity", "37_versions",
    "38_resume", "39_servers",
    "40_experiments", "41_plans", "42_runner", "43_results", "44_claims", "45_figures", "46_report", "47_bench",
    "48_memory", "49_trl_online",
    "50_verdicts", "51_chat", "52_sheets", "53_linear_judge", "54_stored_texts", "55_protocol", "56_trials",
    "57_courses", "58_published", "59_again",
    "60_cli", "61_compare", "62_cards", "63_extend", "64_own_lists", "65_options", "66_answers",
    "70_long_lists", "71_launch", "72_many_lists", "73_handover", "74_ranks",
    "80_exploration", "81_demonstrations", "82_selection", "83_multi_turn", "84_guided_sampling",
    "85_feasible_rewards", "86_uncertain_rewards", "87_frontiers",
    "90_methods", "91_losses", "92_candidates", "93_ablations", "94_rounds", "95_overoptimization", "96_transfer",
    "97_cost", "98_neighbors",
    "index",
]
DRAWN = [name for name in EXPECTED if name >= "90"]  # from data/results alone
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}", "HF_HUB_OFFLINE": "1"}


def cells(name: str) -> list[dict]:
    return json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def run(*command, cwd=ROOT):
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=cwd, env=ENV, capture_output=True, text=True)


def test_every_expected_notebook_is_there_and_no_other():
    assert sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb")) == sorted(EXPECTED)
    assert not list((ROOT / "nbs").glob("**/.notest"))


# those of more than ten seconds begin first, so that no worker ends long after the other
LONG = ("18_training", "19_enhancement", "42_runner", "14_sampling", "40_experiments", "22_evaluation", "46_report",
        "15_rewards", "17_logprobs", "34_tasks", "36_identity", "00_whole_way", "60_cli", "35_models", "10_losses")


SAMPLED = {"a4df752a", "136a5706"}  # cells that print what a real policy drew: other words on another processor
# writes what the cells before it have shown, of the notebook that another thread is running
WITNESS = """import json, sys
for frame in sys._current_frames().values():
    while frame is not None and frame.f_code.co_name != "run_all":
        frame = frame.f_back
    if frame is not None:
        shown = {c.id: c.outputs for c in frame.f_locals["nb"].cells if c.cell_type == "code" and "outputs" in c}
        open(%r, "w").write(json.dumps(shown, default=str))"""


@pytest.mark.parametrize("name", [*LONG, *(name for name in EXPECTED if name not in (*LONG, *DRAWN))])
def test_notebook_runs(name, tmp_path):
    """nbdev_test, forked from a process that has imported the libraries, runs the notebook, and a cell added at its end
    proves that the run came that far."""
    nbs = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs", nbs, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for entry in ("settings.ini", "lire_nb", "data"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    notebook = json.loads((nbs / f"{name}.ipynb").read_text(encoding="utf-8"))
    witness = tmp_path / "reached"
    notebook["cells"].append({"cell_type": "code", "id": "witness", "metadata": {}, "execution_count": None,
                              "outputs": [], "source": WITNESS % str(witness)})
    (nbs / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    done = warm.run(BIN / "nbdev_test", "--path", f"nbs/{name}.ipynb", "--n_workers", "0", cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert witness.exists(), "nbdev_test reported success without running the notebook to its end"
    now = {id: lines(outputs) for id, outputs in json.loads(witness.read_text()).items()}
    stale = {c["id"]: other for c in cells(name) if c["id"] in now and c["id"] not in SAMPLED
             and (other := lines(c["outputs"]) ^ now[c["id"]])}
    assert not stale, f"nbs/{name}.ipynb: a stored output has other words than its cell writes: run it again: {stale}"


def lines(outputs: list[dict]) -> set[str]:
    """What a cell has said, without its numbers: lines printed, sentences and values shown. Warnings come where another
    run hears them too; tables are cut as the shell likes."""
    said = [o.get("text") or next((o["data"][k] for k in ("text/markdown", "text/plain") if k in o.get("data", {})), "")
            for o in outputs if o.get("name") != "stderr" and "text/html" not in o.get("data", {})]
    text = "\n".join("".join(one) for one in said)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # nbdev_clean takes these away
    masked = re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", re.sub(r"\b([0-9a-f]{7,}|tmp\w{8})\b", "#", text))
    return {line.strip() for line in masked.splitlines() if line.strip()}


@pytest.mark.parametrize("name", EXPECTED)
def test_notebook_skips_nothing_but_slow_cells_and_carries_its_outputs(name):
    skipping = re.compile(r"^#\|\s*(eval:\s*false|notest|skip_exec)", re.MULTILINE | re.IGNORECASE)
    for cell in cells(name):
        if cell["cell_type"] == "raw":
            assert "skip_exec" not in source(cell)
        if cell["cell_type"] != "code":
            continue
        assert not skipping.search(source(cell)), source(cell)[:200]
        assert not any(o["output_type"] == "error" for o in cell["outputs"]), source(cell)[:200]
        text = json.dumps(cell["outputs"])
        assert "jupyter.widget" not in text, f"a progress bar in an output: {source(cell)[:200]}"
        assert ("site-packages" not in text
                and str(Path.home()) + "/" not in text), f"a path of one machine in an output: {source(cell)[:200]}"
        if re.match(r"#\|\s*slow", source(cell)):
            assert cell["outputs"], f"a slow cell must carry its stored output: {source(cell)[:200]}"
    assert "widgets" not in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["metadata"]
    shown = [c for c in cells(name) if c["cell_type"] == "code" and c["outputs"]]
    assert shown, f"{name} shows no output at all"


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    """A copy of the project after export and clean-up."""
    copy = tmp_path_factory.mktemp("again")
    for entry in ("settings.ini", "pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / entry, copy / entry)
    for folder in ("nbs", "lire_nb"):
        shutil.copytree(ROOT / folder, copy / folder,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for command in (("nbdev_export",), ("nbdev_clean",)):
        done = run(*command, cwd=copy)
        assert done.returncode == 0, done.stderr[-3000:]
    return copy


def test_modules_are_the_export_of_the_notebooks(again):
    files = sorted(p.relative_to(ROOT / "lire_nb") for p in (ROOT / "lire_nb").rglob("*.py"))
    assert files == sorted(p.relative_to(again / "lire_nb") for p in (again / "lire_nb").rglob("*.py"))
    for name in files:
        assert (ROOT / "lire_nb" / name).read_text() == (again / "lire_nb" / name).read_text(), (
            f"lire_nb/{name} is not the export of its notebook: make export"
        )


def test_no_line_of_the_package_is_wider_than_120():
    """What nbdev writes itself, the index and the lists of public names, keeps the width of nbdev."""
    wide = []
    for path in (ROOT / "lire_nb").rglob("*.py"):
        text = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        if path.name != "_modidx.py":
            wide += [f"{path.name}: {line}" for line in text.splitlines() if len(line) > 120]
    assert not wide, wide


@pytest.mark.parametrize("name", EXPECTED)
def test_notebook_is_clean(again, name):
    assert (ROOT / "nbs" / f"{name}.ipynb").read_text() == (again / "nbs" / f"{name}.ipynb").read_text(), (
        f"nbs/{name}.ipynb is not clean: make export"
    )


def test_readme_is_the_index_notebook():
    made = run("python", "-c",
               "import sys; sys.path.insert(0, '.ci'); import readme; sys.stdout.write(readme.readme())")
    assert made.returncode == 0, made.stderr[-3000:]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert made.stdout == readme, "README.md is not the index notebook: make export"


SECONDS = {}  # of the processor, for each notebook that is drawn from results
# what pandas chooses for itself where it finds a kernel
IN_A_KERNEL = "import pandas as _pd\n_pd.set_option('display.max_columns', 20)"


@pytest.mark.parametrize("name", DRAWN)
def test_notebook_runs_and_its_tables_follow_from_the_committed_results(name, tmp_path):
    """The stored tables and sentences of a notebook are what its cells give now, run to the end in the shell of
    nbdev_test."""
    nbs = tmp_path / "nbs"
    nbs.mkdir()
    notebook, witness = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")), tmp_path / "reached"
    ends = f"from pathlib import Path as _P\n_P({str(witness)!r}).write_text('end')"
    added = [{"cell_type": "code", "id": f"added-{k}", "metadata": {}, "execution_count": None, "outputs": [],
              "source": text} for k, text in enumerate((IN_A_KERNEL, ends))]
    (nbs / f"{name}.ipynb").write_text(json.dumps({**notebook, "cells": [added[0], *notebook["cells"], added[1]]}),
                                       encoding="utf-8")
    (tmp_path / "data").symlink_to(ROOT / "data")
    done = warm.run(BIN / "exec_nb", f"{name}.ipynb", "--dest", "run.ipynb", "--exc_stop", cwd=nbs, env=ENV)
    SECONDS[name] = done.seconds
    assert done.returncode == 0, done.stderr[-3000:]
    assert witness.exists(), "the run did not come to the end of the notebook"
    follows(name, outputs(nbs / "run.ipynb")[1:-1])


def test_a_kernel_gives_what_the_notebooks_carry(tmp_path):
    """The same of Jupyter, for the notebook that the README is made from."""
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "index.ipynb", tmp_path / "nbs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    done = run("jupyter", "nbconvert", "--log-level=ERROR", "--to", "notebook", "--execute", "--output", "run.ipynb",
               "nbs/index.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    follows("index", outputs(tmp_path / "nbs" / "run.ipynb"))


def follows(name: str, again: list) -> None:
    stored = outputs(ROOT / "nbs" / f"{name}.ipynb")
    assert len(again) == len(stored)
    for now, then in zip(again, stored):
        assert now == then, f"nbs/{name}.ipynb: a stored output does not follow from data/results: make notebooks"


def outputs(path: Path) -> list:
    """What the code cells show as text; pictures are drawn from the same values."""
    return [[(o.get("text"), {k: v for k, v in o.get("data", {}).items() if k.startswith("text")})
             for o in c["outputs"]]
            for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_drawing_from_results_is_quick():
    if len(SECONDS) < len(DRAWN):
        pytest.skip("runs after all of the notebooks that are drawn from results")
    one = import_seconds()  # the libraries are imported before; with them one more for each notebook
    assert sum(SECONDS.values()) < 2.5 * one * len(DRAWN), (one, SECONDS)
