"""``littlebit2::rotary``, the rotation of queries and keys on the CPU: its fake, and gradients."""

from __future__ import annotations

from typing import Any

import torch

from .heads import check_angles, check_heads

__all__ = ["register", "rotary_by_torch"]


def register() -> None:
    """Register the fake and the gradients of the operator, which must be loaded."""
    torch.library.register_fake("littlebit2::rotary", _fake)
    torch.library.register_autograd("littlebit2::rotary", _backward, setup_context=_setup)


def rotary_by_torch(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same by torch's operations, in float32.

    Args: those of the operator (:func:`littlebit2_kernels.rotary` describes them).

    Returns:
        ``[B, M, H, D]`` and ``[B, M, G, D]``.
    """
    return _turned(query, cos, sin, interleaved), _turned(key, cos, sin, interleaved)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    size = cos.shape[-1]
    rows = x.transpose(1, 2).float()  # [B, M, H, D]
    cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    turning = rows[..., :size]
    if interleaved:
        partner = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-turning[..., size // 2 :], turning[..., : size // 2]), -1)
    turned = turning * cos + partner * sin
    return torch.cat((turned, rows[..., size:]), -1).to(x.dtype)


def _fake(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    check_heads(query=query, key=key)
    check_angles(cos, sin)
    queries, keys = (
        query.new_empty((one.shape[0], one.shape[2], one.shape[1], one.shape[3])) for one in (query, key)
    )
    return queries, keys


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.interleaved = inputs[4] if len(inputs) > 4 else False
    ctx.count = len(inputs)


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    wanted = [index for index in range(4) if ctx.needs_input_grad[index]]
    query, key, cos, sin = (
        tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(ctx.saved_tensors)
    )
    inputs = (query, key, cos, sin)
    with torch.enable_grad():
        pairs = [
            (one, grad)
            for one, grad in zip(rotary_by_torch(query, key, cos, sin, ctx.interleaved), grads, strict=True)
            if one.requires_grad
        ]
    found = torch.autograd.grad(
        [one for one, _ in pairs], [inputs[i] for i in wanted], [grad for _, grad in pairs], allow_unused=True
    )
    given = dict(zip(wanted, found, strict=True))
    return tuple(given.get(index) for index in range(ctx.count))
