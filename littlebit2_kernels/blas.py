"""The backend ``blas``: signs and scales unpacked for each call, then torch's own matrix products.

Where there are many tokens, a vendor's library on dense factors can be faster than kernels that expand signs
as they go: unpacking costs the same for one token as for thousands. In float32 and bfloat16 only: float16
does not hold all that products of scales can be.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import ops
from .dispatch import check_blas_dtype
from .ops import Operands

__all__ = ["blas_linear", "register", "unpack"]

#: The lb2_dtype (littlebit2.h) of each dtype that factors can have.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def blas_linear(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` by one or two of torch's matrix products, in the dtype of ``x``.

    Scales are part of the unpacked factors: factors, latents and bias are rounded to the dtype of ``x``, and
    products of ``latent_scale`` and ``out_scale`` must fit into it. Sums are torch's, whose settings of TF32
    and of reduced precision in bfloat16 hold.

    Args:
        x: float32 or bfloat16.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``, with the same roundings;
        factors are unpacked anew in the backward call.

    Raises:
        ValueError: ``x`` is float16.
    """
    check_blas_dtype(x.dtype)  # also where the kernel below is not reached: of meta tensors
    ops.load_for(x)
    if torch.compiler.is_compiling():
        return torch.ops.littlebit2.blas_linear(x, *operands, bias)
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            y = blas_linear(primal, operands, bias)
            return forward_ad.make_dual(y, blas_linear(tangent, operands, None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in ops.flatten((x, *operands, bias))):
        return torch.ops.littlebit2.blas_linear(x, *operands, bias)
    # Nothing to differentiate: the kernel itself, which autograd must not see the products of.
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, *operands, bias)


def unpack(operands: Operands, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the layer as matrices of ``dtype``, without room between rows, on the layer's device.

    Returns:
        ``[first, last]`` with ``y = (x @ first.T) @ last.T``: ``sign(V) * in_scale``, of all paths
        ``[R, K]``, and ``out_scale * sign(U) * latent_scale``, of all paths ``[N, R]``. Of a layer of a
        single stage ``[last]``, ``[N, K]``, the sum of its paths.

    Raises:
        RuntimeError: an operand does not fit.
    """
    ops.load_for(operands[0][0])
    return torch.ops.littlebit2.unpack(*operands, _DTYPES[dtype])


def register() -> None:
    """Register the operators' kernels, fakes and gradients; the library that defines them must be loaded."""
    torch.library.register_fake("littlebit2::unpack", _unpack_fake)
    for name, kernel, fake, backward in (
        ("blas_linear", _linear, ops.linear_fake, _linear_backward),
        ("blas_linear_backward_x", _backward_x, ops.linear_backward_x_fake, _backward_x_backward),
    ):
        qualified = f"littlebit2::{name}"
        torch.library.impl(qualified, ("cpu", "cuda"), kernel)
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward, setup_context=ops.linear_setup)
    torch.library.impl("littlebit2::linear_backward_x", "cuda", _cuda_linear_backward_x)


def _linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    check_blas_dtype(x.dtype)
    operands, bias = arguments[:5], arguments[5] if len(arguments) > 5 else None
    ops.check_fake("x", x, operands[2][0].shape[-1], operands, bias)
    *first, last = unpack(operands, x.dtype)
    with _without_autocast(x):
        bias = None if bias is None else bias.flatten().to(x.dtype)
        return F.linear(F.linear(x, first[0]) if first else x, last, bias)


def _backward_x(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    ops.check_fake("grad", grad, operands[4][0].shape[-1], operands, None)
    *first, last = unpack(operands, grad.dtype)
    with _without_autocast(grad):
        return grad @ last @ first[0] if first else grad @ last


def _cuda_linear_backward_x(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    """The CUDA kernel of ``littlebit2::linear_backward_x``: in bfloat16 for bfloat16, else in float32."""
    ops.check_fake("grad", grad, operands[4][0].shape[-1], operands, None)
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    return _backward_x(grad.to(dtype), *operands).to(grad.dtype)


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    # As with the other backends, autocast is the module's to follow.
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# The products are within one operator each way: a compiler that saw them would keep a layer's factors from
# the forward to the backward call.
def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.littlebit2.blas_linear_backward_x(grad, *ops.saved_operands(ctx))
    grad_bias = None
    if len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6]:
        grad_bias = ops.bias_gradient(ctx, grad)
    # The dispatcher drops a bias left at its default.
    return (grad_x, *ops.no_gradients(ctx), grad_bias)[: len(ctx.needs_input_grad)]


def _backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias.
    grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.littlebit2.blas_linear(grad, *ops.saved_operands(ctx), None)
    return grad_grad, *ops.no_gradients(ctx)


def _unpack_fake(
    v: list[torch.Tensor],
    u: list[torch.Tensor] | None,
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor] | None,
    out_scale: list[torch.Tensor],
    dtype: int,
) -> list[torch.Tensor]:
    torch_dtype = next((name for name, value in _DTYPES.items() if value == dtype), None)
    if torch_dtype is None:
        raise RuntimeError(f"littlebit2: dtype must be one of {_DTYPES}, got {dtype}")
    k, n = in_scale[0].shape[-1], out_scale[0].shape[-1]
    if u is None or latent_scale is None:
        return [in_scale[0].new_empty((n, k), dtype=torch_dtype)]
    latents = sum(scale.shape[-1] for scale in latent_scale)
    shapes = ((latents, k), (n, latents))
    return [in_scale[0].new_empty(shape, dtype=torch_dtype) for shape in shapes]
