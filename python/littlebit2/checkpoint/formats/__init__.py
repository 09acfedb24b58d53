"""Layouts of packed layers on disk, one file each, and the registry that tries them."""

from .build import build_layer
from .layout import Layout, StoredLayer
from .names import module_prefix, natural_order, split_name
from .registry import LAYOUTS, find_layers, has_packed

__all__ = [
    "LAYOUTS",
    "Layout",
    "StoredLayer",
    "build_layer",
    "find_layers",
    "has_packed",
    "module_prefix",
    "natural_order",
    "split_name",
]
