"""Random problems, the error metric and the tolerances that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .format import PackedLinear, PackedPath, pack_signs_reference
from .reference import linear_reference

__all__ = ["TOLERANCE", "make_packed", "make_problem", "max_allowed_error", "relative_error", "typical_norm"]

#: Relative Frobenius error against float64 that a kernel may always have, by activation dtype: that of
#: float32 accumulation, plus for the 16-bit types the rounding of the output itself.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11 + 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def make_packed(
    in_features: int,
    out_features: int,
    ranks: Sequence[int] | None,
    *,
    bias: bool = False,
    share_v: bool = False,
    scale_spread: float = 0.5,
    generator: torch.Generator | None = None,
) -> PackedLinear:
    """Make a layer with random signs and log-normal scales.

    Args:
        in_features: K.
        out_features: N.
        ranks: one rank per path; ``None`` makes a single-stage (OneBit-like) layer.
        bias: whether to add a bias.
        share_v: whether all paths share the first path's ``v`` and ``in_scale`` (needs equal ranks).
        scale_spread: standard deviation of the log of the scales; 0 makes them all +-1.
        generator: source of randomness.
    """

    def signs(rows: int, cols: int) -> torch.Tensor:
        return pack_signs_reference(torch.randn(rows, cols, generator=generator))

    def scale(size: int) -> torch.Tensor:
        magnitude = torch.exp(scale_spread * torch.randn(size, generator=generator))
        return magnitude * torch.randn(size, generator=generator).sign()

    if ranks is None:
        path = PackedPath(
            v=signs(out_features, in_features), in_scale=scale(in_features), out_scale=scale(out_features)
        )
        paths = [path]
    else:
        if share_v and len(set(ranks)) != 1:
            raise ValueError(f"ranks must be equal when share_v is set, got {list(ranks)}")
        paths = []
        for rank in ranks:
            shared = paths[0] if share_v and paths else None
            paths.append(
                PackedPath(
                    v=shared.v if shared else signs(rank, in_features),
                    in_scale=shared.in_scale if shared else scale(in_features),
                    out_scale=scale(out_features),
                    u=signs(out_features, rank),
                    latent_scale=scale(rank),
                )
            )
    return PackedLinear(tuple(paths), scale(out_features) if bias else None)


def make_problem(
    tokens: int,
    in_features: int,
    out_features: int,
    ranks: Sequence[int] | None,
    *,
    dtype: torch.dtype = torch.float32,
    outliers: int = 0,
    generator: torch.Generator | None = None,
    **packed_options: bool | float,
) -> tuple[torch.Tensor, PackedLinear]:
    """Make ``(x, packed)`` with ``x`` ``[M, K]`` of ``dtype``; ``outliers`` channels are 50x larger."""
    packed = make_packed(in_features, out_features, ranks, generator=generator, **packed_options)  # type: ignore[arg-type]
    x = torch.randn(tokens, in_features, generator=generator)
    if outliers:
        x[:, torch.randperm(in_features, generator=generator)[:outliers]] *= 50
    return x.to(dtype), packed


def relative_error(actual: torch.Tensor, truth: torch.Tensor, typical: float = 0.0) -> float:
    """Frobenius error ``|actual - truth| / max(|truth|, typical)`` in float64.

    0 for two empty tensors, infinite if ``actual`` is not finite where ``truth`` is.

    Args:
        actual: the result.
        truth: what it should be, of the same shape.
        typical: a norm below which ``truth`` is small by chance, see :func:`typical_norm`.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"actual must have shape {list(truth.shape)}, got {list(actual.shape)}")
    difference = torch.linalg.vector_norm(actual.double() - truth.double())
    if torch.isnan(difference):
        return float("inf")
    norm = max(float(torch.linalg.vector_norm(truth.double())), typical)
    return float(difference) / norm if norm else float(difference)


def typical_norm(x: torch.Tensor, packed: PackedLinear, *, backward: bool = False) -> float:
    """Root mean square of ``|packed(x)|`` over all signs, the scales as they are (bias excluded).

    A result with few elements may cancel to almost nothing. Its relative error then measures the
    cancellation and not the kernel, and is compared with this norm instead.

    Args:
        x: ``[..., K]``; for the backward call the gradient ``[..., N]``.
        packed: the layer.
        backward: whether the norm is that of the gradient of x.
    """
    energy = torch.zeros((), dtype=torch.float64)
    for path in packed.paths:
        first, last = path.in_scale.double().square(), path.out_scale.double().square()
        if backward:
            first, last = last, first
        latent = 1.0 if path.latent_scale is None else path.latent_scale.double().square().sum()
        energy += (x.double().square() @ first).sum() * latent * last.sum()
    return float(energy.sqrt())


def max_allowed_error(x: torch.Tensor, packed: PackedLinear, truth: torch.Tensor) -> float:
    """Error that a kernel may have: TOLERANCE, or for 16-bit ``x`` PyTorch's own in that dtype if larger."""
    if x.dtype == torch.float32 or not truth.numel():
        return TOLERANCE[x.dtype]
    own = relative_error(linear_reference(x, packed, x.dtype), truth, typical_norm(x, packed))
    # Where PyTorch's own intermediates overflow, its error says nothing.
    return max(own, TOLERANCE[x.dtype]) if own < 1 else TOLERANCE[x.dtype]
