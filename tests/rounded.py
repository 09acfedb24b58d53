"""The activation modes that round their operands, in float64."""

from __future__ import annotations

import torch

from littlebit2_kernels import PackedLinear
from littlebit2_kernels.format import unpack_signs_reference

__all__ = ["SLICE", "rounded_reference"]

#: Columns with a common activation scale (csrc/cuda, docs/triton.md).
SLICE = 512


def rounded_reference(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """The layer with the operands of both stages rounded slice by slice.

    Args:
        x: ``[..., K]``.
        packed: the layer.
        mode: ``int8``: integers up to 127 times the slice's largest magnitude / 127; ``sign``: signs (of
            zero: +1) times the slice's mean magnitude.

    Returns:
        ``[..., N]`` in float64.
    """
    x = x.double()
    y = x.new_zeros((*x.shape[:-1], packed.out_features))
    for path in packed.paths:
        z = _product(x * path.in_scale.double(), path.v, mode)
        if path.u is not None and path.latent_scale is not None:
            z = _product(z * path.latent_scale.double(), path.u, mode)
        y = y + z * path.out_scale.double()
    return y if packed.bias is None else y + packed.bias.double()


def _product(z: torch.Tensor, words: torch.Tensor, mode: str) -> torch.Tensor:
    """Integers times signs, scaled afterwards: a count of zero stays exactly zero, with the sign +1."""
    total = z.new_zeros((*z.shape[:-1], words.shape[0]))
    signs = unpack_signs_reference(words, z.shape[-1], torch.float64)
    for part, matrix in zip(z.split(SLICE, dim=-1), signs.split(SLICE, dim=-1), strict=True):
        if mode == "sign":
            scale, integers = part.abs().mean(-1, keepdim=True), torch.where(part < 0, -1.0, 1.0).double()
        else:
            scale = part.abs().amax(-1, keepdim=True) / 127
            integers = torch.where(scale == 0, 0.0, part / scale).round()
        total += integers @ matrix.T * scale
    return total
