"""``littlebit2::int8_linear``, dense int8 rows with a scale each: its fake, and gradients of x and bias."""

from __future__ import annotations

from typing import Any

import torch

from .operands import bias_gradient, check_fake_x

__all__ = ["dequantized_linear", "register"]

#: Rows that :func:`dequantized_linear` widens at a time.
_ROWS = 4096


def register() -> None:
    """Register the fake and the gradients of the operator, which must be loaded."""
    torch.library.register_fake("littlebit2::int8_linear", _fake)
    torch.library.register_autograd("littlebit2::int8_linear", _backward, setup_context=_setup)


def dequantized_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute the same by torch.matmul on widened rows, some thousand at a time.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Weights are rounded to that dtype, scales included.
    """
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        y[..., rows] = torch.nn.functional.linear(x, _widened(weight[rows], scale[rows], x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def _widened(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight.float() * scale[:, None]).to(dtype)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_fake_x("x", x, (weight, scale, bias))
    torch._check(
        x.shape[-1] == weight.shape[-1],
        lambda: f"littlebit2: x.size(-1) must equal {weight.shape[-1]}, got shape {list(x.shape)}",
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    weight, scale = inputs[1:3]
    if scale.requires_grad:
        raise RuntimeError("scale requires a gradient, but int8 layers are frozen: x and bias have gradients")
    ctx.save_for_backward(weight, scale)
    bias = inputs[3] if len(inputs) > 3 else None
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight, scale = ctx.saved_tensors
        grad_x = grad.new_zeros((*grad.shape[:-1], weight.shape[1]), dtype=torch.float32)
        for first in range(0, weight.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            grad_x += grad[..., rows].float() @ _widened(weight[rows], scale[rows], torch.float32)
        grad_x = grad_x.to(grad.dtype)
    if len(ctx.needs_input_grad) > 3 and ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(ctx, grad)
    return (grad_x, None, None, grad_bias)[: len(ctx.needs_input_grad)]
