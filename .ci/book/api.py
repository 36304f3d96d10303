"""Pages of the reference, from the modules as text: signatures, docstrings, and the comment beside each parameter.

Nothing is imported, so neither PyTorch nor the package need be installed. A comment belongs to a parameter as fastcore's
docments read it: on its line, else the lines right above it.
"""
import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

ARXIV = re.compile(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})")


@dataclass
class Module:
    "A module as it was written."
    name: str  # with its package
    tree: ast.Module
    comments: dict[int, str]  # line -> the comment on it
    alone: set[int]  # lines that hold nothing but a comment
    lines: list[str]
    public: list[str]  # `__all__`
    notebook: str | None  # the page that defines it

    @property
    def named(self) -> list[str]:
        "Public names that say something; every other module has a logger."
        return [name for name in self.public if name != "logger"]

    @classmethod
    def read(cls, path: Path, root: Path) -> "Module":
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        comments = {t.start[0]: t.string.lstrip("#").strip() for t in tokens}
        alone = {n for n in comments if lines[n - 1].lstrip().startswith("#")}
        public = next((ast.literal_eval(n.value) for n in tree.body
                       if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
                       and isinstance(n.value, (ast.List, ast.Tuple))), [])
        made = re.search(r"File to edit: .*?(\w+)\.ipynb", text)
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        return cls(name, tree, comments, alone, lines, public, made and made[1])

    def comment(self, line: int, taken: set[int] = frozenset()) -> str:
        "What is said about what stands on a line: beside it, else right above it."
        if line in self.comments and line not in self.alone:
            return self.comments[line]
        said, line = [], line - 1
        while line in self.alone and line not in taken:
            said, line = [self.comments[line], *said], line - 1
        return " ".join(said)


def escaped(text: str) -> str:
    "A comment as Markdown: what stands in backticks stays, all else means itself; papers become links."
    parts = re.split(r"(`[^`]*`)", text)
    plain = [part if k % 2 else re.sub(r"([\\*_\[\]<>{}$#~^])", r"\\\1", part) for k, part in enumerate(parts)]
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(plain)).replace("|", r"\|")


def prose(text: str | None) -> str:
    "A docstring as Markdown: its paragraphs and lists, with what Markdown would misread escaped."
    parts = re.split(r"(`[^`]*`)", "\n".join(_undented(text or "")))
    plain = [part if k % 2 else re.sub(r"(?<!^)([*_\[\]<>{}$])", r"\\\1", part) for k, part in enumerate(parts)]
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", "".join(plain))


def _undented(text: str) -> list[str]:
    "Markdown takes four spaces for code; a docstring means a continued line."
    return [re.sub(r"^ {4,}", "  ", line).replace("#", r"\#", 1) if line.startswith("#") else
            re.sub(r"^ {4,}", "  ", line) for line in text.splitlines()]


def parameters(node: ast.FunctionDef) -> list[tuple[ast.arg, str | None, str]]:
    "Each with its default as text and the stars before its name; `self` and `cls` are no parameters of a caller."
    given = node.args
    ordered = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordered) - len(given.defaults)) + given.defaults
    rows = [(arg, default, "") for arg, default in zip(ordered, defaults)]
    rows += [(given.vararg, None, "*")] * bool(given.vararg)
    rows += [(arg, default, "") for arg, default in zip(given.kwonlyargs, given.kw_defaults)]
    rows += [(given.kwarg, None, "**")] * bool(given.kwarg)
    return [(arg, default and ast.unparse(default), stars) for arg, default, stars in rows
            if arg.arg not in ("self", "cls")]


def table(rows: list[tuple[str, str, str, str]], head: str) -> str:
    "Name, with type and default below it, and meaning, where anything is said: two columns, for narrow screens."
    if not rows:
        return ""
    typed = [code(" = ".join(part for part in (kind, default) if part)) for _, kind, default, _ in rows]
    cells = [(f"{row[0]}<br>{kind}" if kind else row[0], row[3]) for row, kind in zip(rows, typed)]
    kept = 1 + any(said for _, said in cells)
    lines = [(head, "meaning"), ("---", "---"), *cells]
    return "\n".join("| " + " | ".join(line[:kept]) + " |" for line in lines)


