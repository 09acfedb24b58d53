"""Rotation, cache and attention where an attention module does one after another, as one call of a step."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import Any

from .rotary import Rotation
from .syntax import as_expression, as_statement, branch, is_name, loads

__all__ = ["STEP", "with_step"]

#: The attribute of an attention function that holds its step, which is called as
#: ``step(rotation, query, key, value, cos, sin, cache, layer_index, mask, **settings)`` with queries and keys
#: before they are rotated, the cache that they go into, and otherwise what the function would be given. It
#: returns what the function does, or ``None`` if everything has to be called by itself: nothing has changed.
STEP = "littlebit2_step"

_ATTENDED = "_littlebit2_attended"
#: Nodes of settings: to evaluate them twice changes nothing.
_STILL = (ast.Name, ast.Attribute, ast.Constant, ast.IfExp, ast.UnaryOp, ast.Not, ast.Load)


def with_step(tree: ast.FunctionDef, this: str, rotation_of: Callable[[str], Rotation | None]) -> bool:
    """Put a branch in the place of four statements, where the body of a function has them.

    These are::

        q, k = rotation(q, k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        interface = functions.get_interface(name, default)
        output, weights = interface(self, q, k, v, mask, **settings)

    Args:
        tree: the function, changed in place.
        this: its name for ``self``.
        rotation_of: what a name is as a rotation, or ``None``.

    Returns:
        Whether there were such statements.
    """
    for index in range(len(tree.body) - 3):
        call = _call_of(tree.body[index : index + 4], tree.body[index + 4 :], this, rotation_of)
        if call is None:
            continue
        original = tree.body[index : index + 4]
        changed: Any = copy.deepcopy(original[3])
        changed.value = as_expression(_ATTENDED, original[3])
        begin = as_statement(f"{_ATTENDED} = {call}", original[0])
        tree.body[index : index + 4] = [begin, branch(_ATTENDED, original, [changed])]
        return True
    return False


def _call_of(
    four: list[ast.stmt], rest: list[ast.stmt], this: str, rotation_of: Callable[[str], Rotation | None]
) -> str | None:
    """The call that stands for four statements; ``None`` for others, or if ``rest`` uses what they made."""
    rotation, update, choice, attention = four
    turned = _assigned_call(rotation)
    if turned is None or not isinstance(turned[1].func, ast.Name) or rotation_of(turned[1].func.id) is None:
        return None
    operands = _names(turned[1].args)
    if operands is None or len(operands) != 4 or turned[1].keywords or turned[0] != operands[:2]:
        return None
    query, key, *angles = operands
    updated = _update_of(update, this)
    if updated is None or updated[0] != key:
        return None
    _, value, cache, place = updated
    chosen = _choice_of(choice)
    attended = _assigned_call(attention)
    if chosen is None or attended is None or not is_name(attended[1].func, chosen[0]):
        return None
    given = _names(attended[1].args)
    if given is None or len(given) != 5 or given[:4] != [this, query, key, value]:
        return None
    changing = {query, key, value, chosen[0], *attended[0]}
    if len({query, key, value, chosen[0]}) < 4 or changing & {this, cache, *angles, given[4]}:
        return None
    settings = attended[1].keywords
    read_twice = [chosen[1], *(word.value for word in settings)]
    if any(loads(node, name) for node in read_twice for name in changing):
        return None
    if not all(_is_still(word.value) for word in settings):
        return None
    if any(loads(node, name) for node in rest for name in changing - set(attended[0])):
        return None
    words = [
        f"**{ast.unparse(w.value)}" if w.arg is None else f"{w.arg}={ast.unparse(w.value)}" for w in settings
    ]
    arguments = [
        turned[1].func.id,
        ast.unparse(chosen[1]),
        *operands[:2],
        value,
        *angles,
        cache,
        place,
        given[4],
    ]
    return f"{this}._littlebit2_attend({', '.join((*arguments, *words))})"


def _assigned_call(node: ast.stmt) -> tuple[list[str], ast.Call] | None:
    """``a, b = function(...)``: the names and the call."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.value, ast.Call):
        return None
    target = node.targets[0]
    names = _names(target.elts) if isinstance(target, ast.Tuple) else None
    return None if names is None or len(names) != 2 else (names, node.value)


def _update_of(node: ast.stmt, this: str) -> tuple[str, str, str, str] | None:
    """Key, value, cache and place of ``if cache is not None: k, v = cache.update(k, v, self.place)``."""
    if not isinstance(node, ast.If) or node.orelse or len(node.body) != 1:
        return None
    found = _assigned_call(node.body[0])
    if found is None or found[1].keywords or len(found[1].args) != 3:
        return None
    names, call = found
    *pair, place = call.args
    if _names(pair) != names or not isinstance(call.func, ast.Attribute) or call.func.attr != "update":
        return None
    cache = call.func.value
    if not isinstance(cache, ast.Name) or ast.unparse(node.test) != f"{cache.id} is not None":
        return None
    if not isinstance(place, ast.Attribute) or not is_name(place.value, this):
        return None
    return names[0], names[1], cache.id, ast.unparse(place)


def _choice_of(node: ast.stmt) -> tuple[str, ast.Call] | None:
    """Name and value of ``interface = functions.get_interface(...)``."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    call = node.value
    if not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or call.keywords:
        return None
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "get_interface":
        return None
    still = all(_is_still(argument) for argument in (call.func.value, *call.args))
    return (target.id, call) if still else None


def _is_still(node: ast.expr) -> bool:
    """Whether an expression reads variables and attributes alone."""
    if isinstance(node, ast.Call) and is_name(node.func, "getattr") and not node.keywords:
        return all(_is_still(argument) for argument in node.args)
    return all(isinstance(one, _STILL) for one in ast.walk(node))


def _names(nodes: list[ast.expr]) -> list[str] | None:
    """The names of variables, ``None`` if there is something else."""
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    return names if len(names) == len(nodes) else None
