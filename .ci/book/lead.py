"""The lines at the door and at the end of every page: `python .ci/book/lead.py nbs/*.ipynb`, a part of `make export`.

Two cells of a notebook are kept here. `lead` stands below the title: what a reader will learn and what comes before is
written there by hand, the reading time is computed. `onward` stands last and leads to the pages before and after.
"""
import json
import re
import sys
from pathlib import Path

import pages

TIME = re.compile(r"\s*\*\*Time:\*\* .*")


def cell(name: str, text: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}


def onward(name: str, order: list[str], nbs: Path) -> str:
    "Where a reader goes from the end of a page."
    place = order.index(name)
    before, after = (order[k] if 0 <= k < len(order) else None for k in (place - 1, place + 1))
    link = lambda to: f"[{to[:2]} {pages.title(nbs / f'{to}.ipynb')}]({to}.ipynb)"  # noqa: E731
    return " · ".join([*([f"**Before:** {link(before)}"] if before else []), "[the map](index.ipynb#The-map)",
                       *([f"**Next:** {link(after)}"] if after else [])])


def lead(nb: dict, name: str, order: list[str], nbs: Path) -> dict:
    "A notebook with both cells in their places; the index has neither."
    if name not in order:
        return nb
    own = {c.get("id"): c for c in nb["cells"] if c.get("id") in pages.KEPT}
    rest = [c for c in nb["cells"] if c.get("id") not in pages.KEPT]
    words = TIME.sub("", pages.source(own["lead"])).strip() if "lead" in own else ""
    time = f"**Time:** about {pages.spoken(pages.minutes(rest))}."
    title = next(k for k, c in enumerate(rest) if c["cell_type"] == "markdown")
    nb["cells"] = [*rest[:title + 1], cell("lead", "\n\n".join(filter(None, (words, time)))), *rest[title + 1:],
                   cell("onward", onward(name, order, nbs))]
    return nb


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        text = path.read_text(encoding="utf-8")
        order = [name for names in pages.toc(path.parent).values() for name in names]
        made = json.dumps(lead(json.loads(text), path.stem, order, path.parent), indent=1, ensure_ascii=False,
                          sort_keys=True) + "\n"
        if made != text:
            path.write_text(made, encoding="utf-8")
