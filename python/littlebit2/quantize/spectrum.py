"""What a weight's spectrum promises and what each step of the initialization makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .budget import tiny_rank
from .config import QuantConfig
from .quantizer import quantize_weight
from .solvers.dual_svid import dual_svid, path_factors
from .solvers.joint_itq import joint_itq
from .solvers.numerics import binary_exponent, check_matrix, normalized, squared_norm
from .solvers.svd import truncated_factors

__all__ = ["Coherence", "SpectralReport", "StageReport", "analyze_weight", "energy_share", "latent_coherence"]


@dataclass(frozen=True)
class Coherence:
    """How far the rows of the latent factors are from entries of one magnitude, weighted by row energy.

    Over the rows ``z`` of ``[a; b.T]``, each weighted by ``|z|_2^2``:

    Attributes:
        peak: mean of ``sqrt(R) max|z| / |z|_2``, between 1 (flat) and ``sqrt(R)`` (one spike).
        alignment: mean of ``|z|_1^2 / (R |z|_2^2)``, the share of a row's energy that its signs and
            one scale keep: 1 for a flat row, ``2 / pi`` for a Gaussian one, ``1 / R`` for a spike.
    """

    peak: float
    alignment: float


@dataclass(frozen=True)
class StageReport:
    """The primary path under one treatment of the latent space.

    Attributes:
        error: squared relative Frobenius error of the path.
        share: ``c``, the energy the path keeps over the energy its real factors hold:
            ``(1 - error) / E(R)``; negative where the path is worse than no path.
        gain: ``c E(R) - E(R / 16)``: the spectral energy gain over an FP16 pair of equal bits. Where it
            is positive, the binary pair keeps more of the weight.
        coherence: of the latent factors that were binarized.
    """

    error: float
    share: float
    gain: float
    coherence: Coherence


@dataclass(frozen=True)
class SpectralReport:
    """The spectrum of a weight and the error after every stage (LittleBit-2, arXiv 2603.00042).

    Attributes:
        rank: R, the rank of the primary path.
        kept: ``E(R)``, the share of energy (squared singular values) in the top ``R`` directions.
        kept_tiny: ``E(R / 16)``, what an FP16 pair of equal bits would keep.
        truncation_error: ``1 - E(R)``, of the truncated SVD.
        dual_svid: the primary path without rotation.
        random_rotation: with the random rotation that Joint-ITQ starts from.
        joint_itq: with Joint-ITQ.
        path_errors: squared relative Frobenius error after every path of the configured layer.
    """

    rank: int
    kept: float
    kept_tiny: float
    truncation_error: float
    dual_svid: StageReport
    random_rotation: StageReport
    joint_itq: StageReport
    path_errors: tuple[float, ...]


def analyze_weight(weight: torch.Tensor, config: QuantConfig | None = None) -> SpectralReport:
    """Measure the spectrum of a weight and the error of each initialization stage.

    Costs about three quantizations of the layer.

    Args:
        weight: ``[N, K]``, any real floating-point dtype.
        config: as for :func:`.quantize_weight`; ``path_errors`` follow its ``method``.

    Raises:
        TypeError: ``weight`` is not a real floating-point tensor.
        ValueError: ``weight`` is not a non-empty finite matrix, is all zero (it has no spectrum), or
            the budget is too small for its shape.
    """
    config = config if config is not None else QuantConfig()
    check_matrix("weight", weight)
    weight = weight.detach()
    if not bool(weight.any()):
        raise ValueError("weight must not be all zero: it has no spectrum")
    quantized = quantize_weight(weight, config=config)
    rank = quantized.report.ranks[0]
    target = normalized(weight, binary_exponent(weight), config.compute_dtype)
    factors = truncated_factors(target, rank)
    a, b = factors.a, factors.b
    # All that lies past R counts as one direction: neither share looks inside it.
    rest = factors.singular_values.new_tensor([factors.tail_energy]).sqrt()
    spectrum = torch.cat([factors.singular_values[:rank], rest])
    kept = energy_share(spectrum, rank)
    kept_tiny = energy_share(spectrum, tiny_rank(rank))

    def stage(a: torch.Tensor, b: torch.Tensor) -> StageReport:
        left, right = path_factors(dual_svid(a, b), target.dtype)
        error = squared_norm(torch.addmm(target, left, right, alpha=-1)) / squared_norm(target)
        coherence = latent_coherence(a, b)
        return StageReport(error, (1 - error) / kept, 1 - error - kept_tiny, coherence)

    def rotated(iterations: int) -> StageReport:
        generator = torch.Generator().manual_seed(config.seed)
        latent = joint_itq(a, b, iterations, generator=generator)
        return stage(latent.a, latent.b)

    return SpectralReport(
        rank=rank,
        kept=kept,
        kept_tiny=kept_tiny,
        truncation_error=1 - kept,
        dual_svid=stage(a, b),
        random_rotation=rotated(0),
        joint_itq=rotated(config.itq_iterations),
        path_errors=tuple(path.error for path in quantized.report.paths),
    )


def energy_share(singular_values: torch.Tensor, rank: float) -> float:
    """Return ``E(rank)``, the share of squared singular values in the first ``rank`` of them.

    A fraction of a direction counts by the same fraction of its energy.

    Args:
        singular_values: ``[r]``, descending, not all zero.
        rank: at least 0; may exceed ``r``.

    Raises:
        ValueError: ``rank`` is negative, or all singular values are zero.
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    energy = singular_values.double().square()
    total = float(energy.sum())
    if total == 0:
        raise ValueError("singular_values must not all be zero: there is no energy to share")
    whole = int(rank)
    partial = float(energy[whole : whole + 1].sum()) * (rank - whole)
    return (float(energy[:whole].sum()) + partial) / total


def latent_coherence(a: torch.Tensor, b: torch.Tensor) -> Coherence:
    """Measure the :class:`Coherence` of the latent factors ``a`` ``[N, R]`` and ``b`` ``[R, K]``.

    Raises:
        ValueError: both factors are all zero.
    """
    z = torch.cat([a, b.T]).double()
    norms = torch.linalg.vector_norm(z, dim=1)
    energy = float(norms.square().sum())
    if energy == 0:
        raise ValueError("a and b must not both be zero: their rows have no direction")
    root = z.shape[1] ** 0.5
    peaks = root * z.abs().amax(dim=1) * norms
    signs = z.abs().sum(dim=1).square()
    return Coherence(float(peaks.sum()) / energy, float(signs.sum()) / (z.shape[1] * energy))
