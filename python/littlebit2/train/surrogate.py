"""What stands for the derivative of the sign function, which is zero almost everywhere.

The forward pass always takes the hard sign of the packed format, ``sign(0) = +1``. Backward:

``"smooth-sign"``
    ``100 (1 - tanh^2(100 x))``, the derivative of ``tanh(100 x)``: LittleBit's SmoothSign (arXiv 2506.13771).
``"clipped"``
    1 where ``|x| <= 1``, else 0: the clipped straight-through estimator of binarized networks
    (arXiv 1602.02830).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

__all__ = ["STEEPNESS", "Surrogate", "check_surrogate", "hard_sign", "surrogate_slope"]

Surrogate = Literal["smooth-sign", "clipped"]

#: Of SmoothSign.
STEEPNESS = 100.0
_CLIP = 1.0


def check_surrogate(surrogate: str) -> None:
    """Raise ``ValueError`` unless ``surrogate`` is one of the names above."""
    if surrogate not in get_args(Surrogate):
        raise ValueError(f"surrogate must be one of {', '.join(get_args(Surrogate))}, got {surrogate!r}")


def hard_sign(latent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return -1 where ``latent`` is negative and +1 elsewhere, in ``dtype``, which holds both exactly."""
    return (latent < 0).to(dtype).mul_(-2).add_(1)


def surrogate_slope(latent: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """Return the stand-in for ``d sign(x) / dx`` at ``latent``, in its dtype."""
    if surrogate == "clipped":
        return (latent.abs() <= _CLIP).to(latent.dtype)
    steep = torch.tanh(latent * STEEPNESS)
    return steep.square_().neg_().add_(1).mul_(STEEPNESS)
