"""Which linear layers a model's code uses as tensors: such layers must keep their dense weights.

Code that asks a weight for its dtype or device alone is told apart: :class:`.TypedLinear` can say these.

A packed layer has no ``weight``. Code that multiplies by ``self.out_proj.weight`` itself, instead of calling
the module, is found in its source and in that of its base classes: attribute chains that end in
``.NAME.weight`` or ``.NAME.bias``, also through a local variable, outside of initialization.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TypeGuard

from torch import nn

__all__ = ["modules_asked_for_dtype", "modules_read_as_tensors"]

_TENSORS = ("weight", "bias")
_ATTRIBUTE = re.compile(r"\.\s*([^\W\d]\w*)")
#: What a layer without a weight can say of it.
_KINDS = ("dtype", "device")
#: Where the classes below every module are defined.
_BASES = {nn.Module.__module__, "builtins", "abc", "typing"}
#: Functions that do not run when a model computes.
_QUIET = (
    "__init__",
    "__repr__",
    "_init_weights",
    "_initialize_weights",
    "_reset_parameters",
    "_resize_token_embeddings",
    "_tie_weights",
    "init_weights",
    "reset_parameters",
    "resize_token_embeddings",
    "tie_weights",
)


@dataclass(frozen=True)
class _Read:
    """One attribute chain: ``("attention", "output")`` for ``block.attention.output.weight``.

    Attributes:
        chain: names of modules, the last one that of the layer.
        owner: name of the class whose code it is.
        own: whether the chain begins at ``self``; else at any module below.
        where: file and line.
        kind: whether the weight is only asked for its dtype or device, or for being a tensor.
    """

    chain: tuple[str, ...]
    owner: str
    own: bool
    where: str
    kind: bool = False


def modules_read_as_tensors(model: nn.Module) -> dict[str, str]:
    """Return the names of modules whose weight or bias the model's code reads, and where it does.

    A chain from ``self`` counts for children of modules of its class; any other chain in a method for all
    modules that are called so somewhere below such a module, as what it begins with is not known. Reads of
    dtype and device do not count.
    """
    return _found(model, kind=False)


def modules_asked_for_dtype(model: nn.Module) -> set[str]:
    """Return the names of modules whose weight the model's code asks for its dtype or device, and no more."""
    asked = _found(model, kind=True)
    return set(asked) - set(_found(model, kind=False)) if asked else set()


def _found(model: nn.Module, *, kind: bool) -> dict[str, str]:
    names = [name for name, module in model.named_modules() if _may_have_weight(module)]
    leaves = {name.rpartition(".")[2] for name in names}
    reads: dict[str, list[_Read]] = {}
    classes = {one for module in model.modules() for one in type(module).__mro__}
    for source in {one.__module__ for one in classes} - _BASES:
        code = sys.modules.get(source)
        # Most of the library's own modules name no layer: they are not parsed, which takes half a second.
        if code is None or leaves.isdisjoint(_attributes(code)):
            continue
        for read in (one for one in _reads(code) if one.kind == kind):
            reads.setdefault(read.chain[-1], []).append(read)
    found: dict[str, str] = {}
    for name in names:
        parts = tuple(name.split("."))
        for read in reads.get(parts[-1], ()):
            size = len(read.chain)
            if parts[-size:] != read.chain:
                continue
            owners = [".".join(parts[:-size])]
            if not read.own:
                owners += [".".join(parts[:i]) for i in range(len(parts) - size)]
            if any(read.owner in _classes(model.get_submodule(owner)) for owner in owners):
                found[name] = read.where
                break
    return found


def _may_have_weight(module: nn.Module) -> bool:
    """Whether a module is more than a container of others; trainable layers have a property ``weight``."""
    own = module._parameters or module._buffers or not module._modules
    return bool(own) or hasattr(type(module), "weight")


def _classes(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _is_weight(node: ast.expr) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


@functools.cache
def _source(code: ModuleType) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""


@functools.cache
def _attributes(code: ModuleType) -> frozenset[str]:
    """Names that stand behind a dot somewhere in the source, in code or not."""
    return frozenset(_ATTRIBUTE.findall(_source(code)))


@functools.cache
def _reads(code: ModuleType) -> tuple[_Read, ...]:
    try:
        tree = ast.parse(_source(code))
    except SyntaxError:
        return ()
    visitor = _Visitor(code.__name__.rpartition(".")[2])
    visitor.visit(tree)
    return tuple(visitor.found)


class _Visitor(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.found: list[_Read] = []
        self._module = module
        self._class: str | None = None
        #: Local variables that stand for an attribute chain: its names, and whether it begins at ``self``.
        self._locals: dict[str, tuple[tuple[str, ...], bool]] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outside

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in _QUIET:
            outside, self._locals = self._locals, {}
            self.generic_visit(node)
            self._locals = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        chain = self._chain(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                if chain is None:
                    self._locals.pop(target.id, None)
                else:
                    self._locals[target.id] = chain

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _KINDS and _is_weight(node.value):
            self._note(node.value, kind=True)
        else:
            self._note(node, kind=False)
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance" and _is_weight(node.args[0]):
            self._note(node.args[0], kind=True)
        else:
            self.generic_visit(node)

    def _note(self, node: ast.Attribute, *, kind: bool) -> None:
        chain = self._chain(node.value) if node.attr in _TENSORS else None
        if self._class is not None and chain is not None:
            where = f"{self._module}.py:{node.lineno}"
            self.found.append(_Read(chain[0], self._class, chain[1], where, kind))

    def _chain(self, node: ast.expr) -> tuple[tuple[str, ...], bool] | None:
        """Names of an attribute chain and whether it begins at ``self``; ``None`` for anything else."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        start = node.id if isinstance(node, ast.Name) else ""
        if start in self._locals:
            known, own = self._locals[start]
            return (*known, *names), own
        return (tuple(names), start == "self") if names else None
