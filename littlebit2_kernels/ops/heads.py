"""What the fakes of operators on heads check of their tensors."""

from __future__ import annotations

import torch

from .operands import ACTIVATION_DTYPES

__all__ = ["check_angles", "check_heads"]


def check_heads(**heads: torch.Tensor) -> None:
    """Raise ``RuntimeError`` unless all have four dimensions and one dtype, that of activations."""
    dtype = next(iter(heads.values())).dtype
    for name, tensor in heads.items():
        _check_dimensions(name, tensor, 4, "four")
        if tensor.dtype != dtype or dtype not in ACTIVATION_DTYPES:
            raise RuntimeError(
                f"littlebit2: {name} must be float32, float16 or bfloat16, all alike, got {tensor.dtype}"
            )


def check_angles(cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raise ``RuntimeError`` unless both have three dimensions."""
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check_dimensions(name, tensor, 3, "three")


def _check_dimensions(name: str, tensor: torch.Tensor, count: int, word: str) -> None:
    if tensor.dim() != count:
        raise RuntimeError(f"littlebit2: {name} must have {word} dimensions, got shape {list(tensor.shape)}")
