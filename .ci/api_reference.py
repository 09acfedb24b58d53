"""Write the API reference, docs/api/*.md, from the docstrings: ``api_reference.py [--check]``.

The pages are plain Markdown, so they can be read in the repository and rendered by Sphinx. Sources are read
through their syntax trees: nothing is imported, so neither torch nor the native library is needed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: A page for each package: its file and what it is for.
PAGES = {
    "littlebit2": "Quantize, load, run, train and evaluate whole models.",
    "littlebit2.checkpoint": "Read, write and convert checkpoint directories.",
    "littlebit2.train": "Trainable packed layers, without transformers.",
    "littlebit2_kernels": "Packed layers as functions and modules, and what servers need.",
}
#: Where packages may lie.
FOLDERS = ("python", ".")
SECTIONS = ("Args", "Arguments", "Attributes", "Returns", "Raises", "Yields", "Example", "Examples", "Note")
LISTS = ("Args", "Arguments", "Attributes", "Raises")
WIDTH = 100

Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """Where a public name is defined."""

    module: str
    node: Definition

    @property
    def source(self) -> str:
        """The line that says which module defines the name."""
        return f"Defined in `{self.module}`."


def module_file(module: str) -> Path:
    """Return the source file of a module of ours."""
    for folder in FOLDERS:
        path = ROOT.joinpath(folder, *module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    raise SystemExit(f"no module {module}")


def parse(file: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(file.read_text("utf-8"), str(file))


def assigned_names(node: ast.AST) -> list[str]:
    """Return the plain names that a statement assigns."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [target.id for target in targets if isinstance(target, ast.Name)]


def public_names(package: str) -> list[str]:
    """Return ``__all__`` of a package."""
    for node in parse(module_file(package)).body:
        if "__all__" in assigned_names(node):
            assert isinstance(node, ast.Assign)
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"{package} has no __all__")


def source_of(node: ast.AST) -> str:
    """Return the code of a node, strings in double quotes."""
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', ast.unparse(node))


