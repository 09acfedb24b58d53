"""From decoded tensors to the packed layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from littlebit2.checkpoint.errors import CheckpointError
from littlebit2_kernels.format import WORD_BITS, PackedLinear
from littlebit2_kernels.state import packed_from_state, path_suffix

from .layout import StoredLayer
from .names import module_prefix

__all__ = ["build_layer"]


def build_layer(layer: StoredLayer, data: Mapping[str, torch.Tensor]) -> PackedLinear:
    """Build the packed layer in memory of its own.

    Args:
        layer: from :func:`.find_layers`.
        data: the tensors of ``layer.tensors``, by full name; may be mapped from files.

    Raises:
        CheckpointError: values are malformed: NaN, infinite scales, set pad bits, wrong stored shapes.
    """
    spec = layer.spec
    prefix = module_prefix(spec.name)
    where = next(iter(layer.tensors.values())).file
    try:
        state = layer.layout.decode(layer, data)
        for path in range(spec.shape.num_paths):
            _complete_path(state, layer, path)
        packed = packed_from_state({prefix + leaf: tensor for leaf, tensor in state.items()}, prefix)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        # A KeyError's text is the repr of its message.
        raise CheckpointError(
            f"{where}: layer {spec.name}: {error.args[0] if error.args else error}"
        ) from error
    if packed.shape != spec.shape:
        raise CheckpointError(
            f"{where}: layer {spec.name}: expected {spec.shape}, as its headers said, got {packed.shape}"
        )
    return packed


def _complete_path(state: dict[str, torch.Tensor], layer: StoredLayer, path: int) -> None:
    """Add stored shapes and a latent scale where they are absent, and bring the rank to a multiple of 8."""
    s = path_suffix(path)
    shape = layer.spec.shape
    rows = shape.out_features if shape.ranks is None else layer.stored_ranks[path]
    if f"V_packed{s}" in state:
        state.setdefault(f"V_shape{s}", torch.tensor([rows, shape.in_features], device="cpu"))
    if shape.ranks is None:
        return
    state.setdefault(f"U_shape{s}", torch.tensor([shape.out_features, rows], device="cpu"))
    if f"v1{s}" not in state:
        state.setdefault(f"latent_scale{s}", torch.ones(rows, dtype=torch.float32, device="cpu"))
    missing = shape.ranks[path] - rows
    if missing:
        _pad_rank(state, s, missing, rows)


def _pad_rank(state: dict[str, torch.Tensor], s: str, missing: int, rows: int) -> None:
    """Append latents of scale zero; the stored shapes are checked before they are changed."""
    for leaf, index in ((f"V_shape{s}", 0), (f"U_shape{s}", 1)):
        if leaf in state:
            shape = state[leaf].flatten().clone()
            if int(shape[index]) != rows:
                raise ValueError(f"{leaf} must hold rank {rows}, got {shape.tolist()}")
            shape[index] += missing
            state[leaf] = shape
    tail = rows % WORD_BITS
    if bool((state[f"U_packed{s}"][:, -1] & -(1 << tail)).any()):
        raise ValueError(f"U_packed{s} has non-zero pad bits past column {rows}")
    if f"V_packed{s}" in state:
        state[f"V_packed{s}"] = torch.nn.functional.pad(state[f"V_packed{s}"], (0, 0, 0, missing))
    for leaf in (f"latent_scale{s}", f"v1{s}", f"u2{s}"):
        if leaf in state:
            state[leaf] = torch.nn.functional.pad(state[leaf].flatten(), (0, missing))
