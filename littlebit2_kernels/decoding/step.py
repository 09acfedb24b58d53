"""Rotation, cache and attention of a decoding step on the CPU, in one call."""

from __future__ import annotations

import torch

from ..ops import calls
from .attention import attention_settings

__all__ = ["attention_step"]


def attention_step(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    position: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Turn queries and keys, put keys and values into a cache, and attend to what it holds.

    The result has the bits of :func:`littlebit2_kernels.rotary`, two copies and
    :func:`littlebit2_kernels.attention`. The tensors must not overlap.

    Args:
        query: ``[B, H, M, D]`` float32, float16 or bfloat16, on the CPU; D is at most 1024.
        new_key: ``[B, G, M, D]`` in the dtype of ``query``; G divides H.
        new_value: ``[B, G, M, E]``.
        cos: ``[B, M, R]`` or ``[1, M, R]``, of one of these dtypes; R is even and at most D.
        sin: likewise, in the dtype of ``cos``.
        key: ``[B, G, T, D]``, the cache: M rows of it are written. May be a view of a larger buffer.
        value: ``[B, G, T, E]``, likewise.
        position: one int64 on the CPU, where the new rows begin; by default ``T - M``.
        mask: as of :func:`littlebit2_kernels.attention`, ``[B, H, M, T]`` or 1 in place of B, H or M.
        scale: factor of the products; by default ``D ** -0.5``.
        softcap: as of :func:`littlebit2_kernels.attention`.
        causal: query m sees the keys up to ``position + m``.
        window: how many keys a causal query sees at most, its own included.
        interleaved: as of :func:`littlebit2_kernels.rotary`.

    Returns:
        ``[B, H, M, E]`` in the dtype of ``query``; its transpose ``[B, M, H, E]`` is contiguous. Not
        differentiable.

    Raises:
        ValueError: ``softcap`` or ``window`` is not positive, there is a ``window`` without ``causal``, or D
            is 0.
        RuntimeError: a tensor does not fit, or needs a gradient.
    """
    scale, cap, most = attention_settings(query, scale, softcap, causal, window)
    return calls.attention_step(
        query, new_key, new_value, cos, sin, key, value, position, mask, scale, cap, causal, most, interleaved
    ).transpose(1, 2)
