"""Which linear layers a model's code uses as tensors: such layers must keep their dense weights.

A packed layer has no ``weight``. Code that multiplies by ``self.out_proj.weight`` itself, instead of calling
the module, is found in its source: attribute chains that end in ``.NAME.weight`` or ``.NAME.bias``, outside
of initialization.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

from torch import nn

__all__ = ["modules_read_as_tensors"]

_TENSORS = ("weight", "bias")
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
        owner: name of the class whose code it is, if the chain begins at ``self``.
        where: file and line.
    """

    chain: tuple[str, ...]
    owner: str | None
    where: str


def modules_read_as_tensors(model: nn.Module) -> dict[str, str]:
    """Return the names of modules whose weight or bias the model's code reads, and where it does.

    A chain from ``self`` counts for the modules of its class; any other chain for all modules that are called
    so, as what it begins with is not known.
    """
    reads: dict[str, list[_Read]] = {}
    for source in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(source)
        for read in () if code is None else _reads(code):
            reads.setdefault(read.chain[-1], []).append(read)
    found: dict[str, str] = {}
    for name, _ in model.named_modules():
        parts = tuple(name.split("."))
        for read in reads.get(parts[-1], ()):
            size = len(read.chain)
            if parts[-size:] != read.chain:
                continue
            if read.owner is not None:
                owner = model.get_submodule(".".join(parts[:-size]))
                if read.owner not in {kind.__name__ for kind in type(owner).__mro__}:
                    continue
            found[name] = read.where
            break
    return found


@functools.cache
def _reads(code: ModuleType) -> tuple[_Read, ...]:
    try:
        tree = ast.parse(inspect.getsource(code))
    except (OSError, TypeError, SyntaxError):
        return ()
    visitor = _Visitor(code.__name__.rpartition(".")[2])
    visitor.visit(tree)
    return tuple(visitor.found)


class _Visitor(ast.NodeVisitor):
    def __init__(self, module: str) -> None:
        self.found: list[_Read] = []
        self._module = module
        self._class: str | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outside, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outside

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in _QUIET:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _TENSORS and isinstance(node.value, ast.Attribute):
            names: list[str] = []
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                names.insert(0, inner.attr)
                inner = inner.value
            own = isinstance(inner, ast.Name) and inner.id == "self"
            self.found.append(
                _Read(tuple(names), self._class if own else None, f"{self._module}.py:{node.lineno}")
            )
        self.generic_visit(node)
