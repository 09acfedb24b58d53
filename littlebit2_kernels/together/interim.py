"""Interim composition of ``mlp`` and of ``grouped_linear`` with a norm and a residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..fusion import grouped_linear as _grouped

FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class RMSNorm:
    """The norm of an input."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0


def _normalized(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    if norm is None:
        return x
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps) * (norm.weight.float() + norm.offset)
    return y.to(x.dtype)


def grouped_linear(
    x: torch.Tensor,
    layers: Sequence[Any],
    backend: str = "auto",
    activation: str = "auto",
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Apply layers to ``x``."""
    out = _grouped(_normalized(x, norm), layers, backend, activation)
    return out if residual is None else [residual + out[0]]


def mlp(
    x: torch.Tensor,
    layers: Sequence[Any],
    function: str,
    backend: str = "auto",
    activation: str = "auto",
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply an MLP to ``x``."""
    first = _grouped(_normalized(x, norm), layers[:-1], backend, activation)
    act: Any = {
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    }[function]
    if len(first) == 1 and first[0].shape[-1] == 2 * layers[-1].in_features:
        first = list(first[0].chunk(2, dim=-1))
    hidden = act(first[0]) if len(first) == 1 else act(first[0]) * first[1]
    out = _grouped(hidden, layers[-1:], backend, activation)[0]
    return out if residual is None else residual + out
