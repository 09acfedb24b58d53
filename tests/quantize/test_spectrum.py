"""The spectral report, and the ranges the papers state for the share that binarization keeps."""

from __future__ import annotations

import math

import pytest
import torch

from littlebit2.quantize import QuantConfig, analyze_weight
from littlebit2.quantize.spectrum import energy_share, latent_coherence


def synthetic(size: int, decay: float, *, coherent: bool) -> torch.Tensor:
    """A square weight with spectrum ``k^-decay``; coherent singular vectors are near the axes."""
    generator = torch.Generator().manual_seed(0)

    def basis() -> torch.Tensor:
        gaussian = torch.randn(size, size, generator=generator)
        if not coherent:
            return torch.linalg.qr(gaussian).Q
        near_identity = torch.linalg.matrix_exp(0.3 * (gaussian - gaussian.T) / size**0.5)
        return near_identity[:, torch.randperm(size, generator=generator)]

    return basis() * torch.arange(1, size + 1) ** -decay @ basis().T


@pytest.mark.parametrize(
    ("decay", "plain", "random", "itq"),
    [(0.3, (0.36, 0.44), (0.42, 0.55), (0.54, 0.68)), (0.6, (0.36, 0.48), (0.42, 0.58), (0.54, 0.72))],
)
def test_shares_lie_where_the_papers_put_them(
    decay: float, plain: tuple[float, float], random: tuple[float, float], itq: tuple[float, float]
) -> None:
    config = QuantConfig(bpw=1.0, paths=1)
    stages = analyze_weight(synthetic(256, decay, coherent=False), config)
    for stage, (low, high) in (
        (stages.dual_svid, plain),
        (stages.random_rotation, random),
        (stages.joint_itq, itq),
    ):
        assert low < stage.share < high


def test_rotation_repairs_coherent_factors() -> None:
    stages = analyze_weight(synthetic(256, 0.3, coherent=True), QuantConfig(bpw=1.0, paths=1))
    before, random, after = stages.dual_svid, stages.random_rotation, stages.joint_itq
    assert before.share < 0.14
    assert 0.42 < random.share < after.share
    assert before.coherence.peak > 2 * after.coherence.peak
    assert before.coherence.alignment < 0.25
    # A random rotation makes the rows Gaussian, whose signs keep 2 / pi of the energy.
    assert random.coherence.alignment == pytest.approx(2 / math.pi, abs=0.02)
    assert after.coherence.alignment > 0.7
    # What the method is for: the binary pair loses to FP16 of equal bits before, and wins after.
    assert before.gain < 0 < random.gain < after.gain


def test_report_is_consistent() -> None:
    weight = synthetic(96, 0.5, coherent=False)
    report = analyze_weight(weight, QuantConfig(ranks=(24, 16), method="joint-itq", itq_iterations=10))
    energy = torch.linalg.svdvals(weight.double()).square()
    assert report.rank == 24
    assert report.kept == pytest.approx(float(energy[:24].sum() / energy.sum()), rel=1e-5)
    assert report.kept_tiny == pytest.approx(float((energy[0] + energy[1] / 2) / energy.sum()), rel=1e-5)
    assert report.truncation_error == pytest.approx(1 - report.kept)
    for stage in (report.dual_svid, report.random_rotation, report.joint_itq):
        assert stage.error > report.truncation_error
        assert stage.share * report.kept == pytest.approx(1 - stage.error)
        assert stage.gain == pytest.approx(stage.share * report.kept - report.kept_tiny)
    # The configured layer begins with the very path of the Joint-ITQ stage.
    assert report.path_errors[0] == pytest.approx(report.joint_itq.error, rel=1e-6)
    assert report.path_errors[1] < report.path_errors[0]


def test_energy_share_counts_fractions_of_a_direction() -> None:
    values = torch.tensor([2.0, 1.0, 1.0])
    assert energy_share(values, 0) == 0
    assert energy_share(values, 0.25) == pytest.approx(1 / 6)
    assert energy_share(values, 1) == pytest.approx(4 / 6)
    assert energy_share(values, 1.5) == pytest.approx(4.5 / 6)
    assert energy_share(values, 7.5) == 1
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        energy_share(values, -1)
    with pytest.raises(ValueError, match="singular_values must not all be zero"):
        energy_share(torch.zeros(3), 1)


def test_coherence_of_flat_and_spiky_rows() -> None:
    flat = latent_coherence(torch.tensor([[1.0, -1.0, 1.0, 1.0]]), torch.full((4, 2), -3.0))
    assert (flat.peak, flat.alignment) == pytest.approx((1, 1))
    spiky = latent_coherence(torch.eye(4), 2 * torch.eye(4))
    assert (spiky.peak, spiky.alignment) == pytest.approx((2, 1 / 4))
    # Rows count by their energy: nine tenths flat, one tenth a spike.
    mixed = latent_coherence(torch.full((1, 4), 1.5), torch.tensor([[1.0], [0.0], [0.0], [0.0]]))
    assert (mixed.peak, mixed.alignment) == pytest.approx((0.9 * 1 + 0.1 * 2, 0.9 * 1 + 0.1 / 4))
    with pytest.raises(ValueError, match="a and b must not both be zero"):
        latent_coherence(torch.zeros(2, 4), torch.zeros(4, 2))


def test_a_zero_weight_has_no_spectrum() -> None:
    with pytest.raises(ValueError, match="weight must not be all zero"):
        analyze_weight(torch.zeros(64, 64), QuantConfig(ranks=(8,)))
