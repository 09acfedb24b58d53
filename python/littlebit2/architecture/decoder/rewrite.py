"""A ``forward`` rewritten so that norms, projections and sums of residuals become parts of fewer calls.

The statements that change stay in the new function as the other branch of an ``if``: what a call finds
decides which of the two runs. All else of the function is as it was, with the lines of its file.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from .parts import Activation, Norm
from .rotary import Rotation
from .step import with_step
from .syntax import (
    as_expression,
    as_statement,
    become,
    branch,
    child_called,
    is_name,
    loads,
    stores,
    unconditional,
)

__all__ = [
    "Attention",
    "Chain",
    "Children",
    "Site",
    "Taker",
    "compiled",
    "rewrite_attention",
    "rewrite_layer",
]

#: Keywords of rewritten functions: a norm of the input, and what is added to the output.
NORM, RESIDUAL = "littlebit2_norm", "littlebit2_residual"
_MORE, _SUM, _PROJECTED = "_littlebit2_more", "_littlebit2_sum", "_littlebit2_projected"
_ROTATED = "_littlebit2_rotated"
_DROPOUT = ("nn.functional.dropout", "F.dropout", "torch.nn.functional.dropout")


@dataclass(frozen=True)
class Taker:
    """A child that computes a norm of its input, or adds to its output, if it is asked to.

    Attributes:
        kind: its class.
        parameter: name of its input.
        norm: whether it takes a norm.
        residual: whether it takes a residual, added to its output or the first of its outputs.
    """

    kind: type[Any]
    parameter: str
    norm: bool
    residual: bool


@dataclass(frozen=True)
class Children:
    """What the children of a decoder layer are, by name; each tuple holds pairs.

    Attributes:
        norms: RMS norms.
        takers: attention and MLP.
        linears: packed layers.
        activations: what stands between linear layers.
        dropouts: names of dropout modules.
    """

    norms: tuple[tuple[str, Norm], ...]
    takers: tuple[tuple[str, Taker], ...]
    linears: tuple[str, ...]
    activations: tuple[Activation, ...]
    dropouts: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """Where a layer calls a child that may do more.

    Attributes:
        child: name of the child.
        kind: its class.
        norm_name: name of the norm before it, or ``None``.
        norm: what that norm is.
        residual: whether its output is then added to a residual.
        dropouts: modules between the output and that sum.
        rates: attributes that hold the probability of dropout functions there.
    """

    child: str
    kind: type[Any]
    norm_name: str | None
    norm: Norm | None
    residual: bool
    dropouts: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``norm > child > residual``, of what there is."""
        return " > ".join(part for part in (self.norm_name, self.child, "residual" * self.residual) if part)


