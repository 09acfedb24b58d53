"""``Int8Linear`` and ``Int8Embedding``: dense rows in int8 with a scale each, for heads and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .format import check_dim
from .ops import calls
from .ops.operands import ACTIVATION_DTYPES

__all__ = ["Int8Embedding", "Int8Linear", "dequantize_rows", "quantize_rows"]

#: Rows that are rounded at a time: a float32 copy of a head is as large as a packed model.
_ROWS = 1024
_LARGEST = 127


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to int8, each row by a scale of its own: its largest magnitude over 127.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.

    Returns:
        int8 ``[N, K]`` between -127 and 127, and float32 ``[N]``; ``int8 * scale`` differs from ``weight``
        by at most half a scale. A row of zeros has scale zero.

    Raises:
        TypeError: ``weight`` is not a floating-point matrix.
        ValueError: it holds values that are not finite.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        got = f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, torch.Tensor) else weight
        raise TypeError(f"weight must be a floating-point matrix, got {got}")
    weight = weight.detach()
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        rows = weight[first : first + _ROWS].float()
        s = rows.abs().amax(1) / _LARGEST
        if not bool(torch.isfinite(s).all()):
            row = first + int(torch.nonzero(~torch.isfinite(s))[0])
            raise ValueError(f"weight must be finite, got a value in row {row} that is not")
        # A subnormal scale has no precise reciprocal: such a row counts as zeros.
        s = torch.where(s < torch.finfo(torch.float32).tiny, 0.0, s)
        scale[first : first + _ROWS] = s
        rounded[first : first + _ROWS] = (rows / torch.where(s == 0, 1.0, s)[:, None]).round()
    return rounded, scale


def dequantize_rows(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return ``int8 * scale`` ``[N, K]`` in ``dtype``."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        out[rows] = weight[rows].float() * scale[rows, None]
    return out


class _Int8Rows(nn.Module):
    """Int8 rows and their scales, which stay float32 under ``.half()`` and ``.to(dtype)``."""

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, rows: int, columns: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.register_buffer("weight_int8", torch.zeros(rows, columns, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float32, device=device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense matrix in ``dtype``."""
        return dequantize_rows(self.weight_int8, self.weight_scale, dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)

    def _set_rows(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise TypeError(f"weight must be int8 [N, K], got {weight.dtype} of shape {list(weight.shape)}")
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise TypeError(
                f"scale must be float32 [{weight.shape[0]}], got {scale.dtype} of shape {list(scale.shape)}"
            )
        self.weight_int8, self.weight_scale = weight, scale


class Int8Linear(_Int8Rows):
    """A linear layer ``y = scale * (x @ weight.T) + bias`` on int8 rows; ``x`` and bias have gradients.

    For heads, whose rows are too many for a factorization to pay and half of whose bytes this saves. There is
    no ``weight`` attribute: see :meth:`dequantize`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias, float32 ``[N]``.
        device: where the (all-zero) buffers are made.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        check_dim("in_features", in_features)
        check_dim("out_features", out_features)
        super().__init__(out_features, in_features, device)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_rows(
        cls, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Int8Linear:
        """Make a layer of int8 ``[N, K]``, float32 ``[N]`` and a bias, without a copy of the first two."""
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer._set_rows(weight, scale)
        if bias is not None:
            layer.bias = bias.detach().float()
        return layer

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight_int8.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight_int8.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]`` in its dtype, or autocast's where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype not in ACTIVATION_DTYPES:
            raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x.size(-1) must equal K={self.in_features}, got shape {list(x.shape)}")
        return calls.int8_linear(x, self.weight_int8, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Int8Rows):
    """An embedding on int8 rows: ``scale[i] * weight[i]`` for every id, in the dtype that it was made for.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: as in ``nn.Embedding``; kept for code that reads it.
        dtype: of the results; follows ``.half()`` and ``.to(dtype)``.
        device: where the (all-zero) buffers are made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_dim("num_embeddings", num_embeddings)
        check_dim("embedding_dim", embedding_dim)
        super().__init__(num_embeddings, embedding_dim, device)
        self.padding_idx = padding_idx
        self.dtype = dtype

    @classmethod
    def from_rows(
        cls,
        weight: torch.Tensor,
        scale: torch.Tensor,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Int8Embedding:
        """Make an embedding of int8 ``[rows, columns]`` and float32 ``[rows]``, without a copy."""
        layer = cls(weight.shape[0], weight.shape[1], padding_idx, dtype=dtype, device="meta")
        layer._set_rows(weight, scale)
        return layer

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.weight_int8.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Number of columns."""
        return self.weight_int8.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ``ids`` ``[...]`` to ``[..., embedding_dim]``."""
        rows = torch.nn.functional.embedding(ids, self.weight_int8)
        scale = torch.nn.functional.embedding(ids, self.weight_scale[:, None])
        return (rows * scale).to(self.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
