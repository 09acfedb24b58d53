"""``littlebit2::grouped_linear`` and ``grouped_linear_prepacked``: fakes, and gradients of x.

One call computes ``[..., N_i]`` for each of several layers that share x. On CUDA the layers share their
launches, which take most of the time of a decoding step with a small batch. On the CPU they run one after
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .operands import (
    check_fake,
    check_fake_x,
    flatten,
    no_gradients,
    refuse_gradients_of_scales,
    saved_operands,
)

__all__ = [
    "grouped_backward",
    "grouped_fake",
    "grouped_setup",
    "prepacked_backward",
    "prepacked_fake",
    "prepacked_setup",
    "register",
]


def register() -> None:
    """Register fakes and gradients of the operators, which must be loaded."""
    torch.library.register_fake("littlebit2::grouped_linear", grouped_fake)
    torch.library.register_autograd(
        "littlebit2::grouped_linear", grouped_backward, setup_context=grouped_setup
    )
    torch.library.register_fake("littlebit2::grouped_linear_prepacked", prepacked_fake)
    torch.library.register_autograd(
        "littlebit2::grouped_linear_prepacked", prepacked_backward, setup_context=prepacked_setup
    )


def _refuse_gradients_of_biases(bias: Sequence[torch.Tensor | None]) -> None:
    # Lists with None in them have no gradients: torch takes them for one argument that is no tensor (and does
    # not get here if nothing else requires one).
    for index, one in enumerate(bias):
        if one is not None and one.requires_grad:
            raise RuntimeError(
                f"bias[{index}] requires a gradient, but the operators on several layers are "
                "differentiable in x only: call the layers one by one"
            )


def _no_bias_gradients(ctx: Any) -> list[None] | None:
    return [None] * len(ctx.biased) if all(ctx.biased) else None


def grouped_fake(
    x: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor] | None,
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor] | None,
    out_scale: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    paths: list[int],
    activation: int = 0,
) -> list[torch.Tensor]:
    """Shapes of ``littlebit2::grouped_linear``."""
    check_fake("x", x, in_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), None)
    if sum(paths) != len(v) or len(bias) != len(paths):
        raise RuntimeError(
            f"littlebit2: paths must add up to the {len(v)} tensors of v, with one bias or None each, got "
            f"{list(paths)} and {len(bias)}"
        )
    return [
        x.new_empty((*x.shape[:-1], out_scale[first].shape[-1]))
        for first in (sum(paths[:i]) for i in range(len(paths)))
    ]


def grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    """Save what :func:`grouped_backward` needs."""
    operands, bias, ctx.paths = inputs[1:6], inputs[6], inputs[7]
    refuse_gradients_of_scales(operands)
    _refuse_gradients_of_biases(bias)
    ctx.save_for_backward(*flatten(operands))
    ctx.lengths = [None if tensors is None else len(tensors) for tensors in operands]
    ctx.biased = [one is not None for one in bias]


def grouped_backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Gradient of x from those of the outputs, and none for the rest."""
    lists = saved_operands(ctx)
    grad_x = None
    if ctx.needs_input_grad[0]:
        first = 0
        for grad, count in zip(grads, ctx.paths, strict=True):
            part = slice(first, first + count)
            first += count
            if grad is not None:
                own = [None if tensors is None else tensors[part] for tensors in lists]
                grad_x = _added(grad_x, torch.ops.littlebit2.linear_backward_x(grad.contiguous(), *own))
    # The dispatcher drops an activation left at its default; other operators have more settings.
    count = len(ctx.needs_input_grad)
    return (grad_x, *no_gradients(ctx), _no_bias_gradients(ctx), *[None] * count)[:count]


def prepacked_fake(
    x: torch.Tensor,
    layers: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    out_features: list[int],
    activation: int = 0,
) -> list[torch.Tensor]:
    """Shapes of ``littlebit2::grouped_linear_prepacked``."""
    check_fake_x("x", x, layers)
    return [x.new_empty((*x.shape[:-1], size)) for size in out_features]


def prepacked_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    """Save what :func:`prepacked_backward` needs."""
    x, layers, bias = inputs[:3]
    _refuse_gradients_of_biases(bias)
    ctx.save_for_backward(*layers)
    ctx.in_features = x.shape[-1]
    ctx.biased = [one is not None for one in bias]


def prepacked_backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """Gradient of x from those of the outputs, and none for the rest."""
    grad_x = None
    if ctx.needs_input_grad[0]:
        for grad, layer in zip(grads, ctx.saved_tensors, strict=True):
            if grad is not None:
                part = torch.ops.littlebit2.linear_prepacked_backward_x(
                    grad.contiguous(), layer, ctx.in_features
                )
                grad_x = _added(grad_x, part)
    none = ([None] * len(ctx.saved_tensors), _no_bias_gradients(ctx), None, None)
    return (grad_x, *none)[: len(ctx.needs_input_grad)]


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total + part
