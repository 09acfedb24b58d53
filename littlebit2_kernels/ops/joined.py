"""``littlebit2::joined_linear`` and ``joined_linear_prepacked``: fakes, and gradients of x.

They compute what the grouped operators do, side by side in one ``[..., sum N_i]``.
"""

from __future__ import annotations

from typing import Any

import torch

from .grouped import (
    grouped_backward,
    grouped_fake,
    grouped_setup,
    prepacked_backward,
    prepacked_fake,
    prepacked_setup,
)

__all__ = ["joined_backward", "joined_fake", "joined_setup", "register"]


def register() -> None:
    """Register fakes and gradients of the operators, which must be loaded."""
    torch.library.register_fake("littlebit2::joined_linear", joined_fake)
    torch.library.register_autograd("littlebit2::joined_linear", joined_backward, setup_context=joined_setup)
    torch.library.register_fake("littlebit2::joined_linear_prepacked", _prepacked_fake)
    torch.library.register_autograd(
        "littlebit2::joined_linear_prepacked", _prepacked_backward, setup_context=_prepacked_setup
    )


def joined_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Shape of ``littlebit2::joined_linear``."""
    return _joined(x, grouped_fake(x, *arguments))


def joined_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save what the gradient needs; the arguments begin as those of ``joined_linear``."""
    grouped_setup(ctx, inputs, [output])
    out_scale, paths = inputs[5], inputs[7]
    ctx.sizes = [out_scale[sum(paths[:i])].shape[-1] for i in range(len(paths))]


def joined_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradient of x, and none for the rest."""
    return grouped_backward(ctx, list(grad.split(ctx.sizes, dim=-1)))


def _prepacked_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _joined(x, prepacked_fake(x, *arguments))


def _prepacked_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    prepacked_setup(ctx, inputs, [output])
    ctx.sizes = list(inputs[3])


def _prepacked_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return prepacked_backward(ctx, list(grad.split(ctx.sizes, dim=-1)))


def _joined(x: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], sum(part.shape[-1] for part in parts)))
