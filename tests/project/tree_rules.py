"""The checks behind test_tree_rules.py: the shape of the tree, and the spelling of what stands in it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.project.import_rules import CXX_SUFFIXES, PYTHON_ROOTS, Finding, source_files

# --- size of folders ---------------------------------------------------------------------------------

MAX_FILES = 16


def folder_findings(root: Path) -> list[Finding]:
    """Find folders that hold more than MAX_FILES source files themselves."""
    counts = Counter(path.parent for path in source_files(root) if path.suffix in CXX_SUFFIXES | {".py"})
    return [
        Finding(
            str(folder.relative_to(root)), 1, f"holds {count} source files, more than {MAX_FILES}: split it"
        )
        for folder, count in sorted(counts.items())
        if count > MAX_FILES
    ]


# --- circles of imports ------------------------------------------------------------------------------

ROOTS = {**PYTHON_ROOTS, "benchmarks": "benchmarks"}


def _is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree without what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node):
            for other in node.orelse:
                yield other
                yield from _running_nodes(other)
        else:
            yield node
            yield from _running_nodes(node)


def _imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, inside functions too."""
    for node in _running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                anchor = ".".join(parents[: len(parents) - node.level + 1])
                base = f"{anchor}.{base}" if base else anchor
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                yield package + literal.value if literal.value[:1] == "." else literal.value


def _as_module(name: str, modules: set[str]) -> str | None:
    """The module of ours that a dotted name lies in, or is."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def import_graph(root: Path) -> dict[str, set[str]]:
    """Which modules of ours each module imports, at its top or inside a function.

    That importing a module also runs the ``__init__`` of the packages around it is not counted.
    """
    packages, trees = {}, {}
    for top, directory in ROOTS.items():
        for path in sorted((root / directory).rglob("*.py")):
            inside = path.relative_to(root / directory).with_suffix("").parts
            is_package = inside[-1] == "__init__"
            module = ".".join([top, *(inside[:-1] if is_package else inside)])
            packages[module] = module if is_package else module.rpartition(".")[0]
            trees[module] = ast.parse(path.read_text("utf-8"), str(path))
    modules = set(trees)
    graph = {}
    for module, tree in trees.items():
        found = {_as_module(name, modules) for name in _imported_names(tree, packages[module])}
        graph[module] = {name for name in found if name is not None and name != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            position = stack.index(module)
            component = sorted(stack[position:])
            del stack[position:]
            if len(component) > 1:
                found.append(component)

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return found


def circle_findings(root: Path) -> list[Finding]:
    """Find circles of imports, each with the imports inside it."""
    graph = import_graph(root)
    findings = []
    for circle in circles(graph):
        steps = [f"{module} -> {', '.join(sorted(graph[module] & set(circle)))}" for module in circle]
        findings.append(Finding(circle[0], 1, f"a circle of imports: {'; '.join(steps)}"))
    return findings


# --- spelling ----------------------------------------------------------------------------------------

#: Words in -ise, -ising and so on that are American too, by what stands before the "is".
_PLAIN_STEMS = re.compile(
    r"\w*(w|ra|no)|(re|super|ad|de|tele|impro)v|(pre|pro|com?pro|sur|de)m|(sun|up|a|com?p|re?p|surp|enterp|ap?p|p)?r"
    r"|(exer|ex|con|pre|in|circum)c|(para|merchan)d|(exper|trea|adver|chas)t|franch|(dis)?gu|cru|bru|turquo|po"
    r"|des?p|v|m|d|l|an|chem|val|marqu|mala"
)
_ENDING = re.compile(r"(\w*?)is(e|es|ed|er|ers|ing|ation|ations|able|ability)")
_LIST = re.compile(
    r"\w*(behaviour|colour|favour|flavour|honour|labour|neighbour|rumour|vapour|armour|harbour|humour|rigour|vigour)"
    r"\w*|(centre|fibre|litre|theatre|calibre|sombre|spectre|meagre)[sd]?|kilometres?|millimetres?|metres?"
    r"|grey\w*|licences?|defences?|offences?|pretences?|artefacts?|judgements?|acknowledgements?|programmes?"
    r"|analys(e[dr]?|ers|ing)|paralys(e[dr]?|ing)|catalys(e[dr]?|ing)|analogues?|catalogues?"
    r"|(un)?(label|model|signal|level|total|travel|fuel|channel|tunnel|funnel|marshal|panel|quarrel|equal|dial"
    r"|initial|counsel|unravel|shovel|swivel|parcel|rival)l(ed|ing|er|ers)"
    r"|whilst|amongst|learnt|spelt|burnt|dreamt|ageing|enrol|fulfil|instal|skilful|wilful|sceptic\w*|mould\w*"
    r"|manoeuvr\w*|cheques?|tyres?|storeys?|plough\w*|maths"
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_THIS = "tests/project/tree_rules.py"


def is_british(word: str) -> bool:
    """Whether a lower-case word is spelled as in Britain and not as in America."""
    if _LIST.fullmatch(word):
        return True
    ending = _ENDING.fullmatch(word)
    return ending is not None and _PLAIN_STEMS.fullmatch(ending[1]) is None


def british_words(text: str) -> list[str]:
    """The words of a text, parts of identifiers included, that are British."""
    return [word for word in _WORD.findall(text) if is_british(word.lower())]


def spelling_findings(root: Path) -> list[Finding]:
    """Find British spelling in the text of files and in their names."""
    findings = []
    for path in source_files(root):
        where = path.relative_to(root).as_posix()
        if where == _THIS:
            continue
        findings += [
            Finding(where, 1, f"its name has {word!r}: use American spelling")
            for word in british_words(where)
        ]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            words = british_words(line)
            if words:
                findings.append(Finding(where, number, f"has {', '.join(words)}: use American spelling"))
    return findings
