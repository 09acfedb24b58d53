"""The backend ``blas``: signs and scales unpacked for each call, then torch's own matrix products.

Where there are many tokens, a vendor's library on dense factors can be faster than kernels that expand signs
as they go: unpacking costs the same for one token as for thousands. In float32 and bfloat16 only, as float16
does not hold all products of scales.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from .ops import Operands, flatten, load_for, refuse_gradients_of_scales

__all__ = ["blas_linear", "register", "unpack"]

#: The lb2_dtype (littlebit2.h) of each dtype that factors can have.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def blas_linear(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` by one or two of torch's matrix products, in the dtype of ``x``.

    Scales are part of the unpacked factors, so that every rounding is that of ``x``'s dtype: of a factor, of
    the latents, of the bias. In float32, torch's settings of TF32 hold.

    Args:
        x: float32 or bfloat16.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``; factors are unpacked anew in
        the backward call.

    Raises:
        ValueError: ``x`` is float16.
    """
    if x.dtype == torch.float16:
        raise ValueError(
            "x must be float32 or bfloat16 for backend='blas', as float16 does not hold all products of the "
            "scales; got torch.float16, which the other backends serve"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in flatten((x, *operands, bias))):
        return _Linear.apply(x, bias, [None if o is None else len(o) for o in operands], *flatten(operands))
    return _product(x, operands, bias)


def unpack(operands: Operands, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the layer as matrices of ``dtype``, without room between rows, on the layer's device.

    Returns:
        ``[first, last]`` with ``y = (x @ first.T) @ last.T``: ``sign(V) * in_scale``, of all paths
        ``[R, K]``, and ``out_scale * sign(U) * latent_scale``, of all paths ``[N, R]``. Of a layer of a
        single stage ``[last]``, ``[N, K]``, the sum of its paths.

    Raises:
        RuntimeError: an operand does not fit.
    """
    load_for(operands[0][0])
    return torch.ops.littlebit2.unpack(*operands, _DTYPES[dtype])


def register() -> None:
    """Register what ``littlebit2::unpack`` and gradients on CUDA need; the operators must be loaded."""
    torch.library.register_fake("littlebit2::unpack", _unpack_fake)
    torch.library.impl("littlebit2::linear_backward_x", "cuda", _linear_backward_x)


def _product(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    *first, last = unpack(operands, x.dtype)
    with _without_autocast(x):
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(F.linear(x, first[0]) if first else x, last, bias)


def _transposed_product(grad: torch.Tensor, operands: Operands) -> torch.Tensor:
    *first, last = unpack(operands, grad.dtype)
    with _without_autocast(grad):
        return grad @ last @ first[0] if first else grad @ last


def _without_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    # As with the other backends, autocast is the module's to follow. Meta tensors know none.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _linear_backward_x(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    """The CUDA kernel of ``littlebit2::linear_backward_x``: in bfloat16 or float32."""
    dtype = torch.bfloat16 if grad.dtype == torch.bfloat16 else torch.float32
    return _transposed_product(grad.to(dtype), operands).to(grad.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor, bias: torch.Tensor | None, lengths: list[int | None], *operands: torch.Tensor
    ) -> torch.Tensor:
        return _product(x, _as_lists(lengths, operands), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, bias, lengths, *operands = inputs
        refuse_gradients_of_scales(_as_lists(lengths, operands))
        # Saved, not kept: autograd then notices when they are changed in place before the backward call.
        ctx.save_for_backward(*operands)
        ctx.lengths = lengths
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _transposed_product(grad, _as_lists(ctx.lengths, ctx.saved_tensors))
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.bias_like
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype).reshape(shape)
        return (grad_x, grad_bias, None, *[None] * (len(ctx.needs_input_grad) - 3))


def _as_lists(lengths: list[int | None], tensors: Any) -> Operands:
    left = iter(tensors)
    return tuple(  # type: ignore[return-value]
        None if length is None else list(itertools.islice(left, length)) for length in lengths
    )


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
