"""The operators: loading, fakes, gradients of x, and calls that spare what a call does not need.

The schemas live in ``csrc/torch/library.cpp``. Everything here is traceable by ``torch.compile``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from ._native import load_cuda_ops, load_ops
from .dispatch import ACTIVATION_DTYPES

__all__ = ["Operand", "Operands", "linear_from_operands", "linear_from_prepacked", "load"]

#: Tensors of one operand, one per path.
Operand = list[torch.Tensor]
#: ``(v, u, in_scale, latent_scale, out_scale)``; a single-stage layer has no ``u`` and ``latent_scale``.
Operands = tuple[Operand, Operand | None, Operand, Operand | None, Operand]

_lock = threading.Lock()
_registered = False


def load(device_type: str = "cpu") -> None:
    """Define ``torch.ops.littlebit2.*`` in this process: load the library, register fakes and autograd.

    Called on first use by everything in this package; call it yourself before running an exported
    or AOTInductor-compiled program that uses the operators. Later calls do nothing.

    Args:
        device_type: ``"cuda"`` loads the kernels for CUDA tensors too.

    Raises:
        NativeLibraryError: a compiled library is missing or cannot be loaded.
    """
    global _registered
    if not _registered:
        with _lock:
            if not _registered:
                load_ops()
                _register()
                _registered = True
    if device_type == "cuda":
        load_cuda_ops()


def _register() -> None:
    operators: tuple[tuple[str, Any, Any, Any], ...] = (
        ("linear", linear_fake, linear_setup, _linear_backward),
        ("linear_backward_x", linear_backward_x_fake, linear_setup, _linear_backward_x_backward),
        ("linear_prepacked", _prepacked_fake, _prepacked_setup, _prepacked_backward),
        (
            "linear_prepacked_backward_x",
            _prepacked_backward_x_fake,
            _prepacked_setup,
            _prepacked_backward_x_backward,
        ),
    )
    for name, fake, setup, backward in operators:
        torch.library.register_fake(f"littlebit2::{name}", fake)
        torch.library.register_autograd(f"littlebit2::{name}", backward, setup_context=setup)
    from . import blas, grouped_ops  # noqa: PLC0415  # import this module

    blas.register()
    grouped_ops.register()


def _load_while_tracing() -> bool:
    load()
    return True


def _load_cuda_while_tracing() -> bool:
    load("cuda")
    return True


# Run at trace time, leave nothing in the graph. This is what torch.compiler.assume_constant_result marks a
# function with; calling that would import the compiler (a second) together with this package.
_load_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_load_cuda_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_for(x: torch.Tensor) -> None:
    """:func:`load` what the device of ``x`` needs, also while tracing."""
    if not torch.compiler.is_compiling():
        load("cuda" if x.is_cuda else "cpu")
    elif x.is_cuda:
        _load_cuda_while_tracing()
    else:
        _load_while_tracing()


def linear_from_operands(
    x: torch.Tensor, operands: Operands, bias: torch.Tensor | None, activation: int = 0
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        operands: the lists of :data:`Operands`.
        bias: float32 ``[N]`` or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS` that the device serves.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    load_for(x)
    if torch.compiler.is_compiling():
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            # The layer is linear in x, and torch knows no forward derivative of registered operators.
            # Derivatives are those of exact sums.
            y = linear_from_operands(primal, operands, bias, activation)
            return forward_ad.make_dual(y, linear_from_operands(tangent, operands, None, 1))
    if torch.is_grad_enabled() and any(t.requires_grad for t in flatten((x, *operands, bias))):
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)
    # Nothing to differentiate: step over the Python autograd kernel, which costs more than the dispatch.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear(x, *operands, bias, activation)


def linear_from_prepacked(
    x: torch.Tensor, layer: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear_prepacked``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        layer: uint8 ``[bytes]`` of a :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None``.
        out_features: N.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        _load_while_tracing()
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)
    if not _registered:
        load()
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            y = linear_from_prepacked(primal, layer, bias, out_features, activation)
            # Derivatives are those of exact sums.
            return forward_ad.make_dual(y, linear_from_prepacked(tangent, layer, None, out_features, 1))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear_prepacked(x, layer, bias, out_features, activation)


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
    check_fake("grad", grad, out_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), None)
    return grad.new_empty((*grad.shape[:-1], in_scale[0].shape[-1]))


def refuse_gradients_of_scales(operands: tuple[Any, ...]) -> None:
    """Raise ``RuntimeError`` if a scale requires a gradient."""
    for name, tensors in zip(("in_scale", "latent_scale", "out_scale"), operands[2:], strict=True):
        for index, tensor in enumerate(tensors or ()):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{name}[{index}] requires a gradient, but packed layers are frozen: "
                    "they are differentiable in x and bias only"
                )


def linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
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
