"""The operators: loading, fakes, the gradient of x, and :func:`littlebit_linear`.

The schemas live in ``csrc/torch/library.cpp``. Everything here is traceable by ``torch.compile``.
"""

from __future__ import annotations

from typing import Any

import torch

from ._native import load_ops
from .dispatch import choose_backend
from .format import PackedLinear
from .reference import linear_reference

__all__ = ["Operand", "Operands", "linear_from_operands", "littlebit_linear", "load"]

#: Tensors of one operand, one per path.
Operand = list[torch.Tensor]
#: ``(v, u, in_scale, latent_scale, out_scale)``; a single-stage layer has no ``u`` and ``latent_scale``.
Operands = tuple[Operand, Operand | None, Operand, Operand | None, Operand]

_ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    load_ops()
    torch.library.register_fake("littlebit2::linear", _linear_fake)
    torch.library.register_fake("littlebit2::linear_backward_x", _linear_backward_x_fake)
    torch.library.register_autograd("littlebit2::linear", _linear_backward, setup_context=_linear_setup)
    torch.library.register_autograd(
        "littlebit2::linear_backward_x", _linear_backward_x_backward, setup_context=_linear_setup
    )
    _registered = True


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
    _check_input(x, packed.in_features, packed.device)
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
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return torch.ops.littlebit2.linear(x, *operands, bias)
    # Nothing to differentiate: step over the Python autograd kernel, which costs more than the dispatch.
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.littlebit2.linear(x, *operands, bias)


def _check_input(x: torch.Tensor, in_features: int, device: torch.device) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x.size(-1) must equal K={in_features}, got shape {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on {device} like the packed layer, got {x.device}")


def _linear_fake(
    x: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    torch._check(
        x.shape[-1] == in_scale[0].shape[-1], lambda: f"x.size(-1) must equal {in_scale[0].shape[-1]}"
    )
    return x.new_empty((*x.shape[:-1], out_scale[0].shape[-1]))


def _linear_backward_x_fake(
    grad: torch.Tensor,
    v: Operand,
    u: Operand | None,
    in_scale: Operand,
    latent_scale: Operand | None,
    out_scale: Operand,
) -> torch.Tensor:
    torch._check(
        grad.shape[-1] == out_scale[0].shape[-1], lambda: f"grad.size(-1) must equal {out_scale[0].shape[-1]}"
    )
    return grad.new_empty((*grad.shape[:-1], in_scale[0].shape[-1]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    # Inputs of both operators start with the activation and the five lists; the forward has bias too.
    ctx.operands = inputs[1:6]
    for name, tensors in zip(("in_scale", "latent_scale", "out_scale"), inputs[3:6], strict=True):
        for index, tensor in enumerate(tensors or ()):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{name}[{index}] requires a gradient, but packed layers are frozen: "
                    "littlebit2::linear is differentiable in x and bias only"
                )
    ctx.bias_dtype = inputs[6].dtype if len(inputs) > 6 and inputs[6] is not None else None


def _no_gradients(operands: Operands) -> tuple[list[None] | None, ...]:
    # Autograd wants a gradient, here none, for every element of every list.
    return tuple(None if tensors is None else [None] * len(tensors) for tensors in operands)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.littlebit2.linear_backward_x(grad, *ctx.operands)
    if len(ctx.needs_input_grad) == 6:
        # The dispatcher drops a bias left at its default, and autograd wants no gradient for it.
        return grad_x, *_no_gradients(ctx.operands)
    grad_bias = None
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, *_no_gradients(ctx.operands), grad_bias


def _linear_backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias.
    grad_grad = torch.ops.littlebit2.linear(grad, *ctx.operands, None) if ctx.needs_input_grad[0] else None
    return grad_grad, *_no_gradients(ctx.operands)
