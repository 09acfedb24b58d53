"""The backend ``blas``: signs and scales unpacked for each call, then torch's own matrix products.

Where there are many tokens, a vendor's library on dense factors can be faster than kernels that expand signs
as they go: unpacking costs the same for one token as for thousands. In float16 the scales are balanced first
(:mod:`littlebit2_kernels.balance`), and layers that do not fit are refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from . import ops
from .balance import balanced
from .ops import Operands

__all__ = ["blas_linear", "register", "unpack"]

#: The lb2_dtype (littlebit2.h) of each dtype that factors can have.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def blas_linear(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` by one or two of torch's matrix products, in the dtype of ``x``.

    Scales are part of the unpacked factors: factors, latents and bias are rounded to the dtype of ``x``, and
    products of ``latent_scale`` and ``out_scale`` must fit into it. Sums are torch's, whose settings of TF32
    and of reduced precision in bfloat16 and float16 hold.

    In float16, entries of factors are right to ``2**-11`` of themselves or ``2**-25``, whichever is more, and
    latents, which are about as large as ``x``, to ``2**-11`` or ``2**-25`` too: below a root mean square of
    about ``5e-4`` the latents of a token lose bits before ``x`` does. No latent overflows where the length of
    the token (the root of the sum of its squares) is at most ``2.6e5``; beyond, one may although the result
    would not. The first call of a layer, and of changed scales, reads them (a wait for the device).

    Args:
        x: float32, float16 or bfloat16.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``, with the same roundings,
        of float16 in float32; factors are unpacked anew in the backward call.

    Raises:
        ValueError: ``x`` is float16, and factors of the layer are beyond its largest number, or those of more
            than a hundredth of the channels below its smallest normal one.
        RuntimeError: the first float16 call of a layer is captured into a CUDA graph.
    """
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
    torch.library.impl("littlebit2::linear_backward_x", "cuda", _backward_x)


def _linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    operands, bias = arguments[:5], arguments[5] if len(arguments) > 5 else None
    ops.check_fake("x", x, operands[2][0].shape[-1], operands, bias)
    *first, last = unpack(balanced(operands) if x.dtype == torch.float16 else operands, x.dtype)
    with _without_autocast(x):
        bias = None if bias is None else bias.flatten().to(x.dtype)
        return F.linear(F.linear(x, first[0]) if first else x, last, bias)


def _backward_x(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    """The gradient of x, and on CUDA that of every backend: in bfloat16 for bfloat16, else in float32."""
    ops.check_fake("grad", grad, operands[4][0].shape[-1], operands, None)
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