def code(text: str | None) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def parameter_table(module: Module, node: ast.FunctionDef) -> str:
    """A row for each parameter, and one for what comes back; defaults stand in the signature. Parameters on one line
    share its comment, which then belongs to the last of them."""
    given = parameters(node)
    lines = [arg.lineno for arg, *_ in given]
    last = {line: k for k, line in enumerate(lines)}
    rows = [(code(stars + arg.arg), arg.annotation and ast.unparse(arg.annotation), "",
             escaped(module.comment(arg.lineno, set(lines))) if last[arg.lineno] == k and arg.lineno > node.lineno
             else "") for k, (arg, _, stars) in enumerate(given)]
    said = _returned(module, node)
    if node.returns and ast.unparse(node.returns) != "None":
        rows.append(("*returns*", ast.unparse(node.returns), "", escaped(said)))
    return table(rows, "parameter") if any(row[1] or row[3] for row in rows) else ""


def _returned(module: Module, node: ast.FunctionDef) -> str:
    "The comment at the end of the signature, where what comes back is described."
    line = node.returns.end_lineno if node.returns else 0
    return module.comments.get(line, "") if line not in module.alone else ""


def signature(node: ast.FunctionDef) -> str:
    "Names and defaults; the types stand in the table."
    parts, given = [], node.args
    for arg, default, stars in parameters(node):
        if given.kwonlyargs and arg is given.kwonlyargs[0] and not given.vararg:
            parts.append("*")
        parts.append(stars + arg.arg + (f"={default}" if default else ""))
    return f"({', '.join(parts)})"


def entry(kind: str, name: str, sign: str, body: list[str], module: str, depth: int) -> str:
    "A directive of Sphinx's Python domain: an anchor, an entry of the index, a hit of the search."
    fence = ":" * (7 - depth)
    text = "\n\n".join(part for part in body if part)
    options = f":module: {module}\n"
    return f"{fence}{{py:{kind}}} {name}{sign}\n{options}\n{text}\n{fence}"


def is_a(node: ast.AST, *names: str) -> bool:
    return any(ast.unparse(d).split("(")[0].split(".")[-1] in names for d in getattr(node, "decorator_list", []))


def function(module: Module, node: ast.FunctionDef, owner: str = "", depth: int = 0) -> str:
    name = f"{owner}.{node.name}" if owner else node.name
    body = [prose(ast.get_docstring(node)), parameter_table(module, node)]
    if owner and is_a(node, "property", "cached_property"):
        body[1] = f"Gives {code(ast.unparse(node.returns))}." if node.returns else ""
        return entry("property", name, "", body, module.name, depth)
    kind = "function" if not owner else next((f"{k}method" for k in ("class", "static") if is_a(node, f"{k}method")),
                                             "method")
    return entry(kind, name, signature(node), body, module.name, depth)


def fields(module: Module, node: ast.ClassDef) -> str:
    "The fields of a dataclass, a NamedTuple or another class whose body says their types."
    own = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
           and not n.target.id.startswith("_")]
    taken = {n.lineno for n in own}
    rows = [(code(n.target.id), ast.unparse(n.annotation), n.value and _default(n.value),
             escaped(module.comment(n.end_lineno, taken) or module.comment(n.lineno, taken))) for n in own]
    return table(rows, "field")


def _default(value: ast.expr) -> str:
    "`field(default_factory=dict)` means `dict()`."
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
        return ast.unparse(value)
    given = {k.arg: ast.unparse(k.value) for k in value.keywords}
    made = given.get("default_factory")
    return given.get("default", f"{made}()" if made and re.fullmatch(r"\w+", made) else made or "")


def klass(module: Module, node: ast.ClassDef) -> str:
    bases = [ast.unparse(b) for b in node.bases]
    methods = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    init = next((n for n in methods if n.name == "__init__"), None)
    body = [f"Bases: {', '.join(map(code, bases))}" if bases else "", prose(ast.get_docstring(node)),
            parameter_table(module, init) if init else fields(module, node)]
    seen = [n for n in methods if not n.name.startswith("_") or n.name == "__call__"]
    body += [function(module, n, node.name, 1) for n in seen if not is_a(n, "setter", "deleter", "overload")]
    return entry("class", node.name, signature(init) if init else "", body, module.name, 0)


