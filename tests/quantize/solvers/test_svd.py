"""The truncated factorization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from littlebit2.quantize.solvers.svd import truncated_factors

DTYPES = [torch.float32, torch.float64]


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(40, 40), (24, 70), (70, 24), (1, 9), (9, 1), (1, 1)])
def test_factors_are_the_best_approximation(n: int, k: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    matrix = torch.randn(n, k, generator=rng, dtype=torch.float64).to(dtype)
    rank = min(8, n, k)
    factors = truncated_factors(matrix, rank)
    s = torch.linalg.svdvals(matrix.double())
    assert (factors.a.dtype, factors.b.dtype) == (dtype, dtype)
    # No approximation of this rank has a smaller error than the tail of the spectrum (Eckart-Young).
    error = torch.linalg.vector_norm(matrix.double() - factors.a.double() @ factors.b.double())
    torch.testing.assert_close(error, s[rank:].norm(), rtol=0, atol=1000 * eps(dtype))
    torch.testing.assert_close(factors.singular_values, s, rtol=1e-7, atol=1e-6)
    # The energy is split evenly and the factors stay orthogonal: both Gram matrices are diag(S).
    for gram in (factors.a.T @ factors.a, factors.b @ factors.b.T):
        torch.testing.assert_close(gram.double(), s[:rank].diag(), rtol=0, atol=1000 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_are_fixed(dtype: torch.dtype, rng: torch.Generator) -> None:
    matrix = torch.randn(30, 20, generator=rng, dtype=dtype)
    a = truncated_factors(matrix, 8).a
    assert (a.gather(0, a.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = truncated_factors(-matrix, 8)
    # Negating the matrix must leave the left factor and negate the right one.
    torch.testing.assert_close(flipped.a, a, rtol=0, atol=100 * eps(dtype))
    torch.testing.assert_close(flipped.b, -truncated_factors(matrix, 8).b, rtol=0, atol=100 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_past_the_numerical_rank_are_zero(dtype: torch.dtype, rng: torch.Generator) -> None:
    matrix = (torch.arange(1, 13)[:, None] * torch.arange(1, 8)).to(dtype)  # rank one, exact
    factors = truncated_factors(matrix, 16)
    assert factors.a.shape == (12, 16)
    assert factors.b.shape == (16, 7)
    assert (factors.a[:, 7:] == 0).all()
    assert (factors.b[7:] == 0).all()
    torch.testing.assert_close(factors.a @ factors.b, matrix, rtol=100 * eps(dtype), atol=0)
    assert torch.linalg.vector_norm(factors.a[:, 1:]) < 1e-5 * torch.linalg.vector_norm(factors.a)


def test_zero_matrix_has_zero_factors() -> None:
    for dtype in DTYPES:
        factors = truncated_factors(torch.zeros(5, 9, dtype=dtype), 8)
        assert not factors.a.any()
        assert not factors.b.any()
        assert not factors.singular_values.any()


@given(exponent=st.integers(-60, 60))
def test_scale_of_the_matrix_is_only_a_scale(exponent: int) -> None:
    matrix = torch.randn(10, 14, generator=torch.Generator().manual_seed(3))
    base = truncated_factors(matrix, 4)
    scaled = truncated_factors(matrix * 4.0**exponent, 4)
    torch.testing.assert_close(scaled.a / 2.0**exponent, base.a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.b / 2.0**exponent, base.b, rtol=1e-5, atol=1e-6)


def fail(*args: object, **kwargs: object) -> None:
    raise torch.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize(("dtype", "broken"), [(torch.float32, "eigh"), (torch.float64, "svd")])
def test_each_decomposition_steps_in_for_the_other(
    dtype: torch.dtype, broken: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.randn(20, 30, generator=rng, dtype=dtype)
    expected = truncated_factors(matrix, 8)
    monkeypatch.setattr(torch.linalg, broken, fail)
    actual = truncated_factors(matrix, 8)
    torch.testing.assert_close(actual.a, expected.a, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.b, expected.b, rtol=0, atol=1e-5)


def test_no_convergence_is_an_error_with_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(RuntimeError, match=r"matrix of shape \[4, 5\] could be decomposed neither"):
        truncated_factors(torch.ones(4, 5), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_first_bad_entry_is_named(bad: float) -> None:
    matrix = torch.ones(4, 5)
    matrix[2, 3] = matrix[3, 0] = bad
    with pytest.raises(ValueError, match=rf"matrix must be finite, got {bad} at index \[2, 3\]"):
        truncated_factors(matrix, 2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"matrix must be float32 or float64, got torch\.float16"):
        truncated_factors(torch.ones(2, 2, dtype=torch.float16), 1)
    with pytest.raises(
        TypeError, match=r"matrix must have a real floating-point dtype of 16 bits or more, got torch\.int64"
    ):
        truncated_factors(torch.ones(2, 2, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"matrix must be a torch\.Tensor, got list"):
        truncated_factors([[1.0]], 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix must be a non-empty matrix, got shape \[0, 3\]"):
        truncated_factors(torch.ones(0, 3), 1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        truncated_factors(torch.ones(2, 2), 0)
