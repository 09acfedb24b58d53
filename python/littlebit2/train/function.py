"""One path of a layer as an autograd function that keeps almost nothing.

Forward, for x ``[M, K]``: ``z = (x * in_scale) sign(V)^T`` ``[M, R]`` and
``y = (z * latent_scale) sign(U)^T * out_scale`` ``[M, N]`` (LittleBit, arXiv 2506.13771). Between forward and
backward only ``x`` and ``z`` are held besides the parameters; signs, scaled activations and the slopes of the
surrogate are made again in backward. Plain autograd would hold two sign matrices, two slope matrices and four
activations.

The gradients of the two outer scales need no product of their own: with ``G = g^T (z * latent_scale)``, that
of ``out_scale`` is the row sum of ``G * sign(U)``; likewise for ``in_scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .surrogate import Surrogate, hard_sign, surrogate_slope

__all__ = ["binary_path"]


def binary_path(
    x: torch.Tensor,
    v: torch.Tensor,
    in_scale: torch.Tensor,
    u: torch.Tensor,
    latent_scale: torch.Tensor,
    out_scale: torch.Tensor,
    surrogate: Surrogate,
) -> torch.Tensor:
    """Apply one path of float latents.

    Args:
        x: ``[M, K]``; its dtype is that of all products. Sums over tokens and gradients of parameters are
            taken in the parameters' dtype.
        v: latent ``[R, K]``.
        in_scale: ``[K]``.
        u: latent ``[N, R]``.
        latent_scale: ``[R]``.
        out_scale: ``[N]``.
        surrogate: derivative used for the sign in backward.

    Returns:
        ``[M, N]`` of the dtype of ``x``. Differentiable once in every tensor.
    """
    return _BinaryPath.apply(x, v, in_scale, u, latent_scale, out_scale, surrogate)


class _BinaryPath(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        v: torch.Tensor,
        in_scale: torch.Tensor,
        u: torch.Tensor,
        latent_scale: torch.Tensor,
        out_scale: torch.Tensor,
        surrogate: Surrogate,
    ) -> torch.Tensor:
        dtype = x.dtype
        # An enclosing autocast would cast again what has its dtype already.
        with torch.autocast(x.device.type, enabled=False):
            z = (x * in_scale.to(dtype)) @ hard_sign(v, dtype).T
            y = ((z * latent_scale.to(dtype)) @ hard_sign(u, dtype).T).mul_(out_scale.to(dtype))
        ctx.save_for_backward(x, z, v, in_scale, u, latent_scale, out_scale)
        ctx.surrogate = surrogate
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, v, in_scale, u, latent_scale, out_scale = ctx.saved_tensors
        need_x, need_v, need_in, need_u, need_latent, need_out = ctx.needs_input_grad[:6]
        dtype = x.dtype
        grad_x = grad_v = grad_in = grad_u = grad_latent = grad_out = None
        with torch.autocast(x.device.type, enabled=False):
            signs = hard_sign(u, dtype)
            if need_u or need_out:
                grad_u, grad_out = _factor_gradients(
                    grad.T @ (z * latent_scale.to(dtype)), u, signs, out_scale, 1, ctx.surrogate
                )
            latent_grad = (grad * out_scale.to(dtype)) @ signs  # [M, R]
            del signs
            if need_latent:
                grad_latent = (latent_grad.to(u.dtype) * z.to(u.dtype)).sum(0)
            if need_x or need_v or need_in:
                z_grad = latent_grad * latent_scale.to(dtype)
                signs = hard_sign(v, dtype)
                if need_v or need_in:
                    grad_v, grad_in = _factor_gradients(z_grad.T @ x, v, signs, in_scale, 0, ctx.surrogate)
                if need_x:
                    grad_x = (z_grad @ signs).mul_(in_scale.to(dtype))
        return grad_x, grad_v, grad_in, grad_u, grad_latent, grad_out, None


def _factor_gradients(
    product: torch.Tensor,
    latent: torch.Tensor,
    signs: torch.Tensor,
    scale: torch.Tensor,
    along: int,
    surrogate: Surrogate,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of a latent matrix and of its outer scale.

    Args:
        product: gradient of the scaled signs divided by the scale, of the latent's shape.
        latent: ``[N, R]`` or ``[R, K]``.
        signs: signs of ``latent``, in the dtype of the products.
        scale: ``[N]`` or ``[K]``.
        along: the dimension of the rank, over which the gradient of ``scale`` sums.
        surrogate: derivative used for the sign in backward.
    """
    product = product.to(latent.dtype)
    of_scale = (product * signs.to(latent.dtype)).sum(along)
    return product.mul_(scale.unsqueeze(along)).mul_(surrogate_slope(latent, surrogate)), of_scale
