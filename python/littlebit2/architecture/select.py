"""Which modules are packed: patterns on names, and modules that a model itself calls a head or ties."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .names import DEFAULT_EXCLUDE

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = [
    "DEFAULT_EXCLUDE",
    "INT8",
    "INT8_ROWS",
    "KEEP",
    "check_patterns",
    "check_rows",
    "given_patterns",
    "is_selected",
    "keeps_heads_dense",
    "nothing_selected",
    "output_heads",
    "shared_parameters",
    "tied_names",
]


#: What becomes of a head or an embedding.
KEEP, INT8 = "keep", "int8"
#: Why a matrix is not packed that is written as int8 rows.
INT8_ROWS = "int8 rows"


def check_rows(head: str, embedding: str) -> None:
    """Raise ``ValueError`` unless both are names of what can become of a head or an embedding."""
    for name, value in (("head", head), ("embedding", embedding)):
        if value not in (KEEP, INT8):
            raise ValueError(f"{name} must be {KEEP!r} or {INT8!r}, got {value!r}")


def check_patterns(name: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return ``patterns`` as a tuple.

    Args:
        name: name of the argument, for the message.
        patterns: one shell-style pattern or several.

    Raises:
        TypeError: it is neither, or a pattern is not a string.
    """
    if not isinstance(patterns, (str, Sequence)):
        raise TypeError(f"{name} must be a pattern or a sequence of patterns, got {type(patterns).__name__}")
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must hold strings, got {pattern!r}")
    return listed


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether ``name`` matches a shell-style pattern of ``include`` and none of ``exclude``."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return matches(include) and not matches(exclude)


def keeps_heads_dense(exclude: Sequence[str]) -> bool:
    """Whether ``exclude`` contains all of :data:`DEFAULT_EXCLUDE`.

    If so, the heads that :func:`output_heads` finds stay dense too, whatever their name.
    """
    return set(DEFAULT_EXCLUDE) <= set(exclude)


def given_patterns(include: Sequence[str], exclude: Sequence[str]) -> str:
    """Return the patterns for a message, without the defaults, which nobody gave."""
    default = DEFAULT_EXCLUDE if keeps_heads_dense(exclude) else ()
    own = [pattern for pattern in exclude if pattern not in default]
    given = [] if tuple(include) == ("*",) else [f"include={list(include)}"]
    return ", ".join([*given, f"exclude={own}"] if own else given)


def nothing_selected(include: Sequence[str], exclude: Sequence[str]) -> str:
    """Say that patterns select no layer."""
    given = given_patterns(include, exclude)
    besides = " besides heads" if keeps_heads_dense(exclude) else ""
    if not given:
        return f"the model has no linear layer to pack{besides}"
    return f"include must select at least one linear layer{besides}, got {given}"


def output_heads(model: Module) -> set[str]:
    """Return every name of the module that maps to the vocabulary.

    The model says which one it is (``get_output_embeddings()``, as transformers models do); empty for a model
    that does not, or has none.
    """
    head = getattr(model, "get_output_embeddings", _none)()
    return set() if head is None else _names_of(model, head)


def tied_names(model: Module) -> set[str]:
    """Return the names of linear modules whose weight is a parameter of another module too.

    A head that is tied to the embedding is the usual case. A module that is registered under several names
    is not tied to itself.
    """
    from torch.nn import Linear  # noqa: PLC0415  # names alone need no torch

    shared = shared_parameters(model)
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Linear) and id(module.weight) in shared
    }


def shared_parameters(model: Module) -> set[int]:
    """Return the ``id`` of every parameter that several modules hold."""
    owners: dict[int, set[Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return {one for one, modules in owners.items() if len(modules) > 1}


def _names_of(model: Module, wanted: Any) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if module is wanted}


def _none() -> None:
    return None
