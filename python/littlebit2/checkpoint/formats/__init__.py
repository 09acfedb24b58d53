"""Layouts of packed layers on disk, one file each, and the registry that tries them."""

from .build import build_layer
from .columns import SALIENT_IDX, SALIENT_WEIGHT, StoredColumns, build_columns
from .int8 import INT8_SCALE, INT8_WEIGHT
from .layout import Layout, StoredLayer
from .names import module_prefix, natural_order, split_name
from .registry import LAYOUTS, find_layers, has_packed

__all__ = [
    "INT8_SCALE",
    "INT8_WEIGHT",
    "LAYOUTS",
    "SALIENT_IDX",
    "SALIENT_WEIGHT",
    "Layout",
    "StoredColumns",
    "StoredLayer",
    "build_columns",
    "build_layer",
    "find_layers",
    "has_packed",
    "module_prefix",
    "natural_order",
    "split_name",
]
