"""Math without scripts and without a network: TeX becomes MathML while the book is built, and the browser draws it."""
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import SphinxError
from sphinx.util.math import get_node_equation_number


def to_mathml(tex: str, display: str) -> str:
    """A formula that cannot be read stops the build, as every warning does."""
    try:
        return convert(tex.strip(), display=display)
    except Exception as e:  # the converter has an error for each thing that may be wrong
        raise SphinxError(f"latex2mathml cannot read {tex!r}: {type(e).__name__} {e}") from e


def inline(self, node) -> None:
    self.body.append(f'<span class="formula">{to_mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def block(self, node) -> None:
    self.body.append(self.starttag(node, "div", CLASS="formula"))
    self.body.append(to_mathml(node.astext(), "block"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
