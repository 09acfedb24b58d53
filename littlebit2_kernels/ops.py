"""The operators: loading, fakes, the gradient of x, and :func:`littlebit_linear`.

The schemas live in ``csrc/torch/library.cpp``. Everything here is traceable by ``torch.compile``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from ._native import load_ops
from .dispatch import ACTIVATION_DTYPES, check_activation, choose_backend
from .format import PackedLinear
from .reference import linear_reference

__all__ = ["Operand", "Operands", "linear_from_operands", "littlebit_linear", "load"]

#: Tensors of one operand, one per path.
Operand = list[torch.Tensor]
#: ``(v, u, in_scale, latent_scale, out_scale)``; a single-stage layer has no ``u`` and ``latent_scale``.
Operands = tuple[Operand, Operand | None, Operand, Operand | None, Operand]

_lock = threading.Lock()
_registered = False


def load() -> None:
    """Define ``torch.ops.littlebit2.*`` in this process: load the library, register fakes and autograd.

    Called on first use by everything in this package; call it yourself before running an exported
    or AOTInductor-compiled program that uses the operators. Later calls do nothing.

    Raises:
        NativeLibraryError: the compiled library is missing or cannot be loaded.
    """
    global _registered
    if _registered:
        return
    with _lock:
        if not _registered:
            load_ops()
            _register()
            _registered = True


def _register() -> None:
    for name, fake, backward in (
        ("littlebit2::linear", _linear_fake, _linear_backward),
        ("littlebit2::linear_backward_x", _linear_backward_x_fake, _linear_backward_x_backward),
    ):
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=_linear_setup)


def _load_while_tracing() -> bool:
    load()
    return True


# Run at trace time, leave nothing in the graph. This is what torch.compiler.assume_constant_result marks a
# function with; calling that would import the compiler (a second) together with this package.
_load_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def littlebit_linear(x: torch.Tensor, packed: PackedLinear, backend: str = "auto") -> torch.Tensor:
    """Apply a packed layer to ``x``.

    ``y = sum_p out_scale * (sign(U) @ (latent_scale * (sign(V) @ (in_scale * x)))) + bias``, the forward of
    LittleBit (arXiv 2506.13771) with its residual paths, on packed signs. Differentiable
    in ``x`` and ``bias``; the packed weights and the scales are frozen.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16; any strides, any number of tokens (also none).
        packed: the layer, on the device of ``x``.
        backend: ``"auto"``, ``"cpu"``, ``"reference"`` (plain PyTorch in float32), or another name of
            :data:`littlebit2_kernels.dispatch.BACKENDS`. A backend asked for by name that cannot run raises.

    Returns:
        ``[..., N]`` in the dtype of ``x``; accumulation is in float32.

    Raises:
        TypeError: ``x`` is not a tensor of a supported dtype, or ``packed`` not a :class:`PackedLinear`.
        ValueError: the last dimension of ``x`` is not K, devices differ, or ``backend`` is unknown.
        BackendUnavailableError: the backend cannot run here.
        NativeLibraryError: the compiled library is missing.
    """
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
    check_activation(x, packed.in_features, packed.device)
    if choose_backend(backend, x.device.type) == "reference":
        return linear_reference(x, packed, torch.float32).to(x.dtype)
    return linear_from_operands(x, packed.operands, packed.bias)


def linear_from_operands(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear``; the operator checks its arguments itself.

    Args:
        x: ``[..., K]``.
        operands: the lists of :data:`Operands`.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():
        _load_while_tracing()
        return torch.ops.littlebit2.linear(x, *operands, bias)
    load()
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            # The layer is linear in x, and torch knows no forward derivative of registered operators.
            y = linear_from_operands(primal, operands, bias)
            return forward_ad.make_dual(y, linear_from_operands(tangent, operands, None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in _flatten((x, *operands, bias))):
        return torch.ops.littlebit2.linear(x, *operands, bias)
    # Nothing to differentiate: step over the Python autograd kernel, which costs more than the dispatch.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear(x, *operands, bias)


def _flatten(arguments: Iterable[torch.Tensor | Operand | None]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif argument is not None:
            yield from argument


def _check_fake(name: str, x: torch.Tensor, cols: int, operands: Operands, bias: torch.Tensor | None) -> None:
    # One operand on the meta device is enough to get here with the others elsewhere.
    for tensor in _flatten((*operands, bias)):
        if tensor.device != x.device:
            raise RuntimeError(
                f"littlebit2: {name} and the layer must be on one device, got {x.device} and {tensor.device}"
            )
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
    if x.dtype not in ACTIVATION_DTYPES:
        raise RuntimeError(f"littlebit2: {name} must be float32, float16 or bfloat16, got {x.dtype}")
    torch._check(
        x.shape[-1] == cols,
        lambda: f"littlebit2: {name}.size(-1) must equal {cols}, got shape {list(x.shape)}",
    )


def _linear_fake(
    x: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_fake("x", x, in_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), bias)
    return x.new_empty((*x.shape[:-1], out_scale[0].shape[-1]))


def _linear_backward_x_fake(
    grad: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
) -> torch.Tensor:
    _check_fake("grad", grad, out_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), None)
    return grad.new_empty((*grad.shape[:-1], in_scale[0].shape[-1]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    # Inputs of both operators start with the activation and the five operands; the forward has bias too.
    operands = inputs[1:6]
    for name, tensors in zip(("in_scale", "latent_scale", "out_scale"), operands[2:], strict=True):
        for index, tensor in enumerate(tensors or ()):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{name}[{index}] requires a gradient, but packed layers are frozen: "
                    "littlebit2::linear is differentiable in x and bias only"
                )
    # Saved, not kept: autograd then notices when they are changed in place before the backward call.
    ctx.save_for_backward(*_flatten(operands))
    ctx.lengths = [None if tensors is None else len(tensors) for tensors in operands]
    bias = inputs[6] if len(inputs) > 6 else None
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _saved_operands(ctx: Any) -> list[Operand | None]:
    saved = iter(ctx.saved_tensors)
    return [None if length is None else list(itertools.islice(saved, length)) for length in ctx.lengths]


def _no_gradients(ctx: Any) -> list[list[None] | None]:
    # Autograd wants a gradient, here none, for every element of every list.
    return [None if length is None else [None] * length for length in ctx.lengths]


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.littlebit2.linear_backward_x(grad, *_saved_operands(ctx))
    if len(ctx.needs_input_grad) == 6:
        # The dispatcher drops a bias left at its default, and autograd wants no gradient for it.
        return grad_x, *_no_gradients(ctx)
    grad_bias = None
    if ctx.needs_input_grad[6]:
        shape, dtype = ctx.bias_like
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype).reshape(shape)
    return grad_x, *_no_gradients(ctx), grad_bias


def _linear_backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias.
    grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.littlebit2.linear(grad, *_saved_operands(ctx), None)
    return grad_grad, *_no_gradients(ctx)
