"""Tries the layouts on the tensors of a checkpoint. A new layout is a new file and an entry here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from littlebit2.checkpoint.headers import TensorEntry
from littlebit2.checkpoint.specs import Int8Spec, packed_part

from .columns import StoredColumns, join_columns, take_columns
from .dbf import DoubleBinary
from .examination import ReadInts
from .int8 import check_int8, take_int8
from .layout import Layout, Leaves, StoredLayer
from .littlebit import LittleBit
from .littlebit2 import LittleBit2
from .littlebit_latent import LittleBitLatent
from .names import natural_order, split_name
from .nanoquant import NanoQuant
from .onebit import OneBit
from .unknown import looks_packed

__all__ = ["LAYOUTS", "Found", "find_layers", "has_packed"]

#: In the order in which they are tried: the first that claims a layer has it.
LAYOUTS: tuple[Layout, ...] = (
    DoubleBinary(),
    NanoQuant(),
    LittleBitLatent(),
    LittleBit(),
    OneBit(),
    LittleBit2(),
)


@dataclass(frozen=True)
class Found:
    """What the tensors of a checkpoint hold besides dense ones.

    Attributes:
        layers: packed layers by module path, in the order of the model.
        columns: salient columns beside them, by module path.
        int8: dense matrices in int8 rows, by module path.
        faults: what is wrong with others, one line each.
        unknown: tensors that look like packed weights and fit no layout, one line each.
    """

    layers: dict[str, StoredLayer]
    columns: dict[str, StoredColumns]
    int8: dict[str, Int8Spec]
    faults: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class _Claims:
    """Whose each tensor is, by module path; ``rest`` belongs to nobody."""

    layers: dict[str, tuple[Layout, Leaves]]
    columns: dict[str, dict[str, TensorEntry]]
    int8: dict[str, dict[str, TensorEntry]]
    rest: dict[str, dict[str, TensorEntry]]


def find_layers(entries: Mapping[str, TensorEntry], read_ints: ReadInts, *, strict: bool) -> Found:
    """Find the packed layers among the tensors of a checkpoint and check their headers.

    Args:
        entries: every tensor, by full name.
        read_ints: gives the few values of an int64 tensor.
        strict: whether the checkpoint declares this project's format.
    """
    claims = _claim(entries)
    found: dict[str, StoredLayer] = {}
    faults: list[str] = []
    for module, (layout, leaves) in sorted(claims.layers.items(), key=lambda item: natural_order(item[0])):
        layer, wrong = layout.examine(module, leaves, read_ints, strict=strict)
        faults += wrong
        if layer is not None:
            found[module] = layer
    layers, beside, wrong = join_columns(claims.columns, found)
    int8, wrong_rows = check_int8(claims.int8)
    unknown = [
        f"{entry.file.name}: {entry.name} ({entry.dtype} of shape {list(entry.shape)})"
        for entry in _unknown(claims.rest)
    ]
    return Found(layers, beside, int8, [*faults, *wrong, *wrong_rows], unknown)


def has_packed(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether some tensors look like packed weights, of a layout that is read or of another."""
    claims = _claim(entries)
    return bool(claims.layers) or any(True for _ in _unknown(claims.rest))


def _claim(entries: Mapping[str, TensorEntry]) -> _Claims:
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, leaf = split_name(name)
        modules.setdefault(module, {})[leaf] = entry
    columns, int8 = take_columns(modules), take_int8(modules)
    claimed: dict[str, tuple[Layout, Leaves]] = {}
    for layout in LAYOUTS:
        for module, leaves in layout.find(modules).items():
            claimed[module] = (layout, leaves)
            taken = {entry.name for entry in leaves.values()}
            for owner in {split_name(name)[0] for name in taken}:
                left = {leaf: entry for leaf, entry in modules[owner].items() if entry.name not in taken}
                modules[owner] = left
    for module in [name for name in columns if name not in claimed and packed_part(name) not in claimed]:
        modules[module] |= columns.pop(module)  # of no packed layer
    if not claimed:  # int8 rows of another method
        for module in list(int8):
            modules[module] |= int8.pop(module)
    return _Claims(claimed, columns, int8, modules)


def _unknown(modules: Mapping[str, Leaves]) -> Iterator[TensorEntry]:
    for leaves in modules.values():
        for leaf, entry in leaves.items():
            if looks_packed(leaf, entry):
                yield entry
