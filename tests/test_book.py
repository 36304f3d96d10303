"""The book without building it: every page stands once in the table of contents, links lead somewhere, copies are clean,
and the reference says every public name. `make book` builds it, with warnings as errors."""
import ast
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci" / "book"))
import api  # noqa: E402
import check  # noqa: E402
import fold  # noqa: E402
import lead  # noqa: E402
import pages  # noqa: E402
import sidebar  # noqa: E402

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TEXTS = [*NOTEBOOKS, *(ROOT / name for name in ("README.md", *pages.ABOUT))]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("book") / "source"
    pages.prepare(folder)
    return folder


def listed(site: Path) -> list[str]:
    "The pages of all tables of contents, as Sphinx reads them."
    found = []
    for path in [site / "index.ipynb", *site.rglob("*.md")]:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", pages.text_of(path), re.DOTALL):
            for line in (line for line in block.splitlines() if line and line[0] != ":"):
                name = re.search(r"<(.+)>$", line)
                found.append((path.parent / (name[1] if name else line)).relative_to(site).as_posix())
    return found


def test_the_table_of_contents_lists_every_page_once(site):
    there = [p.relative_to(site).with_suffix("").as_posix() for p in site.rglob("*") if p.suffix in (".ipynb", ".md")]
    assert sorted([*listed(site), "index"]) == sorted(there)
    assert {p.stem for p in NOTEBOOKS} <= set(there)


