"""The source of a class's ``forward``, and whether it computes one expression whatever the input is."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType
from typing import Any

__all__ = ["forward_of", "function_tree", "is_straight_line", "self_reads"]

#: Code that may do something else in the next call, or whose order does not follow from where it stands.
_TURNS = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match),
    *(ast.IfExp, ast.BoolOp, ast.Compare, ast.NamedExpr, ast.Assert, ast.Raise, ast.Delete, ast.Await),
    *(ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Yield, ast.YieldFrom),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Global, ast.Nonlocal),
)


def forward_of(kind: type[Any]) -> FunctionType | None:
    """Return the function that a class defines or inherits as ``forward``, or ``None`` if it is none.

    A wrapper that a base class puts around the ``forward`` of every subclass is looked through: it will be
    around that of a further subclass too.
    """
    forward = kind.forward
    if not isinstance(forward, FunctionType):
        return None
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        return forward
    if "__init_subclass__.<locals>" in forward.__code__.co_qualname and isinstance(inner, FunctionType):
        return inner if not hasattr(inner, "__wrapped__") else None
    return None


@functools.lru_cache(maxsize=1024)
def function_tree(function: FunctionType) -> ast.FunctionDef | None:
    """Return the syntax tree of a function, with the line numbers of its file.

    ``None`` for a function without source, with decorators, or with variables of an outer function.
    """
    node = _own_tree(function)
    return None if node is None or node.decorator_list else node


def is_straight_line(function: FunctionType) -> bool:
    """Whether a function of a module, and those of Python that it calls by name, do the same at every call.

    Decorators do not matter: what they made of the function is looked at.
    """
    return _is_straight_line(function, frozenset())


def _is_straight_line(function: FunctionType, within: frozenset[FunctionType]) -> bool:
    tree = _own_tree(function)
    nodes = [] if tree is None else [node for statement in tree.body for node in ast.walk(statement)]
    if not nodes or any(isinstance(node, _TURNS) for node in nodes):
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    within |= {function}
    called = [function.__globals__.get(name) for name in names]
    return all(
        _is_straight_line(other, within)
        for other in called
        if isinstance(other, FunctionType) and other not in within
    )


def _own_tree(function: FunctionType) -> ast.FunctionDef | None:
    """The tree of the function that runs, decorators or not."""
    if function.__closure__ is not None or hasattr(function, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0] if tree.body else None
    if not isinstance(node, ast.FunctionDef) or node.name != function.__code__.co_name:
        return None
    # Python counts the first decorator as the function's first line.
    first = min((node.lineno, *(decorator.lineno for decorator in node.decorator_list)))
    ast.increment_lineno(node, function.__code__.co_firstlineno - first)
    return node


def self_reads(kind: type[Any]) -> frozenset[str] | None:
    """Return the attributes of ``self`` that ``forward`` and the methods that it calls read.

    Returns:
        ``None`` unless they are straight-line code that uses ``self`` for its attributes alone, which it does
        not change, and whose one other parameter is the input.
    """
    forward = forward_of(kind)
    if forward is None:
        return None
    tree = function_tree(forward)
    if tree is None:
        return None
    names = tree.args
    if len(names.args) != 2 or names.defaults or names.posonlyargs or names.kwonlyargs:
        return None
    if names.vararg is not None or names.kwarg is not None:
        return None
    return _reads(kind, forward, frozenset())


def _reads(kind: type[Any], function: FunctionType, within: frozenset[str]) -> frozenset[str] | None:
    tree = function_tree(function)
    if tree is None or not tree.args.args:
        return None
    this = tree.args.args[0].arg
    nodes = [node for statement in tree.body for node in ast.walk(statement)]
    if any(isinstance(node, _TURNS) for node in nodes):
        return None
    attributes = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this
    ]
    uses = sum(isinstance(node, ast.Name) and node.id == this for node in nodes)
    if uses != len(attributes) or not all(isinstance(node.ctx, ast.Load) for node in attributes):
        return None
    found: set[str] = set()
    for name in {node.attr for node in attributes}:
        method = inspect.getattr_static(kind, name, None)
        if isinstance(method, FunctionType) and name not in within:
            inside = _reads(kind, method, within | {name})
            if inside is None:
                return None
            found |= inside
        else:
            found.add(name)
    return frozenset(found)
