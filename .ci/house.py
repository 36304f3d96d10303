"""The house in figures: `python .ci/house.py` for the working tree, `python .ci/house.py REVISION …` for commits beside
it, `python .ci/house.py --picture` for the layers.

Per notebook: cells of text per cell of code, exported cells (number, median and longest lines), where the verb is first
used (0 is the top, 1 the end of the page) and visible checks per public name. Per module: lines, imports, private share
of its top-level names, lines past 120. For the package: logical statements, and the lines that are loaded to draw a
table.
"""
import ast
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 120
# What a reader comes to a page for; several where the verb had another name.
VERBS = {
    "losses": "lire_loss", "rivals": "dpo_loss|infonca_loss", "records": "make_record", "lists": "load_lists",
    "layouts": "load_lists|LAYOUTS",
    "conversations": "render_prompt|encode_conversation", "tasks": "load_task", "models": "load_policy",
    "sampling": "sample_lists",
    "rewards": "score_lists", "shared_prompt": "packed_rows", "logprobs": "list_logps", "training": "LIRETrainer|train",
    "resume": "ExactTrainer|last_checkpoint",
    "enhancement": "self_enhance", "statistics": "bootstrap_interval", "preferences": "win_rate",
    "evaluation": "judge_policy|evaluate_systems",
    "watching": "EvaluationCallback", "temperature": "suggest_temperature", "path_check": "check_paths",
    "settings": "parse_settings|parse_value",
    "errors": "LireError|ListError", "shown": "visible", "files": "atomic_write|read_rows",
    "identity": "policy_identity|claim_folder", "versions": "version",
    "servers": "run_requests", "experiments": "run_experiment", "plans": "plan", "runner": "reproduce",
    "reproduce": "reproduce",
    "results": "load_runs|read_systems", "claims": "verdict_table", "tables": "verdict_table",
    "figures": "plot_frontier|plot_before_after", "report": "report",
    "reporting": "report", "bench": "bench_point|interleaved", "memory": "memory_plan", "scale": "memory_plan",
    "trl_online": "train_online",
    "online": "train_online", "verdicts": "judge_pairs", "judging": "judge_pairs", "chat": "ChatJudge",
    "sheets": "make_sheets", "cli": "main",
    "long_lists": "list_logps_in_parts", "adapters": "put_adapter|Policy|train_policy",
    "proxy": "parting_point|calibration",
    "exploration": "optimism",
    "demonstrations": "demo_loss|self_play",
    "decisions": "decide",
    "options": "settings_of|option",
    "handover": "read_probe",
    "ranks": "split_rows",
    "frontiers": "gain_at_distance",
    "linear_judge": "train_linear_judge",
    "protocol": "trial_plan",
    "trials": "run_experiment",
    "texts": "judge_texts",
    "courses": "at_common_distance",
    "published": "paper_table",
    "again": "run_again",
    "compare": "compare",
    "answers": "answer_of",
    "own_lists": "split_by_prompt|look_at_lists",
    "cards": "model_card",
    "launch": "launched_as|check_engine",
    "many_lists": "whole_table|kept_rows",
    "extend": "own_loss",
    "selection": "select",
    "multi_turn": "conversation_record|sample_conversations",
    "guided": "guided_lists",
    "feasible_rewards": "lp_rewards",
    "uncertain_rewards": "RewardEnsemble|mix_rewards", "neighbors": "plan",
}


