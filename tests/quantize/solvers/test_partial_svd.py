"""The factorization of large matrices: as good as the whole one, in little memory."""

from __future__ import annotations

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.quantize.solvers.partial_svd import is_partial
from littlebit2.quantize.solvers.svd import truncated_factors

N, K, R = 560, 640, 120


def with_decay(decay: float, rng: torch.Generator) -> torch.Tensor:
    """A matrix ``[N, K]`` of spectrum ``k^-decay``; for 0 a Gaussian one, as flat as real ones get."""
    gaussian = torch.randn(N, K, generator=rng)
    if not decay:
        return gaussian
    left, _, right = torch.linalg.svd(gaussian, full_matrices=False)
    return left * torch.arange(1, N + 1) ** -decay @ right


def test_rule() -> None:
    assert is_partial(4096, 4096, 1000, torch.float32)
    assert not is_partial(4096, 4096, 1000, torch.float64)
    assert not is_partial(512, 16384, 8, torch.float32)  # small
    assert not is_partial(1024, 1024, 600, torch.float32)  # much of it is wanted
    assert is_partial(N, K, R, torch.float32)


@pytest.mark.parametrize("decay", [0, 0.3, 0.6, 1.0])
def test_nothing_is_lost(decay: float, rng: torch.Generator) -> None:
    matrix = with_decay(decay, rng)
    factors = truncated_factors(matrix, R)
    s = torch.linalg.svdvals(matrix.double())
    best, total = float(s[R:].square().sum()), float(s.square().sum())
    product = factors.a.double() @ factors.b.double()
    left = float((matrix.double() - product).square().sum())
    assert left <= best * 1.01
    assert left - best <= 5e-4 * total
    assert factors.tail_energy == pytest.approx(left, rel=1e-2)
    for gram in (factors.a.T @ factors.a, factors.b @ factors.b.T):
        torch.testing.assert_close(
            gram / s[0], (factors.singular_values / s[0]).diag().float(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("decay", [0, 0.6])
def test_quantized_as_well_as_from_the_whole(
    decay: float, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = with_decay(decay, rng)
    # Without rotation, whose local optima would differ.
    config = QuantConfig(ranks=(R, R), method="dual-svid")
    lean = quantize_weight(matrix, config=config).report.error
    monkeypatch.setattr("littlebit2.quantize.solvers.svd.is_partial", lambda *_: False)
    assert lean == pytest.approx(quantize_weight(matrix, config=config).report.error, rel=5e-3)


def test_tall_strided_and_repeated(rng: torch.Generator) -> None:
    matrix = with_decay(0.3, rng)
    wide = truncated_factors(matrix, R)
    again, tall = truncated_factors(matrix.clone(), R), truncated_factors(matrix.T, R)
    assert torch.equal(wide.a, again.a)
    assert torch.equal(wide.b, again.b)
    torch.testing.assert_close(tall.a @ tall.b, (wide.a @ wide.b).T, rtol=0, atol=1e-5)


def test_less_rank_than_asked_for(rng: torch.Generator) -> None:
    zero = truncated_factors(torch.zeros(N, K), 8)
    assert not zero.a.any()
    assert not zero.b.any()
    for true_rank in (1, 5):
        matrix = torch.randn(N, true_rank, generator=rng) @ torch.randn(true_rank, K, generator=rng)
        factors = truncated_factors(matrix, 16)
        assert (factors.a[:, true_rank:] == 0).all()
        assert (factors.b[true_rank:] == 0).all()
        torch.testing.assert_close(factors.a @ factors.b, matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize("exponent", [-126, -61, 61, 116])
def test_scale_is_only_a_scale(exponent: int, rng: torch.Generator) -> None:
    matrix = with_decay(0.3, rng)
    matrix /= matrix.abs().max()
    base = truncated_factors(matrix, 8)
    scaled = truncated_factors(matrix * 2.0**exponent, 8)
    product = scaled.a.double() @ scaled.b.double() / 2.0**exponent
    torch.testing.assert_close(product, base.a.double() @ base.b.double(), rtol=0, atol=1e-4)
