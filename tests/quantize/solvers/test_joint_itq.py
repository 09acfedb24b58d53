"""The polar factor and the latent rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from littlebit2.quantize.solvers.joint_itq import joint_itq, random_rotation
from littlebit2.quantize.solvers.polar import polar_factor

DTYPES = [torch.float32, torch.float64]


def with_condition(size: int, condition: float, rng: torch.Generator) -> torch.Tensor:
    left, right = random_rotation(size, generator=rng), random_rotation(size, generator=rng)
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return left * spectrum @ right


def exact_polar(matrix: torch.Tensor) -> torch.Tensor:
    left, _, right = torch.linalg.svd(matrix.double())
    return left @ right


def orthogonality(matrix: torch.Tensor) -> float:
    gram = matrix.double().T @ matrix.double()
    return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("size", [1, 2, 33, 96])
@pytest.mark.parametrize("method", ["newton", "svd", "auto"])
def test_polar_factor_is_the_procrustes_solution(
    method: str, size: int, condition: float, dtype: torch.dtype, rng: torch.Generator
) -> None:
    matrix = with_condition(size, condition, rng).to(dtype)
    factor = polar_factor(matrix, method)  # type: ignore[arg-type]
    eps = torch.finfo(dtype).eps
    assert factor.dtype == dtype
    assert orthogonality(factor) < 30 * eps
    # The factor's own condition number is that of the matrix.
    error = torch.linalg.vector_norm(factor.double() - exact_polar(matrix)) / size**0.5
    assert error < 20 * condition * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [1, 5, 12])
def test_newton_falls_back_where_the_matrix_is_singular(
    zeros: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    spectrum = torch.ones(12, dtype=torch.float64)
    spectrum[12 - zeros :] = 0
    left, right = random_rotation(12, generator=rng), random_rotation(12, generator=rng)
    matrix = (left * spectrum @ right).to(dtype)
    factor = polar_factor(matrix, "newton")
    eps = torch.finfo(dtype).eps
    assert orthogonality(factor) < 30 * eps
    # Not unique, but trace(Q^T M) must still reach the nuclear norm.
    assert float((factor * matrix).sum(dtype=torch.float64)) == pytest.approx(12 - zeros, abs=100 * eps)


@pytest.mark.parametrize(("dtype", "condition"), [(torch.float32, 1e8), (torch.float64, 1e17)])
def test_newton_falls_back_where_the_matrix_is_too_ill_conditioned(
    dtype: torch.dtype, condition: float, rng: torch.Generator
) -> None:
    matrix = with_condition(24, condition, rng).to(dtype)
    assert torch.equal(polar_factor(matrix, "newton"), polar_factor(matrix, "svd"))


def test_newton_needs_no_svd(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_condition(32, 1e3, rng)
    monkeypatch.delattr(torch.linalg, "svd")
    assert orthogonality(polar_factor(matrix, "newton")) < 1e-13


@pytest.mark.parametrize("method", ["newton", "svd"])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_polar_factor_ignores_the_scale(method: str, exponent: int, rng: torch.Generator) -> None:
    matrix = with_condition(16, 10.0, rng).float()
    scaled = matrix * 2.0**exponent
    assert torch.equal(polar_factor(scaled, method), polar_factor(matrix, method))  # type: ignore[arg-type]


def test_polar_factor_names_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"matrix must be square, got shape \[2, 3\]"):
        polar_factor(torch.ones(2, 3))
    with pytest.raises(ValueError, match="method must be one of auto, newton, svd, got 'qr'"):
        polar_factor(torch.eye(2), "qr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix must be finite, got nan at index \[0, 0\]"):
        polar_factor(torch.full((2, 2), torch.nan))


def test_random_rotation_is_uniform_and_seeded() -> None:
    first = random_rotation(40, generator=torch.Generator().manual_seed(5))
    again = random_rotation(40, generator=torch.Generator().manual_seed(5))
    other = random_rotation(40, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert orthogonality(first) < 1e-13
    # Without the sign fix Householder QR makes the trace's mean clearly negative.
    generator = torch.Generator().manual_seed(0)
    traces = torch.stack([random_rotation(4, generator=generator).trace() for _ in range(2000)])
    assert abs(float(traces.mean())) < 0.1


@settings(max_examples=20)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    rank=st.sampled_from([1, 8, 24]),
    dtype=st.sampled_from(DTYPES),
    polar=st.sampled_from(["newton", "svd"]),
    seed=st.integers(0, 1000),
)
def test_rotation_is_orthogonal_keeps_the_product_and_climbs(
    n: int, k: int, rank: int, dtype: torch.dtype, polar: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, rank, generator=generator, dtype=dtype)
    b = torch.randn(rank, k, generator=generator, dtype=dtype)
    latent = joint_itq(a, b, 10, generator=generator, polar=polar)  # type: ignore[arg-type]
    eps = torch.finfo(dtype).eps
    assert orthogonality(latent.rotation) < 40 * eps
    product = a.double() @ b.double()
    error = torch.linalg.matrix_norm(latent.a.double() @ latent.b.double() - product)
    assert error <= 40 * eps * torch.linalg.matrix_norm(a.double()) * torch.linalg.matrix_norm(b.double())
    assert len(latent.objective) <= 11
    for before, after in zip(latent.objective, latent.objective[1:], strict=False):
        assert after >= before - 20 * eps
    # The last objective is that of the factors handed back.
    z = torch.cat([latent.a, latent.b.T]).double()
    alignment = z.abs().sum() / (torch.linalg.vector_norm(z) * z.numel() ** 0.5)
    assert latent.objective[-1] == pytest.approx(float(alignment), abs=100 * eps)


def test_joint_itq_stops_at_a_fixed_point(rng: torch.Generator) -> None:
    a, b = torch.randn(12, 8, generator=rng), torch.randn(8, 10, generator=rng)
    latent = joint_itq(a, b, 500, generator=rng)
    assert latent.converged
    assert len(latent.objective) < 501
    z = torch.cat([a, b.T])
    again = polar_factor(z.T @ torch.where(z @ latent.rotation < 0, -1.0, 1.0))
    torch.testing.assert_close(again, latent.rotation)


def test_no_iterations_is_the_random_rotation(rng: torch.Generator) -> None:
    a, b = torch.randn(12, 8, generator=rng), torch.randn(8, 10, generator=rng)
    latent = joint_itq(a, b, 0, generator=torch.Generator().manual_seed(1))
    start = random_rotation(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(latent.rotation, start.float())
    assert not latent.converged
    assert len(latent.objective) == 1


def test_joint_itq_of_zero_factors_is_finite() -> None:
    latent = joint_itq(torch.zeros(5, 8), torch.zeros(8, 6), 3)
    assert orthogonality(latent.rotation) < 1e-5
    assert not latent.a.any()
    assert latent.objective[-1] == 0


def test_joint_itq_names_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"b\.size\(0\) must equal a\.size\(1\) = 8, got 4"):
        joint_itq(torch.ones(5, 8), torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"look_ahead must be in \[0, 1\), got 1.0"):
        joint_itq(torch.ones(5, 8), torch.ones(8, 6), look_ahead=1.0)
    with pytest.raises(ValueError, match="iterations must be at least 0, got -1"):
        joint_itq(torch.ones(5, 8), torch.ones(8, 6), -1)
    with pytest.raises(ValueError, match=r"b must be finite, got inf at index \[0, 0\]"):
        joint_itq(torch.ones(5, 8), torch.full((8, 6), torch.inf))


@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
def test_looking_ahead_reaches_in_10_iterations_what_50_plain_ones_reach(
    decay: float, rng: torch.Generator
) -> None:
    left, _, right = torch.linalg.svd(torch.randn(128, 128, generator=rng))
    values = torch.arange(1, 129) ** (-decay / 2)
    a, b = (left * values)[:, :56].contiguous(), (values[:, None] * right)[:56].contiguous()
    plain, ahead = (
        joint_itq(a, b, count, generator=torch.Generator().manual_seed(1), look_ahead=share)
        for count, share in ((50, 0.0), (10, 0.9))
    )
    assert ahead.objective[-1] >= plain.objective[-1] - 2e-4
    assert ahead.objective[0] == plain.objective[0]