# Lowest first: a room imports from its own layer and from those below.
LAYERS = {
    "base": ("base.errors", "base.files", "base.versions", "base.ranks"),
    "losses, records": ("losses", "rivals", "records", "conversations", "layouts", "lists", "exploration",
                        "demonstrations", "many_lists"),
    "statistics": ("statistics", "preferences", "proxy", "decisions", "frontiers"),
    "tasks, models": ("tasks", "models", "adapters", "identity", "servers", "cards"),
    "lists in, numbers out": ("sampling", "rewards", "shared_prompt", "path_check", "logprobs", "long_lists",
                              "selection", "guided", "multi_turn", "feasible_rewards", "uncertain_rewards",
                              "handover", "linear_judge"),
    "training": ("settings", "temperature", "resume", "training", "launch"),
    "enhancement": ("enhancement",),
    "evaluation": ("evaluation",),
    "watching": ("watching",),
    "judges": ("judges.verdicts", "judges.chat", "judges.sheets"),
    "lab": ("lab.memory", "lab.trl_online", "lab.plans", "lab.experiments", "lab.results", "lab.runner",
            "lab.claims", "lab.figures", "lab.report", "lab.bench", "lab.neighbors", "lab.extend",
            "lab.protocol", "lab.trials", "lab.texts", "lab.courses", "lab.published", "lab.own_lists",
            "lab.answers", "lab.compare", "lab.again"),
    "cli": ("cli", "options"),
}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and re.match(r"(#\|.*\n)*#\|\s*exporti?\b", source(cell)) is not None


def is_definition(text: str) -> bool:
    """Whether a cell holds more than imports."""
    return any(not isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(text).body)


def size(text: str) -> int:
    return len([line for line in text.splitlines() if line.strip() and not line.startswith("#|")])


def notebook(path: Path) -> dict | None:
    """The figures of a page that exports a module; None for one that does not."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    module = next((m[1] for c in cells if (m := re.search(r"^#\| default_exp (\S+)", source(c), re.M))), None)
    if module is None:
        return None
    exported = [source(c) for c in cells if is_exported(c) and is_definition(source(c))]
    visible = [c for c in cells if c["cell_type"] == "markdown"
               or not source(c).startswith(("#| hide", "#| default_exp"))]
    code = [c for c in visible if c["cell_type"] == "code"]
    verb = re.compile(rf"\b({VERBS[module.split('.')[-1]]})\b")
    place = next((i for i,
                  c in enumerate(visible) if c["cell_type"] == "code" and verb.search(source(c))
                  and is_definition(source(c))), len(visible))
    public = {n for text in exported for n in names(ast.parse(text)) if not n.startswith("_") and n != "logger"}
    checks = sum(source(c).count("assert") + len(re.findall(r"\b(?:expect_error|test_\w+)\(", source(c))) for c in code
                 if not is_exported(c))
    sizes = [size(text) for text in exported]
    return {"module": module, "text:code": round((len(visible) - len(code)) / max(len(code), 1), 2),
            "exported": len(exported),
            "median": statistics.median(sizes), "longest": max(sizes), "unexplained > 40": sum(
                size(t) > 40 and not re.match(r"(#\|.*\n)+# long: ", t) for t in exported),
            "verb at": round(place / len(visible), 2), "checks": round(checks / max(len(public), 1), 1)}


def names(tree: ast.Module) -> set[str]:
    """What a module defines at its top level."""
    found = {s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))}
    for statement in tree.body:
        targets = (
            statement.targets
            if isinstance(statement, ast.Assign)
            else [statement.target]
            if isinstance(statement, ast.AnnAssign)
            else []
        )
        found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found - {"__all__"}


def statements(tree: ast.Module) -> int:
    """Logical statements, docstrings not counted."""
    return sum(isinstance(n, ast.stmt) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
               for n in ast.walk(tree))


def modules(root: Path) -> dict[str, dict]:
    rows = {}
    for path in sorted((root / "lire_nb").rglob("*.py")):
        name = ".".join(path.relative_to(root / "lire_nb").with_suffix("").parts)
        if path.name in ("_modidx.py", "__init__.py"):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        own = names(tree)
        rows[name] = {"lines": text.count("\n"),
                      "imports": sum(isinstance(s, (ast.Import, ast.ImportFrom)) for s in tree.body),
                      "private": f"{sum(n.startswith('_') for n in own) / max(len(own), 1):.0%}",
                      "statements": statements(tree),
                      # nbdev wraps its own `__all__` before it writes the name in front of it
                      "wide": sum(len(line) > WIDTH and not line.startswith("__all__ = ")
                                  for line in text.splitlines())}
    return rows


def imports(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms it imports, inside functions too."""
    trees = {".".join(p.relative_to(root / "lire_nb").with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8"))
             for p in sorted((root / "lire_nb").rglob("*.py")) if p.name not in ("_modidx.py", "__init__.py")}
    found = {room: set() for room in trees}
    for room, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aims = [a.name.split(".", 1)[1] for a in node.names if a.name.startswith("lire_nb.")]
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "lire_nb"):
                where = [*room.split(".")[: -node.level],
                         *(node.module or "").split(".")] if node.level else node.module.split(".")[1:]
                where = ".".join(filter(None, where))
                aims = [where] if where in trees else [f"{where}.{a.name}".lstrip(".") for a in node.names]
            else:
                continue
            found[room] |= {aim for aim in aims if aim in trees}
    return found


