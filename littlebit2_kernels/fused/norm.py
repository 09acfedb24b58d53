"""RMS normalization of the input of layers, as a part of their call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["RMSNorm"]


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """What layers take of ``x`` ``[..., K]``: ``x / sqrt(mean(x^2) + eps) * (weight + offset)``.

    Computed in float32. Calls in native kernels do not round it; :meth:`apply` rounds it to the dtype of
    ``x``, as the modules of models do.

    Attributes:
        weight: ``[K]`` float32, float16 or bfloat16.
        eps: at least 0.
        offset: added to the weight; 1 for Gemma.

    Raises:
        TypeError: ``weight`` is not a tensor of a supported dtype.
        ValueError: ``weight`` is not ``[K]``, ``eps`` is negative, or ``eps`` or ``offset`` is not finite.
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        weight = self.weight
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")
        if weight.dim() != 1 or weight.layout != torch.strided:
            raise ValueError(f"weight must be a dense tensor of shape [K], got shape {list(weight.shape)}")
        # Comparisons: where torch.compile takes eps for a variable, math.isfinite breaks the graph.
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and at least 0, got {self.eps}")
        if not -math.inf < self.offset < math.inf:
            raise ValueError(f"offset must be finite, got {self.offset}")

    @classmethod
    def known(cls, weight: torch.Tensor, eps: float, offset: float) -> RMSNorm:
        """Make one of what was checked before: a step makes dozens."""
        norm = object.__new__(cls)
        norm.__dict__.update(weight=weight, eps=eps, offset=offset)
        return norm

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize ``x`` ``[..., K]`` by torch's operations; the result has its dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (self.weight.float() + self.offset)).to(x.dtype)
