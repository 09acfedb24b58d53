"""Random problems against the float64 reference, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels import littlebit_linear
from littlebit2_kernels._native import core
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import (
    TOLERANCE,
    make_problem,
    max_allowed_error,
    relative_error,
    typical_norm,
)
from tests.harness.sweeps import cases
from tests.problems import random_problem


@cases(300, sample=100)
def test_forward_is_as_exact_as_torch(case: int, isa: str, rng: torch.Generator) -> None:
    x, packed = random_problem(rng)
    y = littlebit_linear(x, packed, "cpu")
    truth = linear_reference(x, packed)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], packed.out_features)
    error = relative_error(y, truth, typical_norm(x, packed))
    assert error <= max_allowed_error(x, packed, truth), f"x {tuple(x.shape)}, {packed}"


@cases(60, sample=20)
def test_backward_is_as_exact_as_torch(case: int, isa: str, rng: torch.Generator) -> None:
    x, packed = random_problem(rng)
    x = x.detach().requires_grad_()
    grad = torch.randn(*x.shape[:-1], packed.out_features, generator=rng).to(x.dtype)
    littlebit_linear(x, packed, "cpu").backward(grad)
    truth = grad.double() @ dense_weight(packed)
    assert x.grad is not None
    assert x.grad.dtype == x.dtype
    error = relative_error(x.grad, truth, typical_norm(grad, packed, backward=True))
    assert error <= TOLERANCE[x.dtype], f"x {tuple(x.shape)}, {packed}"


@cases(40, sample=20)
def test_instruction_sets_agree_to_the_bit(case: int, every_isa: list[str], rng: torch.Generator) -> None:
    x, packed = random_problem(rng)
    results = []
    for name in every_isa:
        core().set_cpu_isa(name)
        results.append(littlebit_linear(x, packed, "cpu"))
    for name, result in zip(every_isa, results, strict=True):
        assert torch.equal(result, results[0]), f"{name} differs from {every_isa[0]}"


@pytest.mark.parametrize("ranks", [None, [1024], [512, 520]], ids=str)
def test_large_layers(ranks: list[int] | None, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(40, 5000, 3001, ranks, outliers=20, generator=rng)
    assert relative_error(littlebit_linear(x, packed, "cpu"), linear_reference(x, packed)) <= 2e-6


def test_many_tokens(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(1003, 96, 80, [24, 16], bias=True, generator=rng)
    assert relative_error(littlebit_linear(x, packed, "cpu"), linear_reference(x, packed)) <= 2e-6
