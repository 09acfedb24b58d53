"""Salient columns: columns of a layer's weight that are stored dense beside its packed part.

``salient_idx [S]`` says which, ``salient_weight [N, S]`` holds them, as floats or as int8 with
``salient_scale [S]``. NanoQuant has these tensors beside the packed ones of a module. Our format has them
beside a child ``linear``, which holds the packed ones (docs/checkpoints.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from littlebit2.checkpoint.errors import CheckpointError
from littlebit2.checkpoint.headers import TensorEntry
from littlebit2.checkpoint.specs import ColumnsSpec, SalientColumns, packed_part

from .layout import Leaves, StoredLayer
from .names import module_prefix

__all__ = ["SALIENT_IDX", "SALIENT_WEIGHT", "StoredColumns", "build_columns", "join_columns", "take_columns"]

SALIENT_IDX, SALIENT_WEIGHT, _SCALE = "salient_idx", "salient_weight", "salient_scale"
_LEAVES = (SALIENT_IDX, SALIENT_WEIGHT, _SCALE)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: The layout whose modules hold columns and packed tensors side by side.
_SIDE_BY_SIDE = "nanoquant"


@dataclass(frozen=True)
class StoredColumns:
    """Salient columns as files hold them.

    Attributes:
        spec: what they are.
        in_features: K of the layer.
        entries: by leaf.
    """

    spec: ColumnsSpec
    in_features: int
    entries: Leaves

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def counted_bits(self) -> int:
        """16 bits for each entry, as for scales, and 32 for each index."""
        return self.spec.count * (16 * self.spec.out_features + 32)


def take_columns(modules: Mapping[str, dict[str, TensorEntry]]) -> dict[str, dict[str, TensorEntry]]:
    """Take the tensors of salient columns out of ``modules``; return them by module path and leaf."""
    return {
        module: {leaf: leaves.pop(leaf) for leaf in _LEAVES if leaf in leaves}
        for module, leaves in modules.items()
        if any(leaf in leaves for leaf in _LEAVES)
    }


def join_columns(
    columns: Mapping[str, Leaves], layers: Mapping[str, StoredLayer]
) -> tuple[dict[str, StoredLayer], dict[str, StoredColumns], list[str]]:
    """Check salient columns against their layers.

    Args:
        columns: from :func:`take_columns`.
        layers: the packed layers, by module path.

    Returns:
        The layers, those beside columns under the name of a packed part; the columns by module path; and
        faults, one line each.
    """
    found: dict[str, StoredColumns] = {}
    faults: list[str] = []
    for name, leaves in columns.items():
        layer = layers.get(name) or layers.get(packed_part(name))
        if layer is None:
            continue  # its own faults are reported
        wrong = _faults(name, leaves, layer, beside=name in layers)
        faults += wrong
        if not wrong:
            shape = layer.spec.shape
            spec = ColumnsSpec(name, shape.out_features, leaves[SALIENT_IDX].numel)
            found[name] = StoredColumns(spec, shape.in_features, leaves)
    named: dict[str, StoredLayer] = {}
    for name, layer in layers.items():
        new = packed_part(name) if name in found else name
        named[new] = replace(layer, spec=replace(layer.spec, name=new))
    return named, found, faults


def _faults(name: str, leaves: Leaves, layer: StoredLayer, beside: bool) -> list[str]:
    def fault(leaf: str, message: str) -> str:
        entry = leaves.get(leaf)
        where = module_prefix(name) + leaf if entry is None else f"{entry.file.name}: {entry.name}"
        return f"{where} {message}"

    first = next(iter(leaves))
    if beside and layer.layout.name != _SIDE_BY_SIDE:
        return [fault(first, f"holds salient columns beside a layer of layout {layer.layout.name}, not read")]
    if not beside and not layer.layout.ours:
        return [fault(first, f"holds salient columns of a layer of layout {layer.layout.name}, not read")]
    missing = [fault(leaf, "is missing") for leaf in (SALIENT_IDX, SALIENT_WEIGHT) if leaf not in leaves]
    if missing:
        return missing
    index, weight, scale = (leaves.get(leaf) for leaf in _LEAVES)
    assert index is not None
    assert weight is not None
    n, k, count = layer.spec.shape.out_features, layer.spec.shape.in_features, index.numel
    wrong = []
    if index.dtype not in (torch.int32, torch.int64):
        wrong.append(fault(SALIENT_IDX, f"must be int32 or int64, got {index.dtype}"))
    if len(index.shape) != 1 or count > k:
        wrong.append(fault(SALIENT_IDX, f"must hold at most {k} columns, got shape {list(index.shape)}"))
    small = weight.dtype == torch.int8 and beside
    if not small and weight.dtype not in _FLOATS:
        kinds = "float32, float16 or bfloat16" + (", or int8 with a salient_scale" if beside else "")
        wrong.append(fault(SALIENT_WEIGHT, f"must be {kinds}, got {weight.dtype}"))
    if tuple(weight.shape) != (n, count):
        wrong.append(fault(SALIENT_WEIGHT, f"must have shape {[n, count]}, got {list(weight.shape)}"))
    if small != (scale is not None):
        message = (
            "is missing" if scale is None else f"is unexpected beside {SALIENT_WEIGHT} of {weight.dtype}"
        )
        wrong.append(fault(_SCALE, message))
    elif scale is not None:
        if scale.dtype not in _FLOATS:
            wrong.append(fault(_SCALE, f"must be float32, float16 or bfloat16, got {scale.dtype}"))
        if tuple(scale.shape) not in ((count,), (1, count)):
            wrong.append(fault(_SCALE, f"must have shape [{count}] or [1, {count}], got {list(scale.shape)}"))
    return wrong


def build_columns(stored: StoredColumns, data: Mapping[str, torch.Tensor]) -> SalientColumns:
    """Return the columns in memory of their own; int8 ones become float32.

    Args:
        stored: from :func:`join_columns`.
        data: its tensors, by full name.

    Raises:
        CheckpointError: an index is out of range or there twice, or a value is not finite.
    """
    index = data[stored.entries[SALIENT_IDX].name]
    weight = data[stored.entries[SALIENT_WEIGHT].name]
    where: Path = stored.entries[SALIENT_IDX].file
    listed = index.tolist()
    if len(set(listed)) < len(listed) or not all(0 <= one < stored.in_features for one in listed):
        raise CheckpointError(
            f"{where}: layer {stored.spec.name}: {SALIENT_IDX} must hold different columns from 0 to "
            f"{stored.in_features - 1}, got {listed if len(listed) <= 8 else [*listed[:8], '...']}"
        )
    if _SCALE in stored.entries:
        weight = weight.float() * data[stored.entries[_SCALE].name].float().reshape(1, -1)
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f"{where}: layer {stored.spec.name}: {SALIENT_WEIGHT} must be finite, got NaN or infinity"
        )
    return SalientColumns(
        index.to(torch.int32, copy=True), weight.clone(memory_format=torch.contiguous_format)
    )
