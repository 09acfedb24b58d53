"""``Int8Linear`` and ``Int8Embedding``: dense rows in int8 with a scale each, for heads and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..format import check_dim
from ..ops import calls
from ..ops.operands import ACTIVATION_DTYPES
from .rounding import dequantize_rows

__all__ = ["Int8Embedding", "Int8Linear", "int8_rows_linear"]


def _keep_dtypes(fn: Callable[[torch.Tensor], torch.Tensor], names: frozenset[int]) -> Any:
    """Let a change of a module keep the dtype of some tensors, by id, and follow it to another device."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        if id(tensor) not in names or result.dtype == tensor.dtype:
            return result
        return tensor.to(result.device)

    return changed


class _Int8Rows(nn.Module):
    """Int8 rows and their scales, which stay float32 under ``.half()`` and ``.to(dtype)``."""

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense matrix in ``dtype``."""
        return dequantize_rows(self.weight_int8, self.weight_scale, dtype)

    def _make_rows(self, rows: int, columns: int, device: torch.device | str | None) -> None:
        self.register_buffer("weight_int8", torch.zeros(rows, columns, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros(rows, dtype=torch.float32, device=device))

    def _set_rows(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        if weight.dtype != torch.int8 or weight.dim() != 2:
            raise TypeError(f"weight must be int8 [N, K], got {weight.dtype} of shape {list(weight.shape)}")
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise TypeError(
                f"scale must be float32 [{weight.shape[0]}], got {scale.dtype} of shape {list(scale.shape)}"
            )
        self.register_buffer("weight_int8", weight)
        self.register_buffer("weight_scale", scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        fixed = [
            self._buffers[name] for name in ("weight_int8", "weight_scale", "bias") if name in self._buffers
        ]
        return super()._apply(_keep_dtypes(fn, frozenset(map(id, fixed))), recurse)


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
        super().__init__()
        self._make_rows(out_features, in_features, device)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if bias else None)

    @classmethod
    def from_rows(
        cls, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Int8Linear:
        """Make a layer of int8 ``[N, K]``, float32 ``[N]`` and a bias, without a copy of the first two."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_rows(weight, scale)
        layer.register_buffer("bias", None if bias is None else bias.detach().float())
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
        return int8_rows_linear(x, self.weight_int8, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def int8_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``scale * (x @ weight.T) + bias``, under autocast in its dtype.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``.
        bias: float32 ``[N]`` or ``None``.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: its last dimension is not K.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x.size(-1) must equal K={weight.shape[1]}, got shape {list(x.shape)}")
    # A bias that belongs to the model follows its dtype.
    return calls.int8_linear(x, weight, scale, None if bias is None else bias.float())


class Int8Embedding(_Int8Rows, nn.Embedding):
    """An embedding on int8 rows: ``scale[i] * weight[i]`` for every id, in the dtype that it was made for.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        padding_idx: as in ``nn.Embedding``; kept for code that reads it.
        dtype: dtype of the results; follows ``.half()`` and ``.to(dtype)``.
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
        nn.Module.__init__(self)
        self._make_rows(num_embeddings, embedding_dim, device)
        self._describe(padding_idx, dtype)

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
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_rows(weight, scale)
        layer._describe(padding_idx, dtype)
        return layer

    def _describe(self, padding_idx: int | None, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim = self.weight_int8.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.dtype = dtype

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Has the dense shape and dtype, for code that asks for these, and no values: it is on meta."""
        weight = torch.empty(self.weight_int8.shape, dtype=self.dtype, device="meta")
        # What transformers' initializers leave alone.
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

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