def value(module: Module, name: str, node: ast.stmt) -> str:
    "A constant: what it holds where that is short, and its comment."
    text = ast.unparse(node.value) if getattr(node, "value", None) else ""
    held = f"= {code(text)}" if 0 < len(text) <= 160 and "`" not in text else ""
    said = module.comment(node.end_lineno) or module.comment(node.lineno)
    return entry("data", name, "", [held, escaped(said)], module.name, 0)


def definitions(module: Module) -> dict[str, ast.stmt]:
    "Name -> where it is defined, for all that is defined at the top of a module."
    found = {}
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for part in ast.walk(target) if target is not None else ():
                if isinstance(part, ast.Name):
                    found.setdefault(part.id, node)
    return found


def module_page(module: Module, top: dict[str, str]) -> str:
    "First what is passed on to the top of the package, then functions, classes and values."
    known, parts = definitions(module), []
    for name in module.named:
        node = known.get(name)
        if isinstance(node, ast.ClassDef):
            parts.append(klass(module, node))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts.append(function(module, node))
        elif node is not None:
            parts.append(value(module, name, node))
        else:
            parts.append(entry("data", name, "", [], module.name, 0))
    made = f"Defined, explained and tested in [{module.notebook}](../{module.notebook}.ipynb).\n\n" if (
        module.notebook) else ""
    first = [part for name, part in zip(module.named, parts) if top.get(name) == module.name]
    rest = [part for part in parts if part not in first]
    kinds = {"Functions": "{py:function}", "Classes": "{py:class}", "Values": "{py:data}"}
    chosen = {"At the top of the package": first,
              **{head: [p for p in rest if p.lstrip(":").startswith(kind)] for head, kind in kinds.items()}}
    body = "\n\n".join(f"## {head}\n\n" + "\n\n".join(own) for head, own in chosen.items() if own)
    return f"# {module.name}\n\n> {prose(ast.get_docstring(module.tree)).strip()}\n\n{made}{body}\n"


def modules(root: Path) -> list[Module]:
    "Those with public names of their own; the package itself only passes names on."
    found = [Module.read(p, root) for p in sorted((root / "lire_nb").rglob("*.py")) if p.name != "_modidx.py"]
    return [m for m in found if m.public and m.name != "lire_nb"]


def top_names(root: Path) -> dict[str, str]:
    "Name at the top of the package -> its module, as `lire_nb/__init__.py` lists them."
    tree = ast.parse((root / "lire_nb" / "__init__.py").read_text(encoding="utf-8"))
    homes = next(ast.literal_eval(n.value) for n in tree.body
                 if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_HOMES")
    return {name: f"lire_nb.{home}" for home, names in homes.items() for name in names}


def first_sentence(module: Module, name: str | None = None) -> str:
    node = definitions(module).get(name) if name else module.tree
    documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    text = " ".join(((ast.get_docstring(node) if documented else "") or "").split())
    return escaped(re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0])


def index_page(found: list[Module], top: dict[str, str]) -> str:
    named = {m.name: m for m in found}
    lead = [f"| [`{name}`](#{home}.{name}) | {first_sentence(named[home], name)} |"
            for name, home in top.items() if home in named]
    rooms = [f"| [{m.name}]({m.name}.md) | {first_sentence(m)} | {len(m.named)} |" for m in found]
    return "\n".join([
        "# API reference", "",
        "> Every public name, with its parameters and what is said about each.", "",
        "Each name is defined in a notebook, which explains it, runs it and checks it; its entry here leads there.", "",
        "## At the top of the package", "", "`from lire_nb import …` finds these names, wherever they are defined:", "",
        "| name | what it does |", "| --- | --- |", *lead, "",
        "## Modules", "", "| module | what it is about | names |", "| --- | --- | --- |", *rooms, "",
        "```{toctree}", ":hidden:", *[m.name for m in found], "```", ""])


def pages(root: Path) -> dict[str, str]:
    "Name of a page -> its Markdown."
    found, top = modules(root), top_names(root)
    return {"index": index_page(found, top), **{m.name: module_page(m, top) for m in found}}


def public_names(root: Path) -> dict[str, str]:
    "Public name -> its module, for names that only one module has."
    found = {}
    for module in modules(root):
        for name in module.named:
            found.setdefault(name, set()).add(module.name)
    return {name: homes.pop() for name, homes in found.items() if len(homes) == 1}
