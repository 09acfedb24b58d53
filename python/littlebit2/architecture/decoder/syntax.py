"""What the rewriting of functions asks of a syntax tree, and what it makes of one."""

from __future__ import annotations

import ast

__all__ = [
    "as_expression",
    "as_statement",
    "become",
    "branch",
    "child_called",
    "is_name",
    "loads",
    "stores",
    "unconditional",
]


def is_name(node: ast.AST, name: str) -> bool:
    """Whether a node is the variable ``name``."""
    return isinstance(node, ast.Name) and node.id == name


def loads(node: ast.AST, name: str) -> int:
    """How often the variable ``name`` is read."""
    return sum(is_name(one, name) and isinstance(one.ctx, ast.Load) for one in ast.walk(node))  # type: ignore[attr-defined]


def stores(statement: ast.stmt, name: str) -> bool:
    """Whether a statement assigns to ``name``."""
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
        for node in ast.walk(statement)
    )


def child_called(node: ast.AST, this: str) -> str | None:
    """``name`` for ``self.name(...)``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    return node.func.attr if is_name(node.func.value, this) else None


def unconditional(statement: ast.stmt) -> list[ast.AST]:
    """The nodes of a simple statement that are evaluated once whenever it is run."""
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)):
        return []
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [statement]
    skipped = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, skipped):
            continue
        found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found


def as_expression(text: str, place: ast.AST) -> ast.expr:
    """The tree of an expression, with the lines of ``place``."""
    node = ast.parse(text, mode="eval").body
    for one in ast.walk(node):
        ast.copy_location(one, place)
    return node


def as_statement(text: str, place: ast.AST) -> ast.stmt:
    """The tree of a statement, with the lines of ``place``."""
    node = ast.parse(text).body[0]
    for one in ast.walk(node):
        ast.copy_location(one, place)
    return node


def branch(name: str, original: list[ast.stmt], changed: list[ast.stmt]) -> ast.If:
    """``if name is None:`` the statements as they were, else the changed ones."""
    node = ast.If(as_expression(f"{name} is None", original[0]), original, changed)
    return ast.copy_location(node, original[0])


def become(node: ast.AST, other: ast.AST) -> None:
    """Turn a node into another one, where it stands."""
    node.__class__ = other.__class__
    node.__dict__.clear()
    node.__dict__.update(other.__dict__)
