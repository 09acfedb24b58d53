"""Tensors of a ``torch.save`` file, without running what its pickle may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .headers import DTYPES

__all__ = ["read_pickle"]


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, memory-mapped; short sequences of ints (shapes) as int64 tensors.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged pickle raises is not specified
        raise CheckpointError(
            f"{file}: cannot be loaded as tensors alone (weights_only, memory-mapped): {str(error)[:500]}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: must hold a dict of tensors, got {type(state).__name__}")
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        tensor = _sizes(value)
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise CheckpointError(
                f"{file}: must hold dense tensors by name, got {type(value).__name__} under {name!r:.80}"
            )
        found[name] = tensor.detach()
    return found


def _sizes(value: Any) -> Any:
    """A shape that was saved as a tuple or list, as a tensor; anything else as it is."""
    if isinstance(value, (tuple, list)) and 0 < len(value) <= 4 and all(type(size) is int for size in value):
        try:
            return torch.tensor(value, dtype=torch.int64)
        except (OverflowError, RuntimeError):
            return value
    return value


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the file holds every element: strides of zero could announce more than there is memory."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES.values()
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.dtype.itemsize
    )
