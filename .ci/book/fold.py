"""Fold imports and setup in JupyterLab too: `python .ci/book/fold.py nbs/*.ipynb`, a part of `make export`.

The book and Jupyter fold the same cells. Only a cell's metadata changes: `{"jupyter": {"source_hidden": true}}`.
"""
import json
import sys
from pathlib import Path

import pages


def fold(nb: dict) -> dict:
    "A notebook whose plumbing is folded; a cell that has become a lesson is opened again."
    for cell in (c for c in nb["cells"] if c["cell_type"] == "code"):
        own = cell["metadata"].get("jupyter", {})
        own = {**{k: v for k, v in own.items() if k != "source_hidden"},
               **({"source_hidden": True} if pages.folded(cell) else {}),
               **({"outputs_hidden": True} if pages.is_solution(cell) else {})}
        rest = {k: v for k, v in cell["metadata"].items() if k != "jupyter"}
        cell["metadata"] = {**({"jupyter": own} if own else {}), **rest}
    return nb


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        made = json.dumps(fold(json.loads(text)), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if made != text:
            path.write_text(made, encoding="utf-8")
