"""``littlebit2::linear`` and its gradient: fakes, and gradients of x and bias."""

from __future__ import annotations

from typing import Any

import torch

from .operands import Operand, bias_gradient, check_fake, no_gradients, save_operands, saved_operands

__all__ = ["linear_backward_x_fake", "linear_fake", "register"]


def register() -> None:
    """Register fakes and gradients of the operators, which must be loaded."""
    for name, fake, backward in (
        ("linear", linear_fake, _linear_backward),
        ("linear_backward_x", linear_backward_x_fake, _linear_backward_x_backward),
    ):
        torch.library.register_fake(f"littlebit2::{name}", fake)
        torch.library.register_autograd(f"littlebit2::{name}", backward, setup_context=save_operands)


def linear_fake(
    x: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
    bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor:
    """Shape of ``littlebit2::linear``."""
    check_fake("x", x, in_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), bias)
    return x.new_empty((*x.shape[:-1], out_scale[0].shape[-1]))


def linear_backward_x_fake(
    grad: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
) -> torch.Tensor:
    """Shape of ``littlebit2::linear_backward_x``."""
    check_fake("grad", grad, out_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), None)
    return grad.new_empty((*grad.shape[:-1], in_scale[0].shape[-1]))


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.littlebit2.linear_backward_x(grad, *saved_operands(ctx))
    grad_bias = None
    if len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6]:
        grad_bias = bias_gradient(ctx, grad)
    # The dispatcher drops a bias and an activation left at their defaults.
    return (grad_x, *no_gradients(ctx), grad_bias, None)[: len(ctx.needs_input_grad)]


def _linear_backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias, with exact sums as the gradient assumes.
    grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.littlebit2.linear(grad, *saved_operands(ctx), None, 1)
    return grad_grad, *no_gradients(ctx)
