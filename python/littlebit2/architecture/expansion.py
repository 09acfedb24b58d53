"""Everything linear in a model as ``nn.Linear`` modules: fused experts, and weights held transposed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .experts import collapse_experts, expand_experts
from .transposed import collapse_transposed, expand_transposed

__all__ = ["collapse", "expand", "expanded"]


def expand(model: nn.Module) -> dict[str, nn.Module]:
    """Replace fused experts (:mod:`.experts`) and transposed layers (:mod:`.transposed`), in place.

    No weight is copied: the new modules hold views.

    Returns:
        The modules of experts that were replaced, by name, for :func:`collapse`.
    """
    expand_transposed(model)
    try:
        return expand_experts(model)
    except BaseException:
        collapse_transposed(model)
        raise


def collapse(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo :func:`expand` for what was not replaced since.

    Args:
        model: what :func:`expand` was called with.
        replaced: what it returned.
    """
    collapse_experts(model, replaced)
    collapse_transposed(model)


@contextmanager
def expanded(model: nn.Module) -> Iterator[None]:
    """Expand ``model`` for as long as this lasts, and collapse what is dense then."""
    replaced = expand(model)
    try:
        yield
    finally:
        collapse(model, replaced)
