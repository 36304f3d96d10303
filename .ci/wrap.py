"""What nbdev writes in lines of any length, wrapped: the lists of public names, and the index of symbols."""
import ast
import re
import sys
import textwrap
from pathlib import Path

WIDTH = 120


def wrap_names(text: str) -> str:
    "A module whose `__all__` has short lines."
    def short(found: re.Match) -> str:
        if " for " in found[1]:  # written by hand
            return found[0]
        names = ", ".join(map(repr, ast.literal_eval(found[1])))
        return textwrap.fill(f"__all__ = [{names}]", WIDTH, subsequent_indent=" " * 11, break_long_words=False,
                             break_on_hyphens=False)
    return re.sub(r"^__all__ = (\[.*?\])", short, text, count=1, flags=re.M | re.S)


def wrap_index(text: str) -> str:
    "The index with an entry a line."
    head, _, body = text.partition("\nd = ")
    return f"{head}\nd = {_entries(ast.literal_eval(body), 1)}\n"


def _entries(value, depth: int) -> str:
    if not isinstance(value, dict):
        return repr(value)
    pad, lines = "\n" + " " * depth, []
    for key, inner in value.items():
        line = f"{pad}{key!r}: {_entries(inner, depth + 1)}"
        lines.append(line if len(line.split("\n")[1]) < WIDTH else f"{pad}{key!r}:{pad} {inner!r}")
    return "{" + ",".join(lines) + "}"


def main(folder: Path) -> None:
    "Wrap every module of a package."
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        short = wrap_index(text) if path.name == "_modidx.py" else wrap_names(text)
        if short != text:
            path.write_text(short, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lire_nb"))
