"""Where training starts: real-valued latents whose signs are those of a packed layer.

A packed layer says which sign, not how far from flipping it is. Where the dense weight ``W`` is known, that
is read off the least-squares problem that the quantizer solves: with ``a = out_scale[n]``, the rows ``B`` of
the dense right factor and the residual ``E = W - W_hat`` of all paths, flipping ``U[n, r]`` changes the
squared error by ``4 a^2 |B_r|^2 (1 + sign(U[n, r]) (E B^T)[n, r] / (a |B_r|^2))``. The bracket is a
confidence without a unit: 1 where the residual has no say, 0 where both signs are as good, negative where the
other is better. The latent is the sign times the confidence times ``magnitude``. Signs stay as the quantizer
left them: wrong ones start next to zero, where the first steps can turn them.

Without the weight, every latent starts at ``magnitude``.
"""

from __future__ import annotations

import torch

from littlebit2_kernels.format import PackedLinear, PackedPath
from littlebit2_kernels.packing import unpack_signs

__all__ = ["MAGNITUDE", "starting_latents"]

#: Of a latent of confidence 1: where SmoothSign's slope is 7% of its largest.
MAGNITUDE = 0.02
_LEAST_CONFIDENCE = 0.05
_MOST_CONFIDENCE = 4.0


def starting_latents(
    packed: PackedLinear, weight: torch.Tensor | None = None, magnitude: float = MAGNITUDE
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """Return the latents ``(V, U)`` of every path, float32; ``V`` is ``None`` where the path shares one.

    Args:
        packed: two-stage paths.
        weight: the dense ``[N, K]`` that it approximates, or ``None``.
        magnitude: positive.

    Raises:
        ValueError: ``weight`` has another shape, ``magnitude`` is not positive, or a path has one stage.
    """
    if not magnitude > 0:
        raise ValueError(f"magnitude must be positive, got {magnitude}")
    if packed.single_stage:
        raise ValueError(
            "packed must have two-stage paths to be trained, got a single-stage (OneBit-like) layer"
        )
    signs = [
        (unpack_signs(path.v, path.in_features), unpack_signs(_u_of(path), path.rank))
        for path in packed.paths
    ]
    if weight is None:
        confidences = [(torch.ones_like(v), torch.ones_like(u)) for v, u in signs]
    else:
        confidences = _confidences(packed, signs, weight)
    latents: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    shares = packed.shape.shares
    for p, ((v, u), (of_v, of_u)) in enumerate(zip(signs, confidences, strict=True)):
        own = shares[p] == p
        latents.append((v * of_v * magnitude if own else None, u * of_u * magnitude))
    return latents


def _u_of(path: PackedPath) -> torch.Tensor:
    assert path.u is not None  # two-stage, as checked
    return path.u


def _confidences(
    packed: PackedLinear, signs: list[tuple[torch.Tensor, torch.Tensor]], weight: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    expected = [packed.out_features, packed.in_features]
    if list(weight.shape) != expected:
        raise ValueError(
            f"weight must have shape {expected}, as the packed layer has, got {list(weight.shape)}"
        )
    residual = weight.detach().to(packed.device, torch.float32, copy=True)
    for path, (v, u) in zip(packed.paths, signs, strict=True):
        residual -= _scaled_u(path, u) @ (v * path.in_scale)
    found = []
    for path, (v, u) in zip(packed.paths, signs, strict=True):
        latent = path.latent_scale
        assert latent is not None  # two-stage, as checked
        right = v * path.in_scale * latent.unsqueeze(1)  # [R, K]
        left = _scaled_u(path, u)  # [N, R], with the latent scale
        of_u = u * (residual @ right.T)
        of_u /= _nonzero(path.out_scale.unsqueeze(1) * right.square().sum(1))
        of_v = v * (left.T @ residual)
        of_v /= _nonzero(path.in_scale * left.square().sum(0).unsqueeze(1))
        found.append((_bounded(of_v), _bounded(of_u)))
    return found


def _scaled_u(path: PackedPath, u: torch.Tensor) -> torch.Tensor:
    assert path.latent_scale is not None  # two-stage, as checked
    return u * path.out_scale.unsqueeze(1) * path.latent_scale


def _nonzero(value: torch.Tensor) -> torch.Tensor:
    """Replace zeros: a sign whose scale is zero matters to nothing, and any confidence will do."""
    return torch.where(value == 0, torch.ones_like(value), value)


def _bounded(relative: torch.Tensor) -> torch.Tensor:
    return relative.add_(1).clamp_(_LEAST_CONFIDENCE, _MOST_CONFIDENCE)
