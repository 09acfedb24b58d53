"""Tries the layouts on the tensors of a checkpoint. A new layout is a new file and an entry here."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from littlebit2.checkpoint.headers import TensorEntry

from .examination import ReadInts
from .layout import Layout, Leaves, StoredLayer
from .littlebit import LittleBit
from .littlebit2 import LittleBit2
from .littlebit_latent import LittleBitLatent
from .names import natural_order, split_name
from .nanoquant import NanoQuant
from .onebit import OneBit

__all__ = ["LAYOUTS", "find_layers"]

#: In the order in which they are tried: the first that claims a layer has it.
LAYOUTS: tuple[Layout, ...] = (NanoQuant(), LittleBitLatent(), LittleBit(), OneBit(), LittleBit2())

#: Names of tensors that hold signs or packed bits in other people's code.
_BINARY = re.compile(r"(\w+_)?(packed|binary|signs?|bp)(_\w+)?", re.IGNORECASE)
_BINARY_DTYPES = (
    torch.bool,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


def find_layers(
    entries: Mapping[str, TensorEntry], read_ints: ReadInts, *, strict: bool
) -> tuple[dict[str, StoredLayer], list[str]]:
    """Find the packed layers among the tensors of a checkpoint and check their headers.

    Args:
        entries: every tensor, by full name.
        read_ints: gives the few values of an int64 tensor.
        strict: whether the checkpoint declares this project's format.

    Returns:
        The layers by module path, in the order of the model, and everything that is wrong, one line each:
        faults of layers, and tensors that look like packed signs and fit no layout.
    """
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, leaf = split_name(name)
        modules.setdefault(module, {})[leaf] = entry
    claimed: dict[str, tuple[Layout, Leaves]] = {}
    for layout in LAYOUTS:
        for module, leaves in layout.find(modules).items():
            claimed[module] = (layout, leaves)
            taken = {entry.name for entry in leaves.values()}
            for owner in {split_name(name)[0] for name in taken}:
                left = {leaf: entry for leaf, entry in modules[owner].items() if entry.name not in taken}
                modules[owner] = left
    found: dict[str, StoredLayer] = {}
    faults: list[str] = []
    for module, (layout, leaves) in sorted(claimed.items(), key=lambda item: natural_order(item[0])):
        layer, wrong = layout.examine(module, leaves, read_ints, strict=strict)
        faults += wrong
        if layer is not None:
            found[module] = layer
    known = ", ".join(layout.name for layout in LAYOUTS)
    faults += [
        f"{entry.file.name}: {entry.name} looks like packed signs, but its module fits no layout that is "
        f"read ({known})"
        for leaves in modules.values()
        for leaf, entry in leaves.items()
        if _BINARY.fullmatch(leaf) and entry.dtype in _BINARY_DTYPES and entry.numel > 1
    ]
    return found, faults
