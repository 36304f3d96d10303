"""A public name in backticks leads to its entry in the reference, once a section."""
import re

import api
from docutils import nodes
from pages import ROOT


def link_names(app, doctree, docname: str) -> None:
    "Plain words such as `report` are left alone unless they are called: they may mean something else."
    if docname.startswith("api/"):
        return
    homes, seen = app.env.lire_names, set()
    for node in list(doctree.findall(nodes.literal)):
        text = node.astext()
        name = text.removesuffix("()")
        plain = name == text and re.fullmatch(r"[a-z]+", name)
        section = _section(node)
        if name not in homes or plain or section is None or (section, name) in seen:
            continue
        seen.add((section, name))
        at = f"{app.builder.get_relative_uri(docname, f'api/{homes[name]}')}#{homes[name]}.{name}"
        link = nodes.reference("", "", refuri=at, internal=True, classes=["name"])
        node.replace_self(link)
        link += node


def _section(node: nodes.Node) -> int | None:
    "The section that holds a node; None in links and titles."
    while node is not None:
        if isinstance(node, (nodes.reference, nodes.title)):
            return None
        if isinstance(node, nodes.section):
            return id(node)
        node = node.parent
    return None


def setup(app) -> dict:
    app.connect("builder-inited", lambda app: setattr(app.env, "lire_names", api.public_names(ROOT)))
    app.connect("doctree-resolved", link_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
