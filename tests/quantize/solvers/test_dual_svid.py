"""Binarization of a factor pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from littlebit2.quantize.solvers.dual_svid import dual_svid, path_factors, rank_one, scale_path
from littlebit2_kernels.format import PackedPath
from littlebit2_kernels.packing import pack_signs, unpack_signs
from littlebit2_kernels.reference import dense_weight


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, -1.0, 1.0).double()


def best_rank_one(matrix: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return s[0] * torch.outer(u[:, 0], vh[0])


def explicit_weight(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dual-SVID by its definition, in float64."""
    return (sign(a) * best_rank_one(a.abs())) @ (sign(b) * best_rank_one(b.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "rank", "k"), [(40, 16, 50), (7, 8, 33), (1, 8, 64), (64, 8, 1), (1, 8, 1)])
def test_weight_is_the_explicit_formula(
    n: int, rank: int, k: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    a = torch.randn(n, rank, generator=rng, dtype=dtype)
    b = torch.randn(rank, k, generator=rng, dtype=dtype)
    a[0, 0] = b[0, 0] = 0.0
    path = dual_svid(a, b)
    expected = explicit_weight(a, b)
    torch.testing.assert_close(dense_weight(path), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(unpack_signs(path.u, rank, torch.float64), sign(a))
    assert torch.equal(unpack_signs(path.v, k, torch.float64), sign(b))
    left, right = path_factors(path, torch.float64)
    torch.testing.assert_close(left @ right, dense_weight(path), rtol=1e-13, atol=1e-13)


def test_outer_scales_have_unit_size(rng: torch.Generator) -> None:
    path = dual_svid(1e-3 * torch.randn(40, 16, generator=rng), 50 * torch.randn(16, 30, generator=rng))
    for scale in (path.in_scale, path.out_scale):
        assert float(scale.square().mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("of_a", "of_b"), [(1e-20, 1e-20), (1e20, 1e20), (1e-30, 1e30), (1e-20, 1.0), (1e20, 1.0)]
)
def test_extreme_magnitudes_keep_their_accuracy(of_a: float, of_b: float, rng: torch.Generator) -> None:
    a, b = of_a * torch.randn(24, 8, generator=rng), of_b * torch.randn(8, 40, generator=rng)
    expected = explicit_weight(a, b)
    torch.testing.assert_close(
        dense_weight(dual_svid(a, b)), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_zero_rows_columns_and_directions_are_exact(rng: torch.Generator) -> None:
    a, b = torch.randn(24, 16, generator=rng), torch.randn(16, 40, generator=rng)
    a[3], b[:, 5], a[:, 7], b[9] = 0, 0, 0, 0
    path = dual_svid(a, b)
    assert path.latent_scale is not None
    assert path.out_scale[3] == path.in_scale[5] == path.latent_scale[7] == path.latent_scale[9] == 0
    assert int((path.out_scale == 0).sum()) == int((path.in_scale == 0).sum()) == 1
    expected = explicit_weight(a, b)
    torch.testing.assert_close(dense_weight(path), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_zero_factor_gives_a_zero_path(rng: torch.Generator) -> None:
    path = dual_svid(torch.zeros(6, 8), torch.randn(8, 9, generator=rng))
    assert not dense_weight(path).any()


@given(rows=st.integers(1, 30), cols=st.integers(1, 30), power=st.floats(0.1, 6), seed=st.integers(0, 999))
def test_rank_one_is_the_best(rows: int, cols: int, power: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(rows, cols, generator=generator, dtype=torch.float64) ** power
    left, right = rank_one(matrix)
    assert (left >= 0).all()
    assert (right >= 0).all()
    assert float(torch.linalg.vector_norm(right)) == pytest.approx(1)
    best = torch.linalg.svdvals(matrix)[0]
    # The energy kept is what "best" means; the vectors themselves are ill-defined where values are close.
    assert float(torch.linalg.vector_norm(left)) == pytest.approx(float(best), rel=1e-6)


def test_rank_one_of_a_matrix_of_blocks_finds_the_stronger() -> None:
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:3, :3], matrix[3:, 3:] = 1.0, 0.9
    left, right = rank_one(matrix)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    expected[:3, :3] = 1.0
    torch.testing.assert_close(torch.outer(left, right), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [-130, -70, -1, 0, 1, 70, 130])
def test_scale_path_is_exact(exponent: int, rng: torch.Generator) -> None:
    path = dual_svid(torch.randn(16, 8, generator=rng), torch.randn(8, 16, generator=rng))
    scaled = scale_path(path, exponent)
    assert torch.equal(dense_weight(scaled), dense_weight(path) * 2.0**exponent)
    assert scaled.u is path.u
    assert scaled.v is path.v


def test_bad_arguments_are_named(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"b\.size\(0\) must equal a\.size\(1\) = 8, got 16"):
        dual_svid(torch.ones(4, 8), torch.ones(16, 4))
    with pytest.raises(ValueError, match=r"a must be finite, got nan at index \[0, 0\]"):
        dual_svid(torch.full((4, 8), torch.nan), torch.ones(8, 4))
    single = PackedPath(pack_signs(torch.ones(4, 5)), torch.ones(5), torch.ones(4))
    with pytest.raises(ValueError, match="path must have two stages"):
        scale_path(single, 1)
    with pytest.raises(ValueError, match="path must have two stages"):
        path_factors(single, torch.float32)
