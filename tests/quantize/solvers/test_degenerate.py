"""Weights whose least-squares systems are singular: finite results, errors that never rise and are true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.quantize.solvers.admm import admm
from littlebit2.quantize.solvers.binary_path import BinaryPath
from littlebit2.quantize.solvers.dual_svid import dual_svid
from littlebit2.quantize.solvers.joint_itq import joint_itq
from littlebit2.quantize.solvers.refine import refine
from littlebit2.quantize.solvers.svd import truncated_factors
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.reference import dense_weight

Make = Callable[[int, int, torch.Generator], torch.Tensor]


def _gaussian(n: int, k: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=rng, dtype=torch.float64)


def _holes(n: int, k: int, rng: torch.Generator) -> torch.Tensor:
    weight = _gaussian(n, k, rng)
    weight[::2], weight[:, 1::3] = 0, 0
    return weight


def _spike(n: int, k: int, rng: torch.Generator) -> torch.Tensor:
    del rng
    weight = torch.zeros(n, k, dtype=torch.float64)
    weight[n // 2, k // 3] = 1
    return weight


def _outlier(n: int, k: int, rng: torch.Generator) -> torch.Tensor:
    weight = 1e-4 * _gaussian(n, k, rng)
    weight[0, 0] = 1.5
    return weight


KINDS: dict[str, Make] = {
    "gaussian": _gaussian,
    "one value": lambda n, k, _: torch.full((n, k), 0.7, dtype=torch.float64),
    "signs": lambda n, k, rng: _gaussian(n, k, rng).sign(),
    "equal rows": lambda n, k, rng: _gaussian(1, k, rng).repeat(n, 1),
    "equal columns": lambda n, k, rng: _gaussian(n, 1, rng).repeat(1, k),
    "zero": lambda n, k, _: torch.zeros(n, k, dtype=torch.float64),
    "zero channels": _holes,
    "spike": _spike,
    "outlier": _outlier,
}
SHAPES = [(1, 1), (1, 40), (40, 1), (2, 3), (5, 60), (60, 5), (1, 700), (700, 1), (24, 24)]
RANKS = [8, 16, 72]


def _squared_error(target: torch.Tensor, path: BinaryPath) -> float:
    (packed,) = path.packed()
    return float((target.double() - dense_weight(PackedLinear((packed,)))).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_refinement_never_raises_the_error_and_reports_it(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator
) -> None:
    target = KINDS[kind](*shape, rng).to(dtype)
    total = float(target.double().square().sum())
    for rank in RANKS:
        path = BinaryPath.random(shape, rank, [1.0], [rng], dtype=dtype)
        before = _squared_error(target, path)
        # The random start may hold more energy than the target: the first sums are then of that size.
        slack = 1e-5 * max(total, before)
        for _ in range(4):
            ((first, second),) = refine(target, path, 1)
            after = _squared_error(target, path)
            assert first <= before + slack
            assert second <= first + slack
            assert after <= before + slack
            assert second == pytest.approx(after, rel=1e-4, abs=slack)
            before, slack = after, 1e-5 * total


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_after_admm_never_raises_the_error(kind: str, rng: torch.Generator) -> None:
    for shape in SHAPES:
        target = KINDS[kind](*shape, rng).float()
        total = float(target.double().square().sum())
        path = BinaryPath.random(shape, 16, [1.0], [rng])
        admm(target, path, 6)
        before = _squared_error(target, path)
        assert before < float("inf")
        refine(target, path, 3)
        assert _squared_error(target, path) <= before + 1e-5 * max(total, before)


@pytest.mark.parametrize("turn", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
@pytest.mark.parametrize("method", ["dual-svid", "joint-itq", "refine", "admm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_finite_and_reports_the_true_error(
    kind: str, method: str, turn: int, rng: torch.Generator
) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    start = list(KINDS).index(kind) + turn
    for index, shape in enumerate(SHAPES):
        dtype = dtypes[(start + index) % len(dtypes)]
        weight = KINDS[kind](*shape, rng).to(dtype)
        config = QuantConfig(ranks=(16, 8), method=method, admm_iterations=6, itq_iterations=3)  # type: ignore[arg-type]
        layer = quantize_weight(weight, config=config)
        dense = dense_weight(layer.packed)  # of finite scales: the container checks them
        total = float(weight.double().square().sum())
        error = float((weight.double() - dense).square().sum()) / (total or 1)
        assert layer.report.error == pytest.approx(error, rel=1e-4, abs=1e-5)
        assert layer.report.error <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_decomposition_rotation_and_signs_of_degenerate_factors(
    kind: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    for shape in SHAPES:
        weight = KINDS[kind](*shape, rng).to(dtype)
        total = float(weight.double().square().sum())
        for rank in RANKS:
            factors = truncated_factors(weight, rank)
            left = float((weight - factors.a @ factors.b).double().square().sum())
            assert left == pytest.approx(factors.tail_energy, rel=1e-3, abs=1e-5 * total)
            latent = joint_itq(factors.a, factors.b, 3, generator=rng)
            assert torch.allclose(latent.a @ latent.b, factors.a @ factors.b, atol=1e-4)
            size = torch.eye(rank, dtype=dtype)
            assert torch.allclose(latent.rotation.T @ latent.rotation, size, atol=1e-4)
            assert all(0 <= value <= 1 + 1e-6 for value in latent.objective)
            path = dual_svid(latent.a, latent.b)
            assert torch.isfinite(dense_weight(PackedLinear((path,)))).all()


@pytest.mark.parametrize("kind", ["one value", "zero", "equal rows", "equal columns", "spike"])
@pytest.mark.parametrize("shape", [(530, 560), (600, 1100)])
def test_the_partial_decomposition_of_a_weight_of_low_rank(
    kind: str, shape: tuple[int, int], rng: torch.Generator
) -> None:
    weight = KINDS[kind](*shape, rng).float()
    total = float(weight.double().square().sum())
    factors = truncated_factors(weight, 16)
    left = float((weight - factors.a @ factors.b).double().square().sum())
    assert left <= 1e-5 * total
    assert 0 <= factors.tail_energy <= 1e-5 * total
