"""``littlebit2::blas_linear`` and its gradient: backend ``blas``, which dequantizes and calls torch.matmul.

With many tokens, a vendor's library on dense factors can be faster than kernels that expand signs as they go:
dequantizing costs the same for one token as for thousands. In float16 the scales are normalized first
(:mod:`littlebit2_kernels.ops.balance`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from ..planning.cpu import product_dtype
from .balance import balanced
from .operands import bias_gradient, check_fake, no_gradients, save_operands, saved_operands
from .packed import linear_backward_x_fake, linear_fake

__all__ = ["dense_kernel", "register", "unpack"]

#: The lb2_dtype (littlebit2.h) of each dtype that factors can have.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def register() -> None:
    """Register the operators' kernels, fakes and gradients; the library that defines them must be loaded."""
    torch.library.register_fake("littlebit2::unpack", _unpack_fake)
    for name, kernel, fake, backward in (
        ("blas_linear", dense_kernel, linear_fake, _linear_backward),
        ("blas_linear_backward_x", _backward_x, linear_backward_x_fake, _backward_x_backward),
    ):
        qualified = f"littlebit2::{name}"
        torch.library.impl(qualified, ("cpu", "cuda"), kernel)
        torch.library.register_fake(qualified, fake)
        torch.library.register_autograd(qualified, backward, setup_context=save_operands)
    torch.library.impl("littlebit2::linear_backward_x", "cuda", _backward_x)


def dense_kernel(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Kernel of ``littlebit2::blas_linear``, for the CPU and CUDA."""
    operands, bias = arguments[:5], arguments[5] if len(arguments) > 5 else None
    check_fake("x", x, operands[2][0].shape[-1], operands, bias)
    dtype = product_dtype(x.dtype) if x.is_cpu else x.dtype
    *first, last = unpack(balanced(operands) if dtype == torch.float16 else operands, dtype)
    with _without_autocast(x):
        bias = None if bias is None else bias.flatten().to(dtype)
        rows = x.to(dtype)
        return F.linear(F.linear(rows, first[0]) if first else rows, last, bias).to(x.dtype)


def unpack(operands: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The dense factors; the operators must be loaded. See :func:`littlebit2_kernels.ops.calls.unpack`."""
    return torch.ops.littlebit2.unpack(*operands, _DTYPES[dtype])


def _backward_x(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    """The gradient of x, and on CUDA that of every backend: in bfloat16 for bfloat16, else in float32."""
    check_fake("grad", grad, operands[4][0].shape[-1], operands, None)
    # Gradients are small: of latents, float16 would hold few bits.
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    *first, last = unpack(operands, dtype)
    with _without_autocast(grad):
        product = grad.to(dtype) @ last
        return (product @ first[0] if first else product).to(grad.dtype)


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    # As with the other backends, autocast is the module's to follow.
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


# The products are within one operator each way: a compiler that saw them would keep a layer's factors from
# the forward to the backward call.
def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.littlebit2.blas_linear_backward_x(grad, *saved_operands(ctx))
    grad_bias = None
    if len(ctx.needs_input_grad) > 6 and ctx.needs_input_grad[6]:
        grad_bias = bias_gradient(ctx, grad)
    # The dispatcher drops a bias left at its default.
    return (grad_x, *no_gradients(ctx), grad_bias)[: len(ctx.needs_input_grad)]


def _backward_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias.
    grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.littlebit2.blas_linear(grad, *saved_operands(ctx), None)
    return grad_grad, *no_gradients(ctx)


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
