"""Outputs of packed models beside those of the dense models that they stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from littlebit2.architecture.expansion import expanded
from littlebit2_kernels import LittleBitLinear

__all__ = ["dequantized", "difference", "outputs_of", "packed_share"]


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the floating-point outputs of a model."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [v for v in _tensors(values) if v.is_floating_point()]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def dequantized(packed: Any, dense: Any) -> Any:
    """Return a copy of the dense model that computes with the weights of the packed one."""
    model = copy.deepcopy(dense)
    layers = dict(packed.named_modules())
    with torch.no_grad(), expanded(model):
        for name, module in model.named_modules():
            layer = layers.get(name)
            if isinstance(layer, LittleBitLinear):
                assert isinstance(module, nn.Linear)
                module.weight.copy_(layer.dequantize())
    return model


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest value."""
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        scale = float(a[finite].abs().max()) if finite.any() else 0.0
        if scale:
            worst = max(worst, float((a - b)[finite].abs().max()) / scale)
    return worst


def packed_share(model: Any) -> float:
    """Return which share of the weights is in packed layers."""
    layers = [m for m in model.modules() if isinstance(m, LittleBitLinear)]
    packed = sum(m.in_features * m.out_features for m in layers)
    return packed / max(packed + sum(p.numel() for p in model.parameters()), 1)
