"""Fakes of the operators with norm and residual: packed (``fused_linear``, ``mlp``, on CUDA) and prepacked.

``fused_linear_prepacked`` and ``mlp_prepacked`` are the CPU's. None is differentiable.

Where a gradient is needed, :func:`littlebit2_kernels.grouped_linear` and :func:`littlebit2_kernels.mlp` are
composed of operators that have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .grouped import grouped_fake
from .operands import check_fake_x, flatten

__all__ = ["register"]


def register() -> None:
    """Register fakes, and the refusal of gradients, of the operators, which must be loaded."""
    fakes: dict[str, Callable[..., Any]] = {
        "fused_linear": _packed_linear_fake,
        "mlp": _packed_mlp_fake,
        "fused_linear_prepacked": _linear_fake,
        "mlp_prepacked": _mlp_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"littlebit2::{name}", fake)
        torch.library.register_autograd(f"littlebit2::{name}", _no_backward, setup_context=_refusal(name))


def _packed_linear_fake(
    x: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor] | None,
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor] | None,
    out_scale: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    paths: list[int],
    norm: torch.Tensor | None,
    eps: float,
    offset: float,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> list[torch.Tensor]:
    check_fake_x("x", x, (norm, residual))
    return grouped_fake(x, v, u, in_scale, latent_scale, out_scale, bias, paths, activation)


def _packed_mlp_fake(
    x: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor] | None,
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor] | None,
    out_scale: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    paths: list[int],
    function: int,
    norm: torch.Tensor | None,
    eps: float,
    offset: float,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> torch.Tensor:
    check_fake_x("x", x, (norm, residual))
    # The shape of the last layer; those before it have another input.
    return grouped_fake(x, v, u, in_scale, latent_scale, out_scale, bias, paths, activation)[-1]


def _linear_fake(
    x: torch.Tensor,
    layers: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    out_features: list[int],
    norm: torch.Tensor | None,
    eps: float,
    offset: float,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> list[torch.Tensor]:
    check_fake_x("x", x, (layers, norm, residual))
    return [x.new_empty((*x.shape[:-1], size)) for size in out_features]


def _mlp_fake(
    x: torch.Tensor,
    layers: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    out_features: int,
    function: int,
    norm: torch.Tensor | None,
    eps: float,
    offset: float,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> torch.Tensor:
    check_fake_x("x", x, (layers, norm, residual))
    return x.new_empty((*x.shape[:-1], out_features))


def _refusal(name: str) -> Callable[..., None]:
    def refuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [one for one in inputs if one is None or isinstance(one, (torch.Tensor, list))]
        flat = [one for one in flatten(tensors) if isinstance(one, torch.Tensor)]
        if any(tensor.requires_grad for tensor in flat):
            raise RuntimeError(
                f"littlebit2::{name} is not differentiable, but an argument requires a gradient: call "
                "littlebit2_kernels.grouped_linear or littlebit2_kernels.mlp, which are"
            )

    return refuse


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("this operator of littlebit2 is not differentiable")
