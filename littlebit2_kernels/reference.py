"""The one definition of truth: the layer in plain PyTorch, in float64 by default."""

from __future__ import annotations

import torch

from .format import PackedLinear, PackedPath, unpack_signs_reference

__all__ = ["dense_weight", "linear_reference"]


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
    x = x.to(dtype)
    y = x.new_zeros((*x.shape[:-1], packed.out_features))
    for path in packed.paths:
        z = (x * path.in_scale.to(dtype)) @ unpack_signs_reference(path.v, path.in_features, dtype).T
        if path.u is not None and path.latent_scale is not None:
            z = (z * path.latent_scale.to(dtype)) @ unpack_signs_reference(path.u, path.rank, dtype).T
        y = y + z * path.out_scale.to(dtype)
    return y if packed.bias is None else y + packed.bias.to(dtype)


def dense_weight(layer: PackedLinear | PackedPath, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the dense weight ``[N, K]`` that a layer or a single path stands for (bias excluded)."""
    packed = layer if isinstance(layer, PackedLinear) else PackedLinear((layer,))
    packed = PackedLinear(packed.paths)
    eye = torch.eye(packed.in_features, dtype=dtype, device=packed.device)
    return linear_reference(eye, packed, dtype).T
