"""Methods by name, and the one that ``"auto"`` takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.quantize.memory import working_bytes
from littlebit2.quantize.quantizer import DenseLayer, quantize_together


def steps(shape: tuple[int, int], rank: int, **options: object) -> tuple[str, int, int]:
    found = QuantConfig(ranks=(rank,), **options).steps_for(shape[1], shape[0], (rank,))  # type: ignore[arg-type]
    return found.method, found.admm_iterations, found.refine_rounds


def test_named_methods_are_taken_as_they_are() -> None:
    assert steps((64, 64), 8, method="dual-svid") == ("dual-svid", 0, 0)
    assert steps((64, 64), 8, method="joint-itq") == ("joint-itq", 0, 0)
    assert steps((64, 64), 8, method="refine", refine_rounds=7) == ("refine", 0, 7)
    assert steps((64, 64), 8, method="admm", budget_seconds=1e-9) == ("admm", 300, 12)


def test_auto_does_what_its_budget_allows() -> None:
    assert steps((64, 64), 8) == ("admm", 300, 12)
    assert steps((64, 64), 8, admm_iterations=3) == ("admm", 3, 12)
    # On 4096 x 4096 at rank 1000, an iteration is about 1e11 operations (2 s of budget), a round 1.5e11.
    method, iterations, rounds = steps((4096, 4096), 1000, budget_seconds=100)
    assert (method, rounds) == ("admm", 8)
    assert 30 < iterations < 40
    method, iterations, rounds = steps((4096, 4096), 1000, budget_seconds=20)
    assert (method, rounds) == ("admm", 2)
    assert 5 < iterations < 10
    # Less than this no method that is as good can be had for.
    assert steps((4096, 4096), 1000, budget_seconds=1e-9) == ("admm", 5, 2)


def test_the_least_that_auto_does_ends_below_joint_itq(rng: torch.Generator) -> None:
    weight = torch.randn(192, 160, generator=rng)
    least, rotated = (
        quantize_weight(weight, config=QuantConfig(ranks=(64,), **options)).report  # type: ignore[arg-type]
        for options in ({"budget_seconds": 1e-9}, {"method": "joint-itq", "itq_iterations": 50})
    )
    assert least.method == "admm"
    assert least.error < 0.97 * rotated.error


@pytest.mark.parametrize("method", ["dual-svid", "joint-itq", "refine", "admm"])
def test_reports_name_the_method(method: str, rng: torch.Generator) -> None:
    weight = torch.randn(24, 40, generator=rng)
    config = QuantConfig(ranks=(8,), method=method, admm_iterations=4)  # type: ignore[arg-type]
    assert quantize_weight(weight, config=config).report.method == method
    assert quantize_weight(weight, config=QuantConfig(ranks=(8,), admm_iterations=4)).report.method == "admm"


@pytest.mark.parametrize("start", ["random", "joint-itq"])
def test_both_starts_of_admm_end_alike(start: str, rng: torch.Generator) -> None:
    weight = torch.randn(96, 96, generator=rng)
    config = QuantConfig(ranks=(40,), method="admm")
    steps = replace(config.steps_for(96, 96, (40,)), start=start)
    (layer,) = quantize_together([DenseLayer(weight.clone, config, steps=steps)])
    report = layer.report
    assert 0.30 < report.error < 0.42
    (path,) = report.paths
    assert (path.truncation_error is None) == (start == "random")
    assert bool(path.itq_objective) == (start == "joint-itq")


def test_working_memory_is_stated_by_method() -> None:
    layer = 4 * 4096**2

    def layers(**options: object) -> float:
        return working_bytes(4096, 4096, QuantConfig(**options)) / layer  # type: ignore[arg-type]

    assert layers(ranks=(80, 80), method="joint-itq") == pytest.approx(1.5, abs=0.1)  # its source beside it
    assert 1.6 < layers(ranks=(1000, 1000), method="joint-itq") < 2
    assert layers(ranks=(2024,)) == pytest.approx(1.95, abs=0.1)  # with a float32 source
    assert layers(ranks=(1000,)) < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qat"}, "method must be one of auto, admm, refine, joint-itq, dual-svid, got 'qat'"),
        ({"admm_iterations": 0}, "admm_iterations must be an integer between 1 and"),
        ({"refine_rounds": 0}, "refine_rounds must be an integer between 1 and"),
        ({"budget_seconds": -1}, "budget_seconds must be a finite positive number, got -1"),
    ],
)
def test_bad_choices_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**arguments)  # type: ignore[arg-type]
