"""What every operator needs: types of operands, checks of fake calls, and saving for the backward call."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

__all__ = [
    "ACTIVATION_DTYPES",
    "Operand",
    "Operands",
    "bias_gradient",
    "check_fake",
    "check_fake_x",
    "flatten",
    "no_gradients",
    "refuse_gradients_of_scales",
    "save_operands",
    "saved_operands",
]

#: Dtypes of x that every backend takes.
ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Tensors of one operand, one per path.
Operand = list[torch.Tensor]
#: ``(v, u, in_scale, latent_scale, out_scale)``; a single-stage layer has no ``u`` and ``latent_scale``.
Operands = tuple[Operand, Operand | None, Operand, Operand | None, Operand]


def flatten(arguments: Iterable[torch.Tensor | Operand | None]) -> Iterator[torch.Tensor]:
    """Yield the tensors of arguments that are tensors, lists of them or ``None``."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif argument is not None:
            yield from argument


def check_fake_x(name: str, x: torch.Tensor, layer: Iterable[torch.Tensor | Operand | None]) -> None:
    """Raise ``RuntimeError`` unless a fake call has one device and a supported dtype."""
    # One operand on the meta device is enough to get here with the others elsewhere.
    for tensor in flatten(layer):
        if tensor.device != x.device:
            raise RuntimeError(
                f"littlebit2: {name} and the layer must be on one device, got {x.device} and {tensor.device}"
            )
    if x.dtype not in ACTIVATION_DTYPES:
        raise RuntimeError(f"littlebit2: {name} must be float32, float16 or bfloat16, got {x.dtype}")


def check_fake(name: str, x: torch.Tensor, cols: int, operands: Operands, bias: torch.Tensor | None) -> None:
    """The same, and the lists and last dimension agree."""
    check_fake_x(name, x, (*operands, bias))
    v, u, in_scale, latent_scale, out_scale = operands
    for list_name, tensors in (
        ("u", u),
        ("in_scale", in_scale),
        ("latent_scale", latent_scale),
        ("out_scale", out_scale),
    ):
        if tensors is not None and len(tensors) != len(v):
            raise RuntimeError(
                f"littlebit2: {list_name} must hold one tensor per path ({len(v)}), got {len(tensors)}"
            )
    torch._check(
        x.shape[-1] == cols,
        lambda: f"littlebit2: {name}.size(-1) must equal {cols}, got shape {list(x.shape)}",
    )


def refuse_gradients_of_scales(operands: tuple[Any, ...]) -> None:
    """Raise ``RuntimeError`` if a scale requires a gradient."""
    for name, tensors in zip(("in_scale", "latent_scale", "out_scale"), operands[2:], strict=True):
        for index, tensor in enumerate(tensors or ()):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{name}[{index}] requires a gradient, but packed layers are frozen: "
                    "they are differentiable in x and bias only"
                )


def save_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save what the backward call needs; the ``setup_context`` of operators on packed layers."""
    # Inputs of both operators start with x or grad and the five operands; the forward has more.
    operands = inputs[1:6]
    refuse_gradients_of_scales(operands)
    # Saved, not kept: autograd then notices when they are changed in place before the backward call.
    ctx.save_for_backward(*flatten(operands))
    ctx.lengths = [None if tensors is None else len(tensors) for tensors in operands]
    bias = inputs[6] if len(inputs) > 6 else None
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def saved_operands(ctx: Any) -> list[Operand | None]:
    """Return the operands that a set-up saved, list by list."""
    saved = iter(ctx.saved_tensors)
    return [None if length is None else list(itertools.islice(saved, length)) for length in ctx.lengths]


def no_gradients(ctx: Any) -> list[list[None] | None]:
    """Return what stands for the gradients of the operands."""
    # Autograd wants a gradient, here none, for every element of every list.
    return [None if length is None else [None] * length for length in ctx.lengths]


def bias_gradient(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of a bias whose shape and dtype a set-up kept as ``bias_like``."""
    shape, dtype = ctx.bias_like
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype).reshape(shape)
