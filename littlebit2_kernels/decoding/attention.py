"""Attention of few queries on the CPU: keys and values are read once, in their dtype."""

from __future__ import annotations

import torch

from ..ops import calls

__all__ = ["attention", "attention_settings"]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Attend to keys and values with few queries, as a step of decoding does.

    Sums and the softmax are in float32. The H / G heads that share a key are computed together, and so are
    up to 8 queries, so that keys and values are read once. They may be views of a larger buffer. More
    queries work; matrix products are faster for them. A query that sees no key gets zeros, as from
    ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``[B, H, M, D]`` float32, float16 or bfloat16, on the CPU.
        key: ``[B, G, T, D]`` in the dtype of ``query``; G divides H.
        value: ``[B, G, T, E]``.
        mask: bool, of which false hides a key, or a tensor of the above dtypes that is added to the scores;
            ``[B, H, M, T]``, or 1 in place of B, H or M.
        scale: factor of the products; by default ``D ** -0.5``.
        softcap: positive; scores s become ``softcap * tanh(s / softcap)`` before the mask is added.
        causal: query m sees the keys up to ``m + T - M``: the last query sees all.
        window: how many keys a causal query sees at most, its own included.

    Returns:
        ``[B, H, M, E]`` in the dtype of ``query``; its transpose ``[B, M, H, E]`` is contiguous.
        Differentiable in all tensors, by torch's operations.

    Raises:
        ValueError: ``softcap`` or ``window`` is not positive, there is a ``window`` without ``causal``, or D
            is 0.
        RuntimeError: a tensor does not fit.
    """
    scale, cap, most = attention_settings(query, scale, softcap, causal, window)
    return calls.attention(query, key, value, mask, scale, cap, causal, most).transpose(1, 2)


def attention_settings(
    query: torch.Tensor, scale: float | None, softcap: float | None, causal: bool, window: int | None
) -> tuple[float, float, int]:
    """Return ``scale``, ``softcap`` and ``window`` as the operators take them: 0 stands for none.

    Raises:
        ValueError: as :func:`attention`.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be at least 1, in a causal call, got {window} and causal={causal}")
    if scale is None:
        if query.dim() == 0 or query.shape[-1] == 0:
            raise ValueError(f"query must have elements in its last dimension, got {list(query.shape)}")
        scale = query.shape[-1] ** -0.5
    return scale, softcap or 0.0, window or 0
