"""``littlebit2::attention`` and ``attention_step``, few queries on the CPU: fakes, and gradients by torch."""

from __future__ import annotations

from typing import Any

import torch

from .heads import check_angles, check_heads

__all__ = ["attention_by_torch", "register"]


def register() -> None:
    """Register the fakes of both operators, which must be loaded, and the gradients of ``attention``."""
    torch.library.register_fake("littlebit2::attention", _fake)
    torch.library.register_fake("littlebit2::attention_step", _step_fake)
    torch.library.register_autograd("littlebit2::attention", _backward, setup_context=_setup)


def attention_by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """Compute the same by torch's operations on whole matrices of scores, in float32.

    Args: those of the operator (:func:`littlebit2_kernels.attention` describes them).

    Returns:
        ``[B, M, H, E]`` in the dtype of ``query``.
    """
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1:3]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * queries, size) * scale
    scores = (grouped @ key.float().transpose(2, 3)).reshape(batch, heads, queries, keys)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        last = torch.arange(queries, device=query.device)[:, None] + (keys - queries)
        at = torch.arange(keys, device=query.device)
        hidden = at > last
        if window:
            hidden = hidden | (at <= last - window)
        scores = scores.masked_fill(hidden, -torch.inf)
    # A row that sees nothing is zero, not NaN.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * queries, keys) @ value.float()
    return grouped.reshape(batch, heads, queries, -1).transpose(1, 2).to(query.dtype).contiguous()


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> torch.Tensor:
    check_heads(query=query, key=key, value=value)
    torch._check(
        key.shape[3] == query.shape[3] and key.shape[2] == value.shape[2] and key.shape[1] == value.shape[1],
        lambda: (
            f"littlebit2: key must have as many elements as query and as many rows as value, got shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        ),
    )
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _step_fake(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    check_heads(query=query, new_key=new_key, new_value=new_value, key=key, value=value)
    check_angles(cos, sin)
    torch._check(
        key.shape[1] == new_key.shape[1]
        and key.shape[3] == new_key.shape[3] == query.shape[3]
        and value.shape[1:3] == key.shape[1:3]
        and value.shape[3] == new_value.shape[3],
        lambda: (
            f"littlebit2: key and value must have the heads and elements of new_key and new_value, got "
            f"shapes {list(key.shape)} and {list(value.shape)} for {list(new_key.shape)} and "
            f"{list(new_value.shape)}"
        ),
    )
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, mask, *settings = inputs
    ctx.save_for_backward(query, key, value, mask)
    ctx.settings = (*settings, *(0.0, False, 0)[len(settings) - 1 :])
    ctx.count = len(inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    wanted = [index for index in range(4) if ctx.needs_input_grad[index]]
    inputs: list[Any] = [
        None if tensor is None else tensor.detach().requires_grad_(index in wanted)
        for index, tensor in enumerate(ctx.saved_tensors)
    ]
    with torch.enable_grad():
        output = attention_by_torch(*inputs, *ctx.settings)
    found = dict(zip(wanted, torch.autograd.grad(output, [inputs[i] for i in wanted], grad), strict=True))
    return tuple(found.get(index) for index in range(ctx.count))
