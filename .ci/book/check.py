"""Every link inside the built site leads somewhere, and no page loads anything from elsewhere:
`python .ci/book/check.py build/book/html`."""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
NOT_LOADED = {"canonical", "search", "next", "prev", "index", "author", "copyright"}


class Page(HTMLParser):
    "The anchors of a page, where it leads, and what it loads."

    def __init__(self):
        super().__init__()
        self.anchors, self.leads, self.loads = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if given.get("href") and tag in ("a", "link"):
            self.leads.add(given["href"])
        if given.get("src"):
            self.leads.add(given["src"])
        self.loads |= {given[key] for name, key in LOADS if name == tag and given.get(key)
                       and given.get("rel") not in NOT_LOADED}


def is_outside(url: str) -> bool:
    return bool(urlsplit(url).scheme or urlsplit(url).netloc)


def check(site: Path) -> list[str]:
    "What is wrong, a line each."
    pages = {}
    for path in sorted(p for p in site.rglob("*.html") if "_static" not in p.parts):
        pages[path.resolve()] = parsed = Page()
        parsed.feed(path.read_text(encoding="utf-8"))
    wrong = []
    for path, parsed in pages.items():
        name = path.relative_to(site.resolve())
        wrong += [f"{name} loads {url}" for url in parsed.loads if is_outside(url) and not url.startswith("data:")]
        for url in sorted(u for u in parsed.leads if not is_outside(u)):
            to = urlsplit(url)
            there = (path.parent / unquote(to.path)).resolve() if to.path else path
            if not there.exists():
                wrong.append(f"{name} leads to {url}: no such file")
            elif to.fragment and there in pages and unquote(to.fragment) not in pages[there].anchors | {"top"}:
                wrong.append(f"{name} leads to {url}: no such place on that page")
    if not pages:
        wrong.append(f"{site} has no pages")
    return wrong


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print(*found, sep="\n", end="\n" if found else "")
    raise SystemExit(bool(found))
