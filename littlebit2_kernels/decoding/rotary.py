"""Rotary position embedding of queries and keys on the CPU, in one call."""

from __future__ import annotations

import torch

from ..ops import calls

__all__ = ["rotary"]


def rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys by the angles of their positions.

    The first R elements of a row turn by pairs ``(a, b)``, which are ``(i, i + R / 2)``, or
    ``(2 i, 2 i + 1)`` if ``interleaved``: ``x[a] cos[a] - x[b] sin[a]`` and ``x[b] cos[b] + x[a] sin[b]``, in
    float32, rounded once. The others stay as they are.

    Args:
        query: ``[B, H, M, D]`` float32, float16 or bfloat16, on the CPU; D is at most 1024.
        key: ``[B, G, M, D]`` in the dtype of ``query``.
        cos: ``[B, M, R]`` or ``[1, M, R]``, of one of these dtypes; R is even and at most D.
        sin: likewise, in the dtype of ``cos``.
        interleaved: whether pairs are neighbors.

    Returns:
        ``[B, H, M, D]`` and ``[B, G, M, D]``; their transposes ``[B, M, ...]`` are contiguous.
        Differentiable, by torch's operations.

    Raises:
        RuntimeError: a tensor does not fit.
    """
    queries, keys = calls.rotary(query, key, cos, sin, interleaved)
    return queries.transpose(1, 2), keys.transpose(1, 2)
