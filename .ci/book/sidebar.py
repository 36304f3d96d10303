"""The table of contents at the side. The theme draws it for every page anew, which is a third of the time of the book:
here it is drawn once, and each page only marks its own place."""
import posixpath
import re
from types import SimpleNamespace

HERE = " current active"
LINK = re.compile(r'href="([^"#]+)"')


def unmarked(drawn: str, page: str) -> str:
    "A table as the theme drew it for a page, with links from the top of the site and without the place of that page."
    for marked, plain in ((HERE, ""), ('class="current ', 'class="'), ('<ul class="current">', "<ul>"),
                          ('<details open="open">', "<details>"), ('href="#"', f'href="{posixpath.basename(page)}.html"')):
        drawn = drawn.replace(marked, plain)
    folder = posixpath.dirname(page)
    return LINK.sub(lambda found: f'href="{posixpath.normpath(posixpath.join(folder, found[1]))}"', drawn)


def marked(table: str, page: str) -> str:
    "The table with links from a page, its own place shown, and the chapter that holds it opened."
    place = re.compile(rf'<li class="(toctree-l\d[^"]*)"><a class="reference internal" href="{re.escape(page)}.html">')
    table = place.sub(rf'<li class="\1{HERE}"><a class="current reference internal" href="#">', table)
    folder = posixpath.dirname(page)
    if folder:
        chapter = re.compile(rf'<li class="(toctree-l\d[^"]*?)(?:{HERE})?">(<a class="[^"]*" '
                             rf'href="(?:#|{folder}/index.html)">[^<]*</a>)<details>')
        table = chapter.sub(rf'<li class="\1{HERE}">\2<details open="open">', table)
    return LINK.sub(lambda found: f'href="{posixpath.relpath(found[1], folder or ".")}"', table)


def draw(app, page: str, template: str, context: dict, doctree) -> None:
    "Give the template its table; it is drawn when the first page asks."
    def contents(**settings) -> str:
        if not hasattr(drawn, "table"):
            drawn.table = unmarked(str(context["generate_toctree_html"](**settings)), page)
        return marked(drawn.table, page)
    drawn = app.env.lire_contents
    context["contents"] = contents


def setup(app) -> dict:
    app.connect("env-updated", lambda app, env: setattr(env, "lire_contents", SimpleNamespace()))
    app.connect("html-page-context", draw, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
