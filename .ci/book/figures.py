"""Pictures fit into the page, whatever its width, and lead to themselves in full size."""
from pathlib import Path

from docutils import nodes
from pages import png_width


def full_size(app, doctree, docname: str) -> None:
    "A picture whose width is told is one that Sphinx links to its file."
    for node in doctree.findall(nodes.image):
        path = Path(app.srcdir, node["uri"])
        if "width" not in node and path.suffix == ".png" and path.is_file():
            with path.open("rb") as file:
                node["width"] = f"{png_width(file.read(24))}px"


def setup(app) -> dict:
    app.connect("doctree-resolved", full_size)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
