"""Tensor names: splitting and ordering them."""

from __future__ import annotations

import re

__all__ = ["module_prefix", "natural_order", "split_name"]


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor name into module path and leaf; the path is empty at the root."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which ``layers.2`` comes before ``layers.10``."""
    return [
        (len(part.lstrip("0")) if index % 2 else 0, part)
        for index, part in enumerate(re.split(r"([0-9]+)", name))
    ]


def module_prefix(module: str) -> str:
    """What the names of a module's tensors begin with."""
    return f"{module}." if module else ""
