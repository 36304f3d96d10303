"""The pages of the book, made ready for Sphinx: `python .ci/book/pages.py build/book/source`.

The notebooks stay as they are. Their copies get what a reader of a site needs: imports and setup folded, directives of
nbdev taken out, the place in the book and the reading time under the title, links that lead to other pages. The
standard library is enough for it.
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

import api

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"0": "Start", "1": "The method", "2": "Trust", "3": "Files and survival", "4": "The lab", "5": "Judges",
         "6": "The command line", "7": "Beyond one process", "8": "Beside LIRE", "9": "Findings"}
ABOUT = {"data/README.md": "data", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}  # file -> page
DIRECTIVE = re.compile(r"^#\|\s*(\w+)(.*)\n?", re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^)\s]+)\)")
WORDS_A_MINUTE, CODE_LINES_A_MINUTE = 200, 25
KEPT = ("lead", "onward")  # cells that `lead.py` keeps


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def toc(nbs: Path = ROOT / "nbs") -> dict[str, list[str]]:
    """Part -> its pages, in the order of their numbers; the index is the door and stands in no part."""
    found = {}
    for name in sorted(p.stem for p in nbs.glob("*.ipynb") if p.stem != "index"):
        if not (re.match(r"\d\d_\w+$", name) and name[0] in PARTS):
            raise ValueError(f"{name}.ipynb: a page begins with two digits, and its decade has a part in {__file__}")
        found.setdefault(PARTS[name[0]], []).append(name)
    return found


def title(path: Path) -> str:
    found = next((re.match(r"# +(.+)", source(c)) for c in cells(path) if c["cell_type"] == "markdown"), None)
    if not found:
        raise ValueError(f"{path.name}: the first text begins with `# ` and the title")
    return found[1].replace('`', '').strip()


def prose(text: str) -> str:
    "A text without its blocks and spans of code, where links and headings are only characters."
    text = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)[^`\n]+?\1", "`code`", text)


def links(text: str) -> list[str]:
    "The relative links of a text."
    return [to for _, to in LINK.findall(prose(text)) if not re.match(r"[a-z]+:", to)]


def anchor(heading: str) -> str:
    "What a site makes of a heading; Jupyter keeps the capitals."
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str) -> set[str]:
    fenceless = re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return {anchor(line) for line in re.findall(r"^#+ +(.+)$", fenceless, re.MULTILINE)}


def text_of(path: Path) -> str:
    "All that is text in a page."
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")


def broken_links(path: Path) -> list[str]:
    "Relative links of a page that lead to no file, or to no heading of it."
    lost = []
    for to in links(text_of(path)):
        file, _, fragment = to.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or fragment and anchor(fragment.replace("-", " ")) not in headings(text_of(there)):
            lost.append(to)
    return lost


def minutes(nb: list[dict]) -> int:
    "How long a page takes to read; what is folded is left out, and what `lead.py` adds."
    nb = [c for c in nb if c.get("id") not in KEPT]
    words = sum(len(source(c).split()) for c in nb if c["cell_type"] == "markdown")
    lines = sum(source(c).count("\n") + 1 for c in nb if c["cell_type"] == "code" and not folded(c))
    return max(1, round(words / WORDS_A_MINUTE + lines / CODE_LINES_A_MINUTE))


def spoken(spent: int) -> str:
    "From ten minutes on in steps of five."
    spent = spent if spent < 10 else 5 * round(spent / 5)
    return f"{spent} minute{'s' * (spent > 1)}"


def is_solution(cell: dict) -> bool:
    "The code behind an exercise: `#| solution`. A reader opens it after a try."
    return cell["cell_type"] == "code" and source(cell).startswith("#| solution")


def _is_plumbing(node: ast.stmt) -> bool:
    "An import, a logger, or a call that only sets something up."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    called = node.value if isinstance(node, (ast.Expr, ast.Assign)) and isinstance(node.value, ast.Call) else None
    return called is not None and bool(re.match(
        r"os\.environ\.|warnings\.|logging\.|\w+\.set_(option|printoptions)\b|datasets\.disable|\w+\.logging\.",
        ast.unparse(called.func)))


def folded(cell: dict) -> bool:
    """Whether a reader can do without seeing the code of a cell: `#| hide`, cells of nothing but imports and setup, and
    solutions of exercises."""
    text = source(cell)
    if is_solution(cell):
        return True
    if re.search(r"^#\|\s*hide\s*$", text, re.MULTILINE):
        return True
    try:
        body = ast.parse(text).body
    except SyntaxError:  # a magic of IPython
        return False
    return bool(body) and all(map(_is_plumbing, body)) and not any("data" in o for o in cell["outputs"])


def code_cell(cell: dict, is_index: bool) -> dict | None:
    "A code cell for the site, or nothing where there is nothing to see."
    text = source(cell)
    said = {name: rest.strip() for name, rest in DIRECTIVE.findall(text)}
    tags = [f"nb-{name}" for name in ("export", "slow") if name in said]
    if "echo" in said and "false" in said["echo"]:
        tags.append("remove-input")
    elif "hide" in said and is_index:
        return None
    elif is_solution(cell):
        tags.append("hide-cell")
    elif folded(cell):
        tags.append("hide-input")
    text = DIRECTIVE.sub("", text).strip("\n")
    if not text and not cell["outputs"]:
        return None
    known = cell["metadata"].get("tags", [])
    outputs = [markdown_output(o) for o in cell["outputs"]]
    prompt = {"code_prompt_show": "Show the code behind it", "code_prompt_hide": "Hide the code behind it"}
    asked = {"mystnb": prompt} if is_solution(cell) else {}
    return {**cell, "source": text, "outputs": outputs,
            "metadata": {**cell["metadata"], **asked, "tags": [*known, *tags]}}


def png_width(head: bytes) -> int:
    "Of a picture, in pixels, as the first bytes of a PNG say it."
    return int.from_bytes(head[16:20], "big")


def markdown_output(output: dict) -> dict:
    "Links in an output are followed like those in a text."
    data = output.get("data", {})
    if "text/markdown" not in data:
        return output
    return {**output, "data": {**data, "text/markdown": to_site("".join(data["text/markdown"]), ROOT / "nbs")}}


def to_site(text: str, folder: Path, up: str = "") -> str:
    "A text with its links as the site has them: `folder` is where it stands, `up` the way from its page to the top."
    def lead(found: re.Match) -> str:
        label, to = found.groups()
        if re.match(r"[a-z]+:|#", to):
            return found[0]
        file, _, fragment = to.partition("#")
        path = (folder / file).resolve()
        at = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else file
        if path.suffix == ".ipynb":
            return f"{label}({up}{path.name}{'#' + anchor(fragment.replace('-', ' ')) if fragment else ''})"
        if at in ABOUT:
            return f"{label}({up}{ABOUT[at]}.md)"
        if at.startswith("lire_nb/") and at.endswith(".py"):
            return f"{label}({up}api/{at[:-3].replace('/', '.')}.md)"
        if label.startswith("!") and (slim := path.with_name(f"{path.stem}_narrow{path.suffix}")).exists():
            return (f"{label}({up}files/{at}){{.on-wide}}"  # two drawings of one figure; a screen shows one of them
                    f"{label}({up}files/{slim.relative_to(ROOT).as_posix()}){{.on-narrow}}")
        if label.startswith("!") or path.suffix in (".png", ".svg"):
            return f"{label}({up}files/{at})"
        return f"{label}({up}data.md)" if at.startswith("data") else label[1:-1]  # files that only a checkout has
    return LINK.sub(lead, text)


def place(name: str, nb: list[dict], contents: dict[str, list[str]]) -> str:
    "The line under a title: where the reader is, and for how long."
    part = next(part for part, names in contents.items() if name in names)
    names = contents[part]
    return (f"{{.place}}\n**{part}**, page {names.index(name) + 1} of {len(names)} · about {spoken(minutes(nb))} to "
            f"read · `nbs/{name}.ipynb`")


def contents_of(contents: dict[str, list[str]], nbs: Path, about: list[str]) -> str:
    "The tables of contents that the index carries for the side bar."
    parts = {part: [f"{name[:2]} {title(nbs / f'{name}.ipynb')} <{name}>" for name in names]
             for part, names in contents.items()}
    parts |= {"Reference": ["api/index"], "About": about}
    return "\n\n".join("```{toctree}\n:hidden:\n:caption: " + part + "\n" + "\n".join(rows) + "\n```"
                       for part, rows in parts.items())


def page(path: Path, contents: dict[str, list[str]]) -> list[dict]:
    "The cells of a notebook as the book shows them."
    made, told, own = [], path.stem == "index", cells(path)
    for cell in own:
        if cell.get("id") == "onward":  # the theme leads on
            continue
        if cell["cell_type"] == "markdown":
            text = to_site(source(cell), path.parent)
            if cell.get("id") == "lead":  # the place says the time
                text = re.sub(r"\s*\*\*Time:\*\* .*", "", text)
                if not text:
                    continue
                text = f":::{{container}} door\n{text}\n:::"
            if not told:  # after the title, and the line that sums the page up
                head = re.match(r"# .*\n+((?:>.*\n?)*)", text + "\n")
                text = f"{text[:head.end()].rstrip()}\n\n{place(path.stem, own, contents)}\n\n{text[head.end():]}"
                told = True
            made.append({**cell, "source": text})
        elif cell["cell_type"] == "code" and (shown := code_cell(cell, path.stem == "index")):
            if made and _is_silent(made[-1]) and _is_silent(shown):  # one box for setup in several cells
                shown = {**made[-1], "source": f"{made.pop()['source']}\n\n{shown['source']}"}
            made.append(shown)
    return made


def _is_silent(cell: dict) -> bool:
    "A folded cell that shows nothing."
    return "hide-input" in cell["metadata"].get("tags", ()) and not cell["outputs"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_notebook(path: Path, nb: list[dict]) -> None:
    magic = any(c["cell_type"] == "code" and re.search(r"^\s*[%!]", source(c), re.MULTILINE) for c in nb)
    meta = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3" if magic else "python"}}  # half the time
    write(path, json.dumps({"cells": nb, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}, ensure_ascii=False))


def prepare(target: Path, root: Path = ROOT) -> None:
    "All sources of the site into an empty folder."
    nbs, contents = root / "nbs", toc(root / "nbs")
    shutil.rmtree(target, ignore_errors=True)
    pages = {path: page(path, contents) for path in sorted(nbs.glob("*.ipynb"))}
    about = {file: name for file, name in ABOUT.items() if (root / file).exists()}
    toctrees = {"cell_type": "markdown", "id": "contents", "metadata": {},
                "source": contents_of(contents, nbs, list(about.values()))}
    pages[nbs / "index.ipynb"].append(toctrees)
    for path, nb in pages.items():
        write_notebook(target / path.name, nb)
    for file, name in about.items():
        write(target / f"{name}.md", to_site((root / file).read_text(encoding="utf-8"), (root / file).parent))
    for name, text in api.pages(root).items():
        write(target / "api" / f"{name}.md", text)
    for path in target.rglob("*"):
        if path.suffix in (".ipynb", ".md"):
            for file in re.findall(r"\(files/([^)\s]+)\)", path.read_text(encoding="utf-8")):
                (target / "files" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, target / "files" / file)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