def test_pages_stand_in_the_part_of_their_decade(tmp_path):
    """The order is that of the numbers; a page that no part would hold is an error."""
    order = [name for names in pages.toc().values() for name in names]
    assert order == sorted(p.stem for p in NOTEBOOKS if p.stem != "index")
    assert all(pages.PARTS[name[0]] == part for part, names in pages.toc().items() for name in names)
    (tmp_path / "07a_more.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="07a_more"):
        pages.toc(tmp_path)


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(path):
    assert pages.broken_links(path) == []


def test_a_broken_link_would_be_seen(tmp_path):
    (tmp_path / "there.md").write_text("# There\n\n## Two words, said\n")
    (tmp_path / "here.md").write_text("[a](there.md) [b](gone.md) [c](there.md#two-words-said) [d](there.md#Nowhere) "
                                      "`[e](code.md)` [f](https://example.org/x)\n```\n[g](fence.md)\n```\n")
    assert pages.broken_links(tmp_path / "here.md") == ["gone.md", "there.md#Nowhere"]


def test_copies_show_no_directive_and_lose_no_output(site):
    """Every output of a notebook is in its copy; every line of code too, but for the index, which hides its setup."""
    for path in NOTEBOOKS:
        shown = [c for c in pages.cells(site / path.name) if c["cell_type"] == "code"]
        assert not any(line.startswith("#|") for c in shown for line in pages.source(c).splitlines()), path.name
        if path.stem != "index":
            own = [c for c in pages.cells(path) if c["cell_type"] == "code"]
            assert sum(len(c["outputs"]) for c in own) == sum(len(c["outputs"]) for c in shown)
            code = [line for c in own for line in pages.source(c).splitlines() if line.strip() and line[:2] != "#|"]
            assert code == [line for c in shown for line in pages.source(c).splitlines() if line.strip()], path.name


def cell(text: str, outputs: list = ()) -> dict:
    return {"cell_type": "code", "id": "x", "metadata": {}, "source": text, "outputs": list(outputs)}


def test_what_is_folded():
    shows = {"output_type": "execute_result", "data": {"text/plain": "1"}}
    for text in ("#| export\nimport torch\nfrom x import y", "#| hide\nx = 1", "import os\nos.environ.update(A='1')",
                 "#| export\nimport logging\nlogger = logging.getLogger(__name__)"):
        assert pages.folded(cell(text)), text
    for text in ("import torch\nx = torch.ones(1)", "#| export\ndef f(): pass", "%matplotlib inline", "", "load_task()"):
        assert not pages.folded(cell(text)), text
    assert not pages.folded(cell("import os\nos.environ.get('A')", [shows]))
    made = pages.code_cell(cell("#| export\n#| slow\ndef f(): pass"), False)
    assert made["source"] == "def f(): pass" and made["metadata"]["tags"] == ["nb-export", "nb-slow"]
    assert pages.code_cell(cell("#| default_exp losses"), False) is None
    assert pages.code_cell(cell("#| echo: false\nf()", [shows]), True)["metadata"]["tags"] == ["remove-input"]


def test_jupyter_folds_what_the_book_folds():
    """Again gives the same; only the metadata of code changes; what is no plumbing any more is opened."""
    for path in NOTEBOOKS[:12]:
        own = json.loads(path.read_text(encoding="utf-8"))
        made = fold.fold(json.loads(json.dumps(own)))
        assert fold.fold(json.loads(json.dumps(made))) == made
        for then, now in zip(own["cells"], made["cells"], strict=True):
            assert {**then, "metadata": {}} == {**now, "metadata": {}}
            hidden = now["metadata"].get("jupyter", {}).get("source_hidden", False)
            assert hidden == (now["cell_type"] == "code" and pages.folded(now))
    lesson = {**cell("x = 1"), "metadata": {"jupyter": {"source_hidden": True, "outputs_hidden": True}, "tags": ["a"]}}
    assert fold.fold({"cells": [lesson]})["cells"][0]["metadata"] == {"jupyter": {"outputs_hidden": True},
                                                                      "tags": ["a"]}


def test_links_are_those_of_the_site():
    there = ROOT / "nbs"
    assert pages.to_site("[a](10_losses.ipynb)", there) == "[a](10_losses.ipynb)"
    assert pages.to_site("[a](nbs/10_losses.ipynb#What-T-does)", ROOT) == "[a](10_losses.ipynb#what-t-does)"
    assert pages.to_site("[a](../lire_nb/lab/plans.py)", there) == "[a](api/lire_nb.lab.plans.md)"
    assert pages.to_site("![a](../data/x.png)", there) == "![a](files/data/x.png)"
    assert pages.to_site("[a](../data/results) [b](../Makefile)", there) == "[a](data.md) b"
    assert pages.to_site("[a](https://example.org) [b](#here)", there) == "[a](https://example.org) [b](#here)"


def test_the_reference_says_every_public_name(site):
    """The public names are read here from the modules themselves."""
    for path in sorted((ROOT / "lire_nb").rglob("*.py")):
        public = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        if path.parent.name == "lire_nb" and path.name == "__init__.py" or not public or "'" not in public[1]:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        page = (site / "api" / f"{name}.md").read_text(encoding="utf-8")
        said = re.findall(r"^:::::::\{py:\w+\} (\w+)", page, re.MULTILINE)
        assert sorted(said) == sorted(set(ast.literal_eval(public[1])) - {"logger"}), name


def test_docments_are_read(tmp_path):
    """Beside a parameter, above it, shared by a line, of what comes back; of the fields of a class; of a value."""
    (tmp_path / "lire_nb").mkdir()
    (tmp_path / "lire_nb" / "m.py").write_text('''"""About m."""
# File to edit: ../nbs/10_m.ipynb.
__all__ = ['f', 'C', 'KINDS', 'g']
KINDS = ("a", "b")  # of things


def f(
    x,  # (B, M) values_of_it
    *rest,
    # said above,
    # in two lines
    y: "int | None" = None,
    a=1, b: float = 2.0,  # only of b
) -> int:  # how many
    "Count. Source: arXiv\\n2405.13516."


def g(x, z=1): ...


class C:
    "Holds."
    n: int = 3  # how many
    parts: dict = field(default_factory=dict)
    def go(self, far: int): "Goes."
    def _hidden(self): ...
    @property
    def size(self) -> int: "Its size."
''')
    page = api.module_page(api.Module.read(tmp_path / "lire_nb" / "m.py", tmp_path), {"f": "lire_nb.m"})
    for line in (r"| `x` | (B, M) values\_of\_it |", "| `*rest` |  |", "| `a` |  |", "| `b`<br>`float` | only of b |",
                 r"| `y`<br>`'int \| None'` | said above, in two lines |", "| *returns*<br>`int` | how many |",
                 "{py:function} f(x, *rest, y=None, a=1, b=2.0)", "[arXiv 2405.13516](https://arxiv.org/abs/2405.13516)",
                 "| `n`<br>`int = 3` | how many |", "| `parts`<br>`dict = dict()` |  |", "{py:method} C.go(far)",
                 "{py:property} C.size", "= `('a', 'b')`\n\nof things", "[10_m](../10_m.ipynb)"):
        assert line in page, line
    assert "_hidden" not in page and page.index("## At the top") < page.index(" f(") < page.index("## Functions")


def test_the_check_of_the_site_sees_what_is_wrong(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top-of-a">A</h1><a href="b.html#x">b</a><a href="#top-of-a">a</a>')
    (tmp_path / "b.html").write_text('<p id="x"></p><a href="https://example.org">out</a><img src="data:image/png,x">')
    assert check.check(tmp_path) == []
    (tmp_path / "a.html").write_text('<a href="b.html#y"></a><a href="c.html"></a><script src="https://x.org/y.js">')
    assert [line.split()[1] for line in check.check(tmp_path)] == ["loads", "leads", "leads"]
    assert check.check(tmp_path / "empty")


def test_the_extras_are_pinned():
    """What the book and JupyterLab need by name has its version in constraints.txt."""
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
              for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    for extra in ("notebook", "book"):
        names = [re.split("[<>=]", r)[0].lower() for r in config["DEFAULT"][f"{extra}_requirements"].split()]
        assert names and set(names) <= pinned, set(names) - pinned


ORDER = [name for names in pages.toc().values() for name in names]


@pytest.mark.parametrize("name", ORDER)
def test_every_page_says_what_comes_and_leads_on(name):
    """Both cells are what `make export` makes of the page today; the times are computed."""
    path = ROOT / "nbs" / f"{name}.ipynb"
    own = json.loads(path.read_text(encoding="utf-8"))
    made = lead.lead(json.loads(json.dumps(own)), name, ORDER, path.parent)
    assert made == own, f"nbs/{name}.ipynb: make export"
    door, end = pages.source(own["cells"][1]), pages.source(own["cells"][-1])
    assert own["cells"][1]["id"] == "lead" and "**Time:** about " in door
    neighbors = re.findall(r"\]\((\d\d_\w+)\.ipynb\)", end)
    place = ORDER.index(name)
    assert neighbors == [*ORDER[max(place - 1, 0):place], *ORDER[place + 1:place + 2]]
    for part in ("**You will learn** ", "**You need:** ") if name[0] in "012" or "**You " in door else ():
        assert door.count(part) == 1, f"nbs/{name}.ipynb: the cell `lead` says what one learns, and what one needs"


def test_reading_times_are_counted():
    """400 words and 50 lines are four minutes; what is folded, and what `lead.py` adds, costs nothing."""
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "word " * 400}
    code = cell("\n".join(f"x = {k}" for k in range(50)))
    plumbing, solution = cell("import os\n" * 300), cell("#| solution\n" + "x = 1\n" * 300)
    assert pages.minutes([text, code, plumbing, solution, lead.cell("lead", "word " * 900)]) == 4
    assert [pages.spoken(n) for n in (1, 9, 10, 12, 13)] == ["1 minute", "9 minutes", "10 minutes", "10 minutes",
                                                             "15 minutes"]


def test_a_page_without_these_cells_gets_them_and_keeps_its_words(tmp_path):
    for name in ("10_a", "11_b"):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": [lead.cell("t", f"# {name.upper()}\n")]}))
    nb = json.loads((tmp_path / "10_a.ipynb").read_text())
    made = lead.lead(nb, "10_a", ["10_a", "11_b"], tmp_path)
    assert [c["id"] for c in made["cells"]] == ["t", "lead", "onward"]
    assert "11_b.ipynb" in pages.source(made["cells"][-1]) and "Before" not in pages.source(made["cells"][-1])
    made["cells"][1] = lead.cell("lead", "Words.\n\n**Time:** about 99 minutes.")
    again = lead.lead(made, "10_a", ["10_a", "11_b"], tmp_path)
    assert pages.source(again["cells"][1]) == "Words.\n\n**Time:** about 1 minute."


METHOD = [name for name in ORDER if name[0] == "1" or name[:2] in "20 21 22 23 24 27 28 29 80 81 82 83 84 85 86".split()]


@pytest.mark.parametrize("name", METHOD)
def test_a_page_of_the_method_has_two_exercises_with_solutions(name):
    """A question, an answer in words that is folded, and code that was run and is folded."""
    own = pages.cells(ROOT / "nbs" / f"{name}.ipynb")
    texts = "\n".join(pages.source(c) for c in own if c["cell_type"] == "markdown")
    solutions = [c for c in own if pages.is_solution(c)]
    assert len(solutions) == 2 and texts.count("<details><summary>Solution") == 2 == texts.count("</details>")
    for c in solutions:
        assert c["outputs"] and c["metadata"]["jupyter"] == {"outputs_hidden": True, "source_hidden": True}
        assert "assert" in pages.source(c), "a solution proves what it says"


def needed(path: Path) -> list[str]:
    "The pages that a page asks its reader to know, as its lead says."
    lead_cell = next((pages.source(c) for c in pages.cells(path) if c.get("id") == "lead"), "")
    said = re.search(r"\*\*You need:?\*\*:?(.*)", lead_cell)
    return re.findall(r"\]\((\d\d_\w+)\.ipynb", said[1]) if said else []


def test_what_a_page_needs_comes_before_it():
    """In the order of reading, which is also that of the links before and next."""
    order = [name for names in pages.toc().values() for name in names]
    needs = {name: needed(ROOT / "nbs" / f"{name}.ipynb") for name in order}
    late = [(name, other) for name, others in needs.items() for other in others
            if order.index(other) >= order.index(name)]
    assert not late, late
    silent = [name for name, others in needs.items() if not others]
    assert len(silent) < 10, f"what does a reader of these pages need? {silent}"


def test_the_door_leads_through_all_pages_of_the_method_in_their_order():
    """What the README names as the tutorial is what before and next lead through: no page is needed that it leaves
    out."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    door = readme[readme.index("## Learn"):].split("\n\n")[1]
    order = pages.toc()["Start"] + pages.toc()["The method"]
    assert re.findall(r"\]\(nbs/(\d\d_\w+)\.ipynb", door) == order


def test_the_six_lines_of_the_readme_are_those_of_the_whole_way():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Six lines\n\n```python\n(.*?)```", readme, re.DOTALL)[1].splitlines()
    lines = [line for line in block if line and not line.startswith("from ")]
    whole = pages.text_of(ROOT / "nbs" / "00_whole_way.ipynb")
    assert lines == re.findall(r"^\| `(.+?)` \|", whole, re.MULTILINE) and len(lines) == 6
    assert max(map(len, block)) <= 120


def test_the_side_bar_is_drawn_once_and_each_page_finds_itself():
    item = '<li class="toctree-l{}{}"><a class="{}reference internal" href="{}">{}</a>{}</li>\n'.format
    drawn = ('<ul class="current nav">\n' + item(1, "", "", "../a.html", "A", "")
             + item(1, " current active has-children", "", "index.html", "Api", '<details open="open"><ul class="current">'
                    + item(2, " current active", "current ", "#", "x", "") + item(2, "", "", "y.html", "y", "")
                    + "</ul></details>") + "</ul>")
    table = sidebar.unmarked(drawn, "api/x")
    assert not re.search('current|open=|"#"', table)
    assert re.findall('href="(.*?)"', table) == ["a.html", "api/index.html", "api/x.html", "api/y.html"]
    first, other = sidebar.marked(table, "a"), sidebar.marked(table, "api/y")
    assert re.findall('href="(.*?)"', first) == ["#", "api/index.html", "api/x.html", "api/y.html"]
    assert '<li class="toctree-l1 current active"><a class="current reference internal" href="#">A</a>' in first
    assert re.findall('href="(.*?)"', other) == ["../a.html", "index.html", "x.html", "#"]
    assert other.count(" current active") == 2 and '<details open="open">' in other and "open=" not in first
    assert sidebar.marked(table, "search") == table  # a page that is in no table


def test_a_figure_with_a_slim_sibling_is_shown_as_screens_ask():
    text = pages.to_site("![said](data/results/figures/claims.png)", ROOT)
    assert text == ("![said](files/data/results/figures/claims.png){.on-wide}"
                    "![said](files/data/results/figures/claims_narrow.png){.on-narrow}")
    css = (ROOT / ".ci" / "book" / "static" / "book.css").read_text(encoding="utf-8")
    assert "img.on-wide { display: none; }" in css and "img.on-narrow { display: inline; }" in css
    head = (ROOT / "data" / "results" / "figures" / "claims.png").read_bytes()[:24]
    assert pages.png_width(head) == 1376
