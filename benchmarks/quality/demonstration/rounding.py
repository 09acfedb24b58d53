"""Weights rounded to 8 and 4 bits: what a reader knows, beside packed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

__all__ = ["ROUNDINGS", "round_"]

_GROUP = 32


def _to_int8(weight: torch.Tensor) -> torch.Tensor:
    """Round to 8 bits, with one scale for each row."""
    return _rounded(weight, 127)


def _to_int4(weight: torch.Tensor) -> torch.Tensor:
    """Round to 4 bits, with one scale for 32 weights, or for a row whose length is no multiple of that."""
    group = _GROUP if weight.shape[1] % _GROUP == 0 else weight.shape[1]
    return _rounded(weight.reshape(-1, group), 7).reshape(weight.shape)


def _rounded(groups: torch.Tensor, most: int) -> torch.Tensor:
    scale = groups.abs().amax(1, keepdim=True) / most
    # A scale has 16 bits.
    scale = scale.half().to(groups.dtype).clamp_min(torch.finfo(groups.dtype).tiny)
    return (groups / scale).round().clamp(-most, most) * scale


#: By bits per weight, with a scale of 16 bits for each group: name and rounding.
ROUNDINGS: dict[float, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    8.0: ("int8, a scale a row", _to_int8),
    4.5: ("int4, a scale for 32", _to_int4),
}


def round_(model: nn.Module, names: Iterable[str], rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Round the weights ``[N, K]`` of some linear layers in place.

    Args:
        model: that has them.
        names: of the layers.
        rounding: of :data:`ROUNDINGS`.
    """
    with torch.no_grad():
        for name in names:
            weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
            weight.copy_(rounding(weight))