@dataclass(frozen=True)
class Chain:
    """Where a layer calls a linear layer, an activation and another linear layer, as an MLP of its own.

    Attributes:
        layers: names of both linear layers.
        activation: the function between them.
        residual, dropouts, rates: as of a :class:`Site`.
    """

    layers: tuple[str, str]
    activation: Activation
    residual: bool
    dropouts: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``first > activation > second > residual``, of what there is."""
        parts = (self.layers[0], self.activation.function, self.layers[1], "residual" * self.residual)
        return " > ".join(part for part in parts if part)


@dataclass(frozen=True)
class Attention:
    """What a rewritten attention does together.

    Attributes:
        projections: packed layers that take the input, in the order of their results; none if others do too.
        output: the packed layer that makes the output, if a residual can be added there.
        parameter: name of the input.
        rotations: functions that rotate queries and keys, in the order of the calls.
    """

    projections: tuple[str, ...]
    output: str | None
    parameter: str
    rotations: tuple[Rotation, ...] = ()


def compiled(tree: ast.FunctionDef, function: FunctionType) -> FunctionType:
    """Return the function that a changed tree of ``function`` stands for, with the same globals and defaults.

    Parameters that the tree has besides are for keywords, and ``None`` by default.
    """
    tree = copy.deepcopy(tree)
    arguments = tree.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    tree.returns = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [ast.Constant(None) for _ in arguments.kw_defaults]
    module = ast.fix_missing_locations(ast.Module([tree], []))
    names: dict[str, Any] = {}
    # The function itself, from the source of the class, and nothing else runs here.
    exec(
        compile(module, function.__code__.co_filename, "exec", dont_inherit=True), function.__globals__, names
    )
    made: FunctionType = names[tree.name]
    made.__defaults__ = function.__defaults__
    added = {a.arg: None for a in arguments.kwonlyargs if a.arg in (NORM, RESIDUAL)}
    made.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **added}
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__ = function.__doc__
    return made


def rewrite_attention(
    tree: ast.FunctionDef, linears: Sequence[str], rotation_of: Callable[[str], Rotation | None]
) -> tuple[ast.FunctionDef, Attention] | None:
    """Let an attention project its input in one call, after a norm, and add a residual to its output.

    Queries and keys are rotated in one call too.

    Args:
        tree: the function.
        linears: names of the packed layers.
        rotation_of: what a global of the function is as a rotation, or ``None``.

    Returns:
        The new tree, which takes the keywords ``littlebit2_norm`` and ``littlebit2_residual``, and what it
        does. There are no projections if the input is used for more than its shape and packed layers;
        ``None`` if there is nothing to the output either.
    """
    if len(tree.args.args) < 2 or tree.args.vararg is not None or _names_clash(tree):
        return None
    tree = copy.deepcopy(tree)
    this, given = tree.args.args[0].arg, tree.args.args[1].arg
    calls: list[tuple[int, ast.Call]] = []
    for index, statement in enumerate(tree.body):
        plain = unconditional(statement)
        calls += [
            (index, node)
            for node in plain
            if isinstance(node, ast.Call)
            and child_called(node, this) in linears
            and not node.keywords
            and len(node.args) == 1
            and is_name(node.args[0], given)
        ]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == given]
    shapes = sum(
        isinstance(node, ast.Attribute)
        and is_name(node.value, given)
        and node.attr in ("shape", "size", "device")
        for node in ast.walk(tree)
    )
    if len(calls) + shapes != len(uses):
        calls = []
    names = tuple(dict.fromkeys(str(child_called(call, this)) for _, call in calls))
    output = _output_of(tree.body, this, [name for name in linears if name not in names])
    for _, call in calls:
        place = names.index(str(child_called(call, this)))
        become(call, as_expression(f"{_PROJECTED}[{place}]", call))
    if calls:
        project = f"{_PROJECTED} = {this}._littlebit2_project({given}, {NORM})"
        tree.body.insert(calls[0][0], as_statement(project, calls[0][1]))
    elif output is None:
        return None
    if output is not None:
        call = output[1]
        become(
            call, as_expression(f"{this}._littlebit2_output({ast.unparse(call.args[0])}, {RESIDUAL})", call)
        )
    local = _variables(tree)

    def known(name: str) -> Rotation | None:
        return None if name in local else rotation_of(name)

    with_step(tree, this, known)
    rotator = _Rotator(this, known)
    rotator.generic_visit(tree)
    tree.args.kwonlyargs += [ast.arg(NORM), ast.arg(RESIDUAL)]
    tree.args.kw_defaults += [ast.Constant(None), ast.Constant(None)]
    return tree, Attention(names, None if output is None else output[0], given, tuple(rotator.found))


class _Rotator(ast.NodeTransformer):
    """Puts a branch in the place of each ``q, k = rotation(q, k, cos, sin)``; all are variables."""

    def __init__(self, this: str, rotation_of: Callable[[str], Rotation | None]) -> None:
        self._this = this
        self._rotation_of = rotation_of
        self.found: list[Rotation] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # another function, with variables of its own

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.stmt]:
        call = node.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            return node
        if len(call.args) != 4 or not all(isinstance(one, ast.Name) for one in call.args):
            return node
        rotation = self._rotation_of(call.func.id)
        if rotation is None:
            return node
        given = ", ".join(ast.unparse(one) for one in (call.func, *call.args))
        change = f"{_ROTATED} = {self._this}._littlebit2_rotate({len(self.found)}, {given})"
        self.found.append(rotation)
        changed = copy.deepcopy(node)
        changed.value = as_expression(_ROTATED, call)
        return [as_statement(change, node), branch(_ROTATED, [node], [changed])]


def rewrite_layer(
    tree: ast.FunctionDef, children: Children
) -> tuple[ast.FunctionDef, tuple[Site | Chain, ...]] | None:
    """Let a decoder layer pass norms and residuals on to the children that take them.

    Returns:
        The new tree and its sites, by which it calls ``_littlebit2_more`` and ``_littlebit2_chain``; ``None``
        if there is nothing to pass on.
    """
    if not tree.args.args or _names_clash(tree):
        return None
    tree = copy.deepcopy(tree)
    finder = _Finder(tree.args.args[0].arg, tree.body, children)
    body: list[ast.stmt] = []
    sites: list[Site | Chain] = []
    index = 0
    while index < len(tree.body):
        found = finder.chain(index, len(sites)) or finder.site(index, len(sites))
        if found is None:
            body.append(tree.body[index])
            index += 1
            continue
        site, statements, index = found
        sites.append(site)
        body += statements
    tree.body = body
    return (tree, tuple(sites)) if sites else None


_Found = tuple[Any, list[ast.stmt], int]


class _Finder:
    """Finds sites among the statements of a function, and makes what takes their place."""

    def __init__(self, this: str, body: Sequence[ast.stmt], children: Children) -> None:
        self._this = this
        self._body = body
        self._children = children
        self._norms: Mapping[str, Norm] = dict(children.norms)
        self._takers: Mapping[str, Taker] = dict(children.takers)
        self._activations = {activation.name: activation for activation in children.activations}

    def site(self, index: int, number: int) -> _Found | None:
        """A call of a child, with a norm before it or a sum after it."""
        norm = self._simple(index, self._norms)
        found = None if norm is None else self._call(index + 1)
        if norm is None or found is None or not found[1].norm or not self._takes(found, norm):
            norm, found, start = None, self._call(index), index
        else:
            start = index + 1
        if found is None:
            return None
        name, taker, call, target = found
        rest = self._sum(start + 1, target) if taker.residual else None
        if rest is not None and stores(self._body[start], rest[0]):
            rest = None  # the child returns another residual
        if norm is None and rest is None:
            return None
        first = copy.deepcopy(self._body[start])
        inner: Any = first
        changed: ast.Call = inner.value
        if norm is not None:
            for node in ast.walk(changed):
                if is_name(node, norm[1]):
                    node.id = norm[2]  # type: ignore[attr-defined]
        if rest is not None:
            changed.keywords.append(ast.keyword(RESIDUAL, as_expression(rest[0], call)))
        changed.keywords.append(ast.keyword(None, as_expression(_MORE, call)))
        # A plain child's call is one of its ``forward``.
        changed.func = as_expression(f"{self._this}._modules[{name!r}].forward", call)
        end = start + 1 if rest is None else rest[2]
        original = list(self._body[index:end])
        statements = [
            as_statement(f"{_MORE} = {self._this}._littlebit2_more({number})", self._body[index]),
            branch(_MORE, original, [first, *([] if rest is None else [rest[1]])]),
        ]
        site = Site(
            name,
            taker.kind,
            None if norm is None else norm[0],
            None if norm is None else self._norms[norm[0]],
            rest is not None,
            *(((), ()) if rest is None else rest[3:]),
        )
        return site, statements, end

    def chain(self, index: int, number: int) -> _Found | None:
        """Two linear layers with an activation between them, all in one variable."""
        linears: dict[str, Any] = dict.fromkeys(self._children.linears)
        steps = [
            self._simple(index + i, names) for i, names in enumerate((linears, self._activations, linears))
        ]
        if None in steps:
            return None
        first, act, second = (step for step in steps if step is not None)
        target = second[1]
        if not first[1] == act[1] == act[2] == second[2] == target:
            return None
        rest = self._sum(index + 3, target)
        end = index + 3 if rest is None else rest[2]
        call = f"{_SUM} = {self._this}._littlebit2_chain({number}, {first[2]}, {rest[0] if rest else None})"
        then = [as_statement(f"{target} = {_SUM}", self._body[index]), *([] if rest is None else [rest[1]])]
        statements = [
            as_statement(call, self._body[index]),
            branch(_SUM, list(self._body[index:end]), then),
        ]
        more = ((), ()) if rest is None else rest[3:]
        chain = Chain((first[0], second[0]), self._activations[act[0]], rest is not None, *more)
        return chain, statements, end

    def _simple(self, index: int, names: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """``target = self.name(argument)``: name, target and argument."""
        node = self._body[index] if index < len(self._body) else None
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            return None
        target, call = node.targets[0], node.value
        if not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or call.keywords:
            return None
        name = child_called(call, self._this)
        if name not in names or len(call.args) != 1 or not isinstance(call.args[0], ast.Name):
            return None
        return str(name), target.id, call.args[0].id

    def _call(self, index: int) -> tuple[str, Taker, ast.Call, str] | None:
        """``target = self.child(...)``, or ``target, ... = ``: name, child, call and target."""
        node = self._body[index] if index < len(self._body) else None
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            return None
        target, call = node.targets[0], node.value
        if isinstance(target, ast.Tuple) and target.elts:
            if not all(isinstance(one, ast.Name) for one in target.elts):
                return None
            target = target.elts[0]
        name = child_called(call, self._this)
        if not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or name not in self._takers:
            return None
        return str(name), self._takers[str(name)], call, target.id

    def _takes(self, found: tuple[str, Taker, ast.Call, str], norm: tuple[str, str, str]) -> bool:
        """Whether the call is of the normalized tensor, and nothing else ever uses that."""
        _, taker, call, target = found
        normalized = norm[1]
        by_place = bool(call.args) and is_name(call.args[0], normalized)
        by_name = any(
            word.arg == taker.parameter and is_name(word.value, normalized) for word in call.keywords
        )
        if by_place == by_name or loads(call, normalized) != 1:
            return False
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return False
        return target == normalized or sum(loads(node, normalized) for node in self._body) == 1

    def _sum(self, index: int, name: str) -> tuple[str, ast.stmt, int, Any, Any] | None:
        """A statement that uses ``name`` for a sum with a residual alone, after dropouts that may be there.

        Returns:
            The residual's name, the statement with ``name`` in place of the sum, the index after it, names of
            dropout modules, and attributes with rates.
        """
        rates: list[str] = []
        while index < len(self._body) and (rate := self._dropout(self._body[index], name)) is not None:
            rates.append(rate)
            index += 1
        if index >= len(self._body):
            return None
        statement = copy.deepcopy(self._body[index])
        if not isinstance(statement, (ast.Assign, ast.Return)) or loads(statement, name) != 1:
            return None
        for node in unconditional(statement):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
                continue
            for residual, summand in ((node.left, node.right), (node.right, node.left)):
                output, dropouts = self._dropped(summand)
                if not is_name(output, name) or not isinstance(residual, ast.Name) or residual.id == name:
                    continue
                gone = isinstance(statement, ast.Return) or any(
                    is_name(target, name) for target in statement.targets
                )
                if not gone and any(loads(later, name) for later in self._body[index + 1 :]):
                    return None
                become(node, as_expression(name, node))
                return residual.id, statement, index + 1, dropouts, tuple(rates)
        return None

    def _dropped(self, node: ast.expr) -> tuple[ast.expr, tuple[str, ...]]:
        """``x`` and the name of the dropout module for ``self.dropout(x)``; any other node itself."""
        name = child_called(node, self._this)
        if name not in self._children.dropouts:
            return node, ()
        assert isinstance(node, ast.Call)
        return (node.args[0], (str(name),)) if len(node.args) == 1 and not node.keywords else (node, ())

    def _dropout(self, node: ast.stmt, name: str) -> str | None:
        """The attribute of the rate in ``name = dropout(name, p=self.rate, training=self.training)``."""
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not is_name(node.targets[0], name):
            return None
        call = node.value
        if not isinstance(call, ast.Call) or ast.unparse(call.func) not in _DROPOUT:
            return None
        if len(call.args) != 1 or not is_name(call.args[0], name):
            return None
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        rate = words.get("p", "")
        this = f"{self._this}."
        if words != {"p": rate, "training": f"{this}training"} or not rate.startswith(this):
            return None
        attribute = rate.removeprefix(this)
        return attribute if attribute.isidentifier() else None


def _output_of(body: Sequence[ast.stmt], this: str, linears: Sequence[str]) -> tuple[str, ast.Call] | None:
    """The packed layer whose result is returned, alone or as the first of several, and its call."""
    if not body or not isinstance(body[-1], ast.Return):
        return None
    if sum(isinstance(node, ast.Return) for statement in body for node in ast.walk(statement)) > 1:
        return None  # a result that the residual would not be added to
    value = body[-1].value
    first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
    last = body[-2] if len(body) > 1 else None
    call: ast.expr | None = first
    if isinstance(first, ast.Name):
        if (
            not isinstance(last, ast.Assign)
            or len(last.targets) != 1
            or not is_name(last.targets[0], first.id)
        ):
            return None
        if loads(body[-1], first.id) != 1:
            return None
        call = last.value
    if not isinstance(call, ast.Call) or call.keywords or len(call.args) != 1:
        return None
    name = child_called(call, this)
    others = sum(
        isinstance(node, ast.Attribute) and node.attr == name
        for statement in body
        for node in ast.walk(statement)
    )
    return (str(name), call) if name in linears and others == 1 else None


def _variables(tree: ast.FunctionDef) -> frozenset[str]:
    """The names of parameters and of what is assigned."""
    parameters = {node.arg for node in ast.walk(tree.args) if isinstance(node, ast.arg)}
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
    }
    return frozenset(parameters | assigned)


def _names_clash(tree: ast.FunctionDef) -> bool:
    """Whether names are changed by the class around the function, or are not known from the source."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    mangled = any(name.startswith("__") and not name.endswith("__") for name in names)
    return mangled or bool(names & {"super", "locals", "vars", "eval", "exec", "__class__"})
