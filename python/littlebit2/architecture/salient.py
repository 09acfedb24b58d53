"""``SalientLinear``: a packed layer, and a few columns of the weight beside it that are dense."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from littlebit2_kernels import LittleBitLinear

__all__ = ["SalientLinear"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class SalientLinear(nn.Module):
    """Computes ``linear(x) + x[..., salient_idx] @ salient_weight.T``.

    NanoQuant makes such layers. The packed part is a :class:`~littlebit2_kernels.LittleBitLinear` of its own,
    under the name ``linear``: what prepacks, warms up or counts packed layers finds it there. The columns are
    buffers, which follow a change of dtype as dense weights do; they are used in the dtype of the packed
    part's output. Such layers are never computed in one call with others (:func:`.fuse_projections`).

    Args:
        linear: the packed part, with the bias of the layer if it has one.
        salient_idx: ``[S]`` integers, which inputs the dense columns multiply.
        salient_weight: ``[N, S]`` float32, float16 or bfloat16.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: shapes do not fit, or an index is out of range or there twice.
    """

    salient_idx: torch.Tensor
    salient_weight: torch.Tensor

    def __init__(
        self, linear: LittleBitLinear, salient_idx: torch.Tensor, salient_weight: torch.Tensor
    ) -> None:
        super().__init__()
        if not isinstance(linear, LittleBitLinear):
            raise TypeError(f"linear must be a LittleBitLinear, got {type(linear).__name__}")
        if salient_idx.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"salient_idx must be int32 or int64, got {salient_idx.dtype}")
        if salient_weight.dtype not in _FLOATS:
            raise TypeError(
                f"salient_weight must be float32, float16 or bfloat16, got {salient_weight.dtype}"
            )
        expected = (linear.out_features, salient_idx.numel())
        if salient_idx.dim() != 1 or salient_weight.shape != expected:
            raise ValueError(
                f"salient_weight must have shape {list(expected)} for salient_idx of shape "
                f"{list(salient_idx.shape)}, got {list(salient_weight.shape)}"
            )
        listed = salient_idx.tolist()
        if len(set(listed)) < len(listed) or not all(0 <= one < linear.in_features for one in listed):
            raise ValueError(
                f"salient_idx must hold different columns from 0 to {linear.in_features - 1}, got {listed}"
            )
        self.linear = linear
        self.register_buffer("salient_idx", salient_idx.to(torch.int32))
        self.register_buffer("salient_weight", salient_weight)
        self.train(linear.training)

    @property
    def in_features(self) -> int:
        """K."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.linear.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``[N]``, that of the packed part."""
        bias: torch.Tensor | None = self.linear.bias
        return bias

    @property
    def weight(self) -> torch.Tensor:
        """That of the packed part, which only a :class:`.TypedLinear` has."""
        weight: torch.Tensor = self.linear.weight
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of the packed part included."""
        own = (self.salient_idx, self.salient_weight)
        return self.linear.nbytes + sum(tensor.numel() * tensor.element_size() for tensor in own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` (float32, float16 or bfloat16) to ``[..., N]`` of the same dtype.

        Raises:
            Exception: as :class:`~littlebit2_kernels.LittleBitLinear`.
        """
        y: torch.Tensor = self.linear(x)  # checks x; of autocast's dtype where that is on
        columns = x.index_select(-1, self.salient_idx).to(y.dtype)
        return y + functional.linear(columns, self.salient_weight.to(y.dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense weight ``[N, K]`` that the layer stands for; a new tensor on every call."""
        wide = torch.promote_types(dtype, torch.float32)
        weight = self.linear.dequantize(wide)
        weight.index_add_(1, self.salient_idx, self.salient_weight.to(wide))
        return weight.to(dtype)

    def extra_repr(self) -> str:
        """Number of columns; the packed part says the sizes."""
        return f"salient={len(self.salient_idx)}"
