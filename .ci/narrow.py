"""Wrap `__all__` of exported modules at 120: `python .ci/narrow.py FOLDER`. nbdev wraps the names before it writes
"__all__ = " in front of them, so its first line may have 130, and no setting changes that."""
import re
import sys
from pathlib import Path
from textwrap import wrap

WRITTEN = re.compile(r"^__all__ = (\[.*?\])$", re.M | re.S)


def narrow(source: str) -> str:
    "The same module, the names of its `__all__` in lines of at most 120."
    def lines(found: re.Match) -> str:
        return "\n".join(wrap(" ".join(found[1].split()), 120, initial_indent="__all__ = ", subsequent_indent=" " * 11,
                              break_long_words=False))

    return WRITTEN.sub(lines, source, count=1)


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name != "_modidx.py" and narrow(source) != source:
            path.write_text(narrow(source), encoding="utf-8")