def _is_whole(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether this is the definition itself, not one of its overloads."""
    return "overload" not in _decorators(node)


def find(module: str, name: str) -> Found | None:
    """Follow imports from ``module`` to the definition of ``name``; None for a name made at run time."""
    file = module_file(module)
    tree = parse(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            parents = package.split(".")
            anchor = ".".join(parents[: len(parents) - node.level + 1])
            base = node.module or ""
            target = f"{anchor}.{base}".rstrip(".") if node.level else base
            (original,) = [alias.name for alias in node.names if (alias.asname or alias.name) == name]
            return find(target, original)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name and _is_whole(node):
            return Found(module, node)
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in assigned_names(node):
            return Found(module, node)
    return None


# --- docstrings to Markdown ---------------------------------------------------------------------------


def inline(text: str) -> str:
    """Turn reStructuredText's roles and literals into Markdown's code, and link the pages that are named."""
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`\.?([\w.]+)`", r"`\1`", text)
    parts = text.replace("``", "`").split("`")
    parts[::2] = [re.sub(r"\bdocs/(\w+)\.md\b", r"[docs/\1.md](../\1.md)", part) for part in parts[::2]]
    return "`".join(parts)


def paragraph(lines: list[str]) -> str:
    """Join the lines of a text, keeping its blank lines and what is indented."""
    return inline("\n".join(lines)).strip("\n")


def items(lines: list[str]) -> list[str]:
    """Return the entries ``name: text`` of a section as a Markdown list."""
    entries: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line and not line.startswith(" "):
            entries.append(line)
        elif line.strip().startswith("* ") and entries:
            entries[-1] += "\n  - " + line.strip().removeprefix("* ")
        elif line.strip() and entries:
            entries[-1] += " " + line.strip()
    listed = []
    for entry in entries:
        name, colon, text = entry.partition(": ")
        listed.append(f"- `{name.strip('*`')}`: {inline(text)}" if colon else f"- {inline(entry)}")
    return listed


def markdown(docstring: str) -> list[str]:
    """Return a Google-style docstring as lines of Markdown."""
    heading = re.compile(rf"({'|'.join(SECTIONS)}):")
    sections: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        match = heading.fullmatch(line)
        if match:
            sections.append((match[1], []))
        else:
            sections[-1][1].append(line)
    out: list[str] = []
    for name, lines in sections:
        if name in LISTS:
            out += [f"**{name}**", "", *items(lines), ""]
        elif name:
            out += [f"**{name}**", "", paragraph(textwrap.dedent("\n".join(lines)).splitlines()), ""]
        else:
            out += [paragraph(lines), ""]
    return out


# --- definitions to Markdown --------------------------------------------------------------------------


def signature(node: ast.FunctionDef, *, name: str, skip_self: bool) -> str:
    """Return ``name(arguments) -> result``, one argument a line where that is too long for one."""
    arguments = node.args
    if skip_self and arguments.args:
        first = 0 if arguments.posonlyargs else 1
        arguments = ast.arguments(
            posonlyargs=arguments.posonlyargs[1:],
            args=arguments.args[first:],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults,
        )
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = []
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True), 1):
        parts.append(_argument(argument, default))
        if number == len(arguments.posonlyargs):
            parts.append("/")
    if arguments.vararg:
        parts.append("*" + _argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += map(_argument, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        parts.append("**" + _argument(arguments.kwarg, None))
    result = f" -> {source_of(node.returns)}" if node.returns is not None else ""
    return _call(name, parts) + result


def _call(name: str, parts: list[str]) -> str:
    """Return a name with its arguments, one a line where they are too long for one."""
    short = f"{name}({', '.join(parts)})"
    return short if len(short) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = source_of(argument)
    return text if default is None else f"{text} = {source_of(default)}"


def _fields(node: ast.ClassDef) -> str:
    """Return the signature of a dataclass or named tuple from its fields."""
    parts = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = "" if field.value is None else f" = {source_of(field.value)}"
            parts.append(f"{field.target.id}: {source_of(field.annotation)}{default}")
    return _call(node.name, parts)


def _decorators(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    return {
        source_of(item.func if isinstance(item, ast.Call) else item).rpartition(".")[2]
        for item in node.decorator_list
    }


def _class_signature(node: ast.ClassDef) -> str:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return signature(member, name=node.name, skip_self=True).removesuffix(" -> None")
    bases = {source_of(base) for base in node.bases}
    if "dataclass" in _decorators(node) or "NamedTuple" in bases:
        return _fields(node)
    return node.name + (f"({', '.join(sorted(bases))})" if bases else "")


def _methods(node: ast.ClassDef) -> list[str]:
    """Return the public methods and properties of a class, a list entry each."""
    out = []
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
            continue
        docstring = ast.get_docstring(member)
        kinds = _decorators(member)
        if docstring is None or kinds & {"setter", "overload"}:
            continue
        called = (
            member.name
            if kinds & {"property", "cached_property"}
            else " ".join(signature(member, name=member.name, skip_self="staticmethod" not in kinds).split())
            .replace("( ", "(")
            .replace(", )", ")")
        )
        summary = " ".join(docstring.split("\n\n")[0].split())
        out.append(f"- `{called}`: {inline(summary)}")
    return out


def _comment(found: Found) -> str:
    """Return the ``#:`` comment above an assignment."""
    lines = module_file(found.module).read_text("utf-8").splitlines()
    texts = []
    for line in reversed(lines[: found.node.lineno - 1]):
        if not line.startswith("#:"):
            break
        texts.insert(0, line.removeprefix("#:").strip())
    return inline(" ".join(texts))


def entry(package: str, name: str) -> list[str]:
    """Return the section of one public name."""
    found = find(package, name)
    if found is None:
        return []
    node = found.node
    if isinstance(node, ast.Assign | ast.AnnAssign):
        value = source_of(node)
        return [f"## {name}", "", "```python", value, "```", "", _comment(found), "", found.source, ""]
    docstring = ast.get_docstring(node)
    if docstring is None:
        raise SystemExit(f"{package}.{name} has no docstring")
    called = (
        f"class {_class_signature(node)}"
        if isinstance(node, ast.ClassDef)
        else signature(node, name=node.name, skip_self=False)
    )
    out = [f"## {name}", "", "```python", called, "```", "", *markdown(docstring)]
    methods = _methods(node) if isinstance(node, ast.ClassDef) else []
    if methods:
        out += ["**Methods and properties**", "", *methods, ""]
    return [*out, found.source, ""]


def page(package: str) -> str:
    """Return the page of one package."""
    names = [name for name in public_names(package) if not name.startswith("__")]
    lines = [
        f"# {package}",
        "",
        f"{PAGES[package]} Written by `make docs` from the docstrings: edit those, not this page.",
        "",
    ]
    for name in sorted(names, key=lambda name: (name.lower(), name)):
        lines += entry(package, name)
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Return the content of every page."""
    return {ROOT / "docs/api" / f"{package}.md": page(package) for package in PAGES}


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them with the docstrings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in pages().items():
        old = path.read_text("utf-8") if path.exists() else None
        if old == text:
            continue
        stale += 1
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is out of date: run `make docs`", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            print(f"wrote {name}")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