def picture(root: Path) -> str:
    """The layers, highest first, with their rooms and the layers that they import from."""
    of, arrows_of, lines = {room: layer for layer, rooms in LAYERS.items() for room in rooms}, imports(root), []
    for layer, rooms in reversed(LAYERS.items()):
        below = {of[other] for room in rooms for other in arrows_of.get(room, ()) if of.get(other) != layer}
        arrows = ", ".join(other for other in reversed(LAYERS) if other in below)
        lines.append(f"{layer:22} {' '.join(r.split('.')[-1] for r in rooms)}" + (f"\n{'':22} -> {arrows}"
                                                                                  if arrows else ""))
    return "\n".join(lines)


LOADED = """
import json, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv[1])
try:
    from lire_nb.lab.claims import verdict_table
    from lire_nb.lab.figures import plot_gains
except ModuleNotFoundError:
    from lire_nb.tables import plot_gains, verdict_table
print(json.dumps([m.__file__ for n, m in list(sys.modules.items()) if n.startswith("lire_nb")]))
"""


def loaded(root: Path) -> int:
    """Lines of this package that drawing a table imports."""
    done = subprocess.run([sys.executable, "-c", LOADED, str(root)], capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise SystemExit(done.stderr)
    return sum(Path(f).read_text(encoding="utf-8").count("\n") for f in json.loads(done.stdout.splitlines()[-1]) if f)


def table(rows: dict[str, dict]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(str(row[c]) for c in columns) + " |" for name,
                              row in rows.items()])


def summary(root: Path) -> dict:
    """The house in one line."""
    pages, rooms = [p for p in map(notebook, sorted((root / "nbs").glob("*.ipynb"))) if p], modules(root)
    exported = [size(source(c)) for p in (root / "nbs").glob("*.ipynb")
                for c in json.loads(p.read_text(encoding="utf-8"))["cells"]
                if is_exported(c) and is_definition(source(c))]
    return {"pages": len(pages), "modules": len(rooms), "lines": sum(r["lines"] for r in rooms.values()),
            "statements": sum(r["statements"] for r in rooms.values()),
            "largest module": max(r["lines"] for r in rooms.values()),
            "wide": sum(r["wide"] for r in rooms.values()), "exported cells": len(exported),
            "median": statistics.median(exported),
            "unexplained > 40": sum(p["unexplained > 40"] for p in pages),
            "verb past a third": sum(p["verb at"] > 1 / 3 for p in pages),
            "loaded for a table": loaded(root)}


def main(*revisions: str) -> None:
    if revisions == ("--picture",):
        return print(picture(ROOT))
    rows = {}
    for revision in revisions:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(["git", "archive", revision, "nbs", "lire_nb", "data", "settings.ini"], cwd=ROOT,
                                     capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            rows[revision] = summary(Path(folder))
    rows["now"] = summary(ROOT)
    print(table(rows), end="\n\n")
    print(table({p.stem: {k: v for k, v in page.items() if k != "module"}
                 for p in sorted((ROOT / "nbs").glob("*.ipynb")) if (page := notebook(p))}), end="\n\n")
    print(table(modules(ROOT)))


if __name__ == "__main__":
    main(*sys.argv[1:])
