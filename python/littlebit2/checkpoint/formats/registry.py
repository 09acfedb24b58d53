"""Tries the layouts on the tensors of a checkpoint. A new layout is a new file and an entry here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from littlebit2.checkpoint.headers import TensorEntry
from littlebit2.checkpoint.specs import packed_part

from .columns import StoredColumns, join_columns, take_columns
from .dbf import DoubleBinary
from .examination import ReadInts
from .layout import Layout, Leaves, StoredLayer
from .littlebit import LittleBit
from .littlebit2 import LittleBit2
from .littlebit_latent import LittleBitLatent
from .names import natural_order, split_name
from .nanoquant import NanoQuant
from .onebit import OneBit
from .unknown import looks_packed

__all__ = ["LAYOUTS", "find_layers", "has_packed"]

#: In the order in which they are tried: the first that claims a layer has it.
LAYOUTS: tuple[Layout, ...] = (
    DoubleBinary(),
    NanoQuant(),
    LittleBitLatent(),
    LittleBit(),
    OneBit(),
    LittleBit2(),
)


def find_layers(
    entries: Mapping[str, TensorEntry], read_ints: ReadInts, *, strict: bool
) -> tuple[dict[str, StoredLayer], dict[str, StoredColumns], list[str], list[str]]:
    """Find the packed layers among the tensors of a checkpoint and check their headers.

    Args:
        entries: every tensor, by full name.
        read_ints: gives the few values of an int64 tensor.
        strict: whether the checkpoint declares this project's format.

    Returns:
        The layers by module path, in the order of the model; salient columns beside them, by module path;
        what is wrong with others, one line each; and tensors that look like packed weights and fit no layout,
        one line each.
    """
    claimed, modules, columns = _claim(entries)
    found: dict[str, StoredLayer] = {}
    faults: list[str] = []
    for module, (layout, leaves) in sorted(claimed.items(), key=lambda item: natural_order(item[0])):
        layer, wrong = layout.examine(module, leaves, read_ints, strict=strict)
        faults += wrong
        if layer is not None:
            found[module] = layer
    layers, beside, wrong = join_columns(columns, found)
    faults += wrong
    unknown = [
        f"{entry.file.name}: {entry.name} ({entry.dtype} of shape {list(entry.shape)})"
        for entry in _unknown(modules)
    ]
    return layers, beside, faults, unknown


def has_packed(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether some tensors look like packed weights, of a layout that is read or of another."""
    claimed, modules, _ = _claim(entries)
    return bool(claimed) or any(True for _ in _unknown(modules))


def _claim(
    entries: Mapping[str, TensorEntry],
) -> tuple[
    dict[str, tuple[Layout, Leaves]], dict[str, dict[str, TensorEntry]], dict[str, dict[str, TensorEntry]]
]:
    """Return the layers and their salient columns, by module path, and the tensors that are left."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, leaf = split_name(name)
        modules.setdefault(module, {})[leaf] = entry
    columns = take_columns(modules)
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
    return claimed, modules, columns


def _unknown(modules: Mapping[str, Leaves]) -> Iterator[TensorEntry]:
    for leaves in modules.values():
        for leaf, entry in leaves.items():
            if looks_packed(leaf, entry):
                yield entry
