"""Refinement: scales in closed form and sign descent, which never raise the error."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.quantize.solvers.admm import admm
from littlebit2.quantize.solvers.binary_path import BinaryPath
from littlebit2.quantize.solvers.refine import refine
from littlebit2.quantize.solvers.sign_descent import descend
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.reference import dense_weight

DTYPES = [torch.float32, torch.float64]


def random_path(target: torch.Tensor, rank: int, rng: torch.Generator) -> BinaryPath:
    n, k = target.shape
    return BinaryPath.random((n, k), rank, [1.0], [rng], dtype=target.dtype)


def dense(path: BinaryPath) -> torch.Tensor:
    (packed,) = path.packed()
    return dense_weight(PackedLinear((packed,)))


def squared_error(target: torch.Tensor, path: BinaryPath) -> float:
    return float((target.double() - dense(path)).square().sum())


def gaussian(n: int, k: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=rng, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("rank", [8, 40, 72])
def test_descent_gives_every_sign_its_best_value_in_turn(rank: int, rng: torch.Generator) -> None:
    fixed = gaussian(rank, 90, rng, torch.float64)
    wanted, gram = fixed @ gaussian(90, 21, rng, torch.float64), fixed @ fixed.T
    signs = torch.where(gaussian(rank, 21, rng) < 0, -1.0, 1.0).double()
    expected = signs.clone()
    for column, r in itertools.product(range(21), range(rank)):
        s = expected[:, column]
        rest = wanted[r, column] - gram[r] @ s + gram[r, r] * s[r]
        s[r] = -1 if rest < 0 else 1
    descend(signs[None], wanted[None], gram[None])
    assert torch.equal(signs, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(60, 60), (37, 530), (530, 37), (1, 40), (40, 1)])
def test_the_error_never_rises_and_is_the_one_reported(
    n: int, k: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    target = gaussian(n, k, rng, dtype)
    path = random_path(target, 16, rng)
    total = float(target.double().square().sum())
    errors = [squared_error(target, path)]
    for _ in range(6):
        before = errors[-1]
        ((first, second),) = refine(target, path, 1)
        errors.append(squared_error(target, path))
        assert first <= before + 1e-5 * total
        assert second <= first + 1e-5 * total
        assert second == pytest.approx(errors[-1], rel=1e-4, abs=1e-5 * total)
    assert errors[-1] < 0.9 * errors[0]


def test_rounds_end_where_they_gain_nothing(rng: torch.Generator) -> None:
    target = gaussian(24, 24, rng)
    path = random_path(target, 8, rng)
    (errors,) = refine(target, path, 500)
    assert len(errors) < 1000
    at_rest = squared_error(target, path)
    refine(target, path, 3)
    assert squared_error(target, path) == pytest.approx(at_rest, rel=1e-2)


def test_scales_are_least_squares_at_a_fixed_point(rng: torch.Generator) -> None:
    target = gaussian(40, 30, rng, torch.float64)
    path = random_path(target, 8, rng)
    refine(target, path, 400, tolerance=0)
    residual = target - dense(path)
    # Orthogonal to what each scale multiplies: no scale has a better value.
    left = path.left.dense(slice(0, 40), torch.ones(1, 8, dtype=torch.float64))[0]
    right, latent = path.right.dense(slice(0, 30), path.latent)[0], path.latent[0]
    assert float(((left / path.left.scale).T @ right * residual).sum(1).abs().max()) < 1e-4
    for r in range(8):
        direction = torch.outer(left[r], right[r] / latent[r])
        assert abs(float((residual * direction).sum())) < 1e-4 * float(direction.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_planted_factorization_is_found(dtype: torch.dtype, rng: torch.Generator) -> None:
    target = gaussian(120, 100, rng, dtype)
    planted = random_path(target, 8, rng)
    for vector in (planted.left.scale, planted.right.scale, planted.latent):
        vector.copy_(torch.rand(vector.shape, generator=rng) + 0.5)
    target = dense(planted).to(dtype)
    path = random_path(target, 8, rng)
    admm(target, path, 60)
    refine(target, path, 20)
    assert squared_error(target, path) < 1e-6 * float(target.double().square().sum())


def test_zero_targets_and_dead_parts_stay_finite(rng: torch.Generator) -> None:
    zero = torch.zeros(20, 33)
    for improve in (lambda t, p: admm(t, p, 5), lambda t, p: refine(t, p, 3)):
        path = random_path(zero, 8, rng)
        improve(zero, path)
        assert torch.isfinite(dense(path)).all()
    refine(zero, path, 2)
    assert not dense(path).any()
    partly = gaussian(20, 33, rng)
    partly[3], partly[:, 7] = 0, 0
    path = random_path(partly, 8, rng)
    path.latent[0, 2] = 0  # a latent that died must not bring NaN
    refine(partly, path, 4)
    weight = dense(path)
    assert torch.isfinite(weight).all()
    assert not weight[3].any()
    assert not weight[:, 7].any()


@settings(max_examples=25)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 60),
    exponent=st.sampled_from([-100, -1, 0, 3, 100]),
    outlier=st.sampled_from([0.0, 1e4]),
    method=st.sampled_from(["refine", "admm"]),
    seed=st.integers(0, 1000),
)
def test_methods_on_odd_shapes_scales_and_outliers(
    n: int, k: int, exponent: int, outlier: float, method: str, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=rng)
    weight[n // 2, k // 2] += outlier
    config = QuantConfig(ranks=(16,), method=method, admm_iterations=12)  # type: ignore[arg-type]
    report = quantize_weight(weight * 2.0**exponent, config=config).report
    # A power of two is taken out first, exactly: the same signs, the same error.
    assert report.error == pytest.approx(quantize_weight(weight, config=config).report.error, rel=1e-5)
    assert 0 <= report.error < 1


@pytest.mark.parametrize("method", ["refine", "admm"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 160)])
def test_transposing_the_weight_changes_next_to_nothing(
    method: str, shape: tuple[int, int], rng: torch.Generator
) -> None:
    weight = gaussian(*shape, rng)
    config = QuantConfig(ranks=(32,), method=method)  # type: ignore[arg-type]
    errors = [quantize_weight(w, config=config).report.error for w in (weight, weight.T.contiguous())]
    # Which side goes first differs, and with it the local optimum.
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
def test_each_method_ends_below_the_one_before(decay: float, rng: torch.Generator) -> None:
    left, _, right = torch.linalg.svd(gaussian(160, 128, rng), full_matrices=False)
    weight = left * torch.arange(1, 129) ** -decay @ right
    dual, itq, refined, factorized = (
        quantize_weight(weight, config=QuantConfig(ranks=(56,), method=method)).report.error  # type: ignore[arg-type]
        for method in ("dual-svid", "joint-itq", "refine", "admm")
    )
    assert factorized < 0.97 * refined < 0.95 * itq < 0.93 * dual


def test_paths_are_refined_against_each_other(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(64, 80, rng)
    config = QuantConfig(ranks=(16, 16), method="refine")
    together = quantize_weight(weight, config=config).report
    monkeypatch.setattr("littlebit2.quantize.quantizer.improve_paths", lambda *_: None)
    alone = quantize_weight(weight, config=config).report
    assert together.error < alone.error
    # The first path gives up some of its own error for the sum.
    assert together.paths[0].error > together.paths[1].error
