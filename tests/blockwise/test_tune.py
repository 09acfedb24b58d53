"""The loss, the schedule, and that tuning ends in the best state it measured."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from littlebit2.blockwise.states import States
from littlebit2.blockwise.tuning.tune import relative_error, rounded, schedule, tune

STEPS = {"warmup": 0.1, "evaluations": 4, "patience": 2}


def test_every_token_counts_alike(rng: torch.Generator) -> None:
    target = torch.randn(2, 3, 8, generator=rng)
    target[0, 0] *= 1e4  # a massive activation
    output = target * 1.1
    assert float(relative_error(output, target)) == pytest.approx(0.01, rel=1e-4)


def test_channels_are_weighted(rng: torch.Generator) -> None:
    target, error = torch.randn(2, 3, 8, generator=rng), torch.randn(2, 3, 8, generator=rng)
    weights = torch.rand(8, generator=rng)
    expected = (torch.einsum("btd,btd,d->bt", error, error, weights) / target.square().sum(-1)).mean()
    assert float(relative_error(target + error, target, weights)) == pytest.approx(float(expected), rel=1e-4)


def test_schedule_rises_and_falls() -> None:
    factors = [schedule(step, 20, 0.25) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in pairwise(factors[5:]))
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 14 / 15)))


def test_best_measured_state_is_kept() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    measured = []

    def measure() -> float:
        measured.append(parameter.item())
        return abs(measured[-1] - 0.3)

    # The loss pulls past the best place.
    tuned = tune(
        lambda step: (parameter - 5).square().sum(), measure, [([parameter], 0.1)], {}, steps=40, **STEPS
    )  # type: ignore[arg-type]
    best = min(measured, key=lambda value: abs(value - 0.3))
    assert parameter.item() == best
    assert tuned.after == pytest.approx(abs(best - 0.3))
    assert tuned.before == pytest.approx(0.3)
    assert tuned.steps < 40  # the patience ended it


def test_measurements_are_told() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    told: list[tuple[int, float]] = []
    tune(
        lambda step: (parameter - 5).square().sum(),
        lambda: -parameter.item(),
        [([parameter], 0.1)],
        {},
        **{**STEPS, "steps": 16, "evaluations": 4},  # type: ignore[arg-type]
        tell=lambda *now: told.append(now),
    )
    assert [done for done, _ in told] == [4, 8, 12, 16]
    assert told[-1][1] == -parameter.item() < told[0][1] < 0


def test_states_are_measured_as_they_are_stored() -> None:
    parameter = nn.Parameter(torch.full((1,), 1.001))
    dtypes = {parameter: torch.bfloat16}
    with rounded(dtypes):
        assert parameter.item() == 1.0
    assert parameter.item() == pytest.approx(1.001)
    tuned = tune(lambda step: parameter.sum(), parameter.item, [([parameter], 0.1)], dtypes, steps=0, **STEPS)  # type: ignore[arg-type]
    assert tuned.before == tuned.after == parameter.item() == 1.0


def test_hidden_states_on_disk(tmp_path: Path, rng: torch.Generator) -> None:
    values = torch.randn(5, 3, 4, generator=rng)
    path = tmp_path / "a.states"
    states = States(path, (5, 3, 4), create=True)
    states.write([0, 2], values[[0, 2]])
    assert not path.exists()
    states.write([1, 3, 4], values[[1, 3, 4]])
    states.finish()
    assert path.stat().st_size == values.numel() * 4
    assert torch.equal(States(path, (5, 3, 4)).read([3, 1]), values[[3, 1]])
