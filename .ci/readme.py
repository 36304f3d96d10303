"""Write README.md from nbs/index.ipynb: `python .ci/readme.py README.md`."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written from nbs/index.ipynb by `make export`; edit the notebook. -->\n\n"


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    """The index notebook as Markdown: `#| hide` drops a cell, `#| echo: false` its source; links become relative to the
    top."""
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith("#| hide")]
    exporter = MarkdownExporter()
    parts = []
    for cell in nb.cells:
        silent = cell.cell_type == "code" and cell.source.startswith("#| echo: false")
        exporter.exclude_input = silent
        body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell], metadata=nb.metadata))
        parts.append(body.strip())
    text = re.sub(r"\]\(\.\./", "](", "\n\n".join(parts))
    text = re.sub(r"\]\((\d\d[a-z]*_\w+\.ipynb)", r"](nbs/\1", text)
    return NOTE + text + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(readme(), encoding="utf-8")
