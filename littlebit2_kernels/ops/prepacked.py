"""``littlebit2::linear_prepacked`` and its gradient: fakes, and gradients of x and bias."""

from __future__ import annotations

from typing import Any

import torch

from .operands import bias_gradient, check_fake_x

__all__ = ["register"]


def register() -> None:
    """Register fakes and gradients of the operators, which must be loaded."""
    for name, fake, backward in (
        ("linear_prepacked", _prepacked_fake, _prepacked_backward),
        ("linear_prepacked_backward_x", _prepacked_backward_x_fake, _prepacked_backward_x_backward),
    ):
        torch.library.register_fake(f"littlebit2::{name}", fake)
        torch.library.register_autograd(f"littlebit2::{name}", backward, setup_context=_prepacked_setup)


def _prepacked_fake(
    x: torch.Tensor,
    layer: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: int = 0,
) -> torch.Tensor:
    check_fake_x("x", x, (layer, bias))
    return x.new_empty((*x.shape[:-1], out_features))


def _prepacked_backward_x_fake(grad: torch.Tensor, layer: torch.Tensor, in_features: int) -> torch.Tensor:
    check_fake_x("grad", grad, (layer,))
    return grad.new_empty((*grad.shape[:-1], in_features))


def _prepacked_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, layer = inputs[:2]
    ctx.save_for_backward(layer)
    ctx.in_features, ctx.out_features = x.shape[-1], output.shape[-1]
    bias = inputs[2] if len(inputs) > 3 else None  # the backward operator has none
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _prepacked_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        (layer,) = ctx.saved_tensors
        grad_x = torch.ops.littlebit2.linear_prepacked_backward_x(grad, layer, ctx.in_features)
    if ctx.needs_input_grad[2]:
        grad_bias = bias_gradient(ctx, grad)
    # The dispatcher drops an activation left at its default.
    return (grad_x, None, grad_bias, None, None)[: len(ctx.needs_input_grad)]


def _prepacked_backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose, with exact sums as the gradient assumes.
    grad_grad = None
    if ctx.needs_input_grad[0]:
        (layer,) = ctx.saved_tensors
        grad_grad = torch.ops.littlebit2.linear_prepacked(grad, layer, None, ctx.in_features, 1)
    return grad_grad, None, None
