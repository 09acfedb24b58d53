"""``TypedLinear``: a packed layer in code that asks the weight of a linear layer for its dtype or device.

T5 and its kin cast to ``self.wo.weight.dtype`` before they call ``self.wo``, others to that of a projection's
weight. A packed layer has no weight, but it can say these two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear

__all__ = ["TypedLinear"]


class TypedLinear(LittleBitLinear):
    """A packed layer with a ``weight`` that is empty: only its dtype and device mean something.

    Code that multiplies by it fails on its shape. The dtype is that of the dense weight in the layer's place,
    in which the model's code calls the layer; it follows ``.half()`` and ``.to(dtype)`` as that would.

    Attributes:
        weight_dtype: dtype of ``weight``; may be set.
    """

    weight_dtype: torch.dtype = torch.float32

    @classmethod
    def from_packed(
        cls, packed: PackedLinear, *, weight_dtype: torch.dtype = torch.float32, **options: Any
    ) -> TypedLinear:
        """Wrap a packed layer.

        Args:
            packed: as for :meth:`.LittleBitLinear.from_packed`.
            weight_dtype: dtype of ``weight``.
            **options: likewise.
        """
        layer = super().from_packed(packed, **options)
        assert isinstance(layer, TypedLinear)
        layer.weight_dtype = weight_dtype
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor of the dtype and on the device that the weight would have."""
        device = next(buffer.device for buffer in self.buffers())
        return torch.empty(0, dtype=self.weight_dtype, device=device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TypedLinear:
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        return self
