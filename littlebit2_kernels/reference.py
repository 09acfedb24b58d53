"""The one definition of truth: the layer in plain PyTorch, in float64 by default."""

from __future__ import annotations

from typing import Any

import torch

from .format import PackedLinear, PackedPath, unpack_signs_reference

__all__ = ["dense_weight", "linear_reference", "reference_from_operands"]


def linear_reference(
    x: torch.Tensor, packed: PackedLinear, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Compute ``packed`` applied to ``x`` (LittleBit, arXiv 2506.13771) by unpacked matrix products.

    Args:
        x: ``[..., K]``, floating point.
        packed: the layer.
        dtype: dtype of every intermediate and of the result; float64 is the truth, another dtype
            is what PyTorch itself makes of the same formula.

    Returns:
        ``[..., N]`` of ``dtype``.
    """
    return reference_from_operands(x, packed.operands, packed.bias, dtype)


def reference_from_operands(
    x: torch.Tensor, operands: tuple[Any, ...], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The same of ``(v, u, in_scale, latent_scale, out_scale)``; scales may be ``[1, size]``."""
    v, u, in_scale, latent_scale, out_scale = operands
    x = x.to(dtype)
    y = x.new_zeros((*x.shape[:-1], out_scale[0].shape[-1]))
    for p in range(len(v)):
        signs = unpack_signs_reference(v[p], in_scale[p].shape[-1], dtype)
        z = (x * in_scale[p].flatten().to(dtype)) @ signs.T
        if u is not None and latent_scale is not None:
            signs = unpack_signs_reference(u[p], latent_scale[p].shape[-1], dtype)
            z = (z * latent_scale[p].flatten().to(dtype)) @ signs.T
        y = y + z * out_scale[p].flatten().to(dtype)
    return y if bias is None else y + bias.to(dtype)


def dense_weight(layer: PackedLinear | PackedPath, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the dense weight ``[N, K]`` that a layer or a single path stands for (bias excluded)."""
    packed = layer if isinstance(layer, PackedLinear) else PackedLinear((layer,))
    packed = PackedLinear(packed.paths)
    eye = torch.eye(packed.in_features, dtype=dtype, device=packed.device)
    return linear_reference(eye, packed, dtype).T
