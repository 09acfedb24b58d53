"""Powers of two that bring the dense factors of a layer into the range of float16.

Moving a power of two from one scale of a path to another does not change what the path computes. So each
``in_scale`` is brought to a length (the root of its sum of squares) in [1/8, 1/4), and ``latent_scale`` takes
what that leaves. By Cauchy and Schwarz no latent is then larger than a quarter of the length of its token:
latents are finite for tokens up to a length of 2.6e5, and about as large as ``x``.

What float16 costs then:

- An entry of a factor is right to ``2**-11`` of itself or to ``2**-25``, whichever is more. So are latents:
  below a root mean square of about ``5e-4``, the latents of a token lose bits before ``x`` does.
- An entry of ``out_scale * latent_scale`` beyond 65504 is infinite, and results that it enters are infinite
  or NaN, as in any float16 layer. Entries far below ``2**-14`` are rounded to a few bits, or to zero.

Everything runs on the device of the scales, so a call never waits for the device and can be captured into a
CUDA graph, which follows later changes of the scales.
"""

from __future__ import annotations

import torch

from .operands import Operands

__all__ = ["balance_launches", "balanced"]

#: in_scale is brought to a length in ``[2**-3, 2**-2)``: large enough for the latents of small tokens to be
#: normal numbers, small enough for those of tokens that are four times as long as float16's largest number to
#: be finite.
_HEADROOM = -2.0


def balanced(operands: Operands) -> Operands:
    """Return the layer with scales that fit float16 best: the same function but for rounding.

    Args:
        operands: ``(v, u, in_scale, latent_scale, out_scale)``, float32 scales on one device. The lengths of
            ``in_scale`` are taken in float32, whose squares end at 1e19. A single-stage layer has one factor
            with both scales in it, and is returned as it is.
    """
    v, u, in_scale, latent_scale, out_scale = operands
    if latent_scale is None:
        return operands
    inner = torch.stack(in_scale).flatten(1)  # [P, K]
    # length = mantissa * 2**exponent with a mantissa in [1/2, 1), and an exponent of 0 for a length of 0.
    exponents = torch.frexp(torch.linalg.vector_norm(inner, dim=1, keepdim=True)).exponent
    # A number with a dtype of its own: one without would bring in the default dtype.
    headroom = torch.tensor(_HEADROOM, dtype=torch.float32, device="cpu")
    factors = torch.exp2(headroom - exponents)  # [P, 1] float32
    latents = [scale / factor for scale, factor in zip(latent_scale, factors.unbind(), strict=True)]
    return v, u, list((inner * factors).unbind()), latents, out_scale


def balance_launches(paths: int) -> int:
    """Kernels that :func:`balanced` launches on a GPU for a two-stage layer; each has next to no work."""
    return 6 + paths
