"""The loss, the schedule, and that tuning ends in the best state it measured."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from littlebit2.blockwise.states import States
from littlebit2.blockwise.tuning.tune import Group, relative_error, rounded, schedule, tune

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
        lambda step: (parameter - 5).square().sum(), measure, [Group([parameter], 0.1)], {}, steps=40, **STEPS
    )  # type: ignore[arg-type]
    best = min(measured, key=lambda value: abs(value - 0.3))
    assert parameter.item() == best
    assert tuned.after == pytest.approx(abs(best - 0.3))
    assert tuned.before == pytest.approx(0.3)
    assert tuned.steps < 40  # the patience ended it


def test_a_group_is_trained_from_its_first_step_on() -> None:
    early, late = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    seen: list[tuple[float, float]] = []

    def loss(step: int) -> torch.Tensor:
        seen.append((early.item(), late.item()))
        assert late.requires_grad == (step >= 6)
        return (early - 5).square().sum() + (late - 5).square().sum()

    groups = [Group([early], 0.1), Group([late], 0.1, first=6)]
    told: list[tuple[int, float]] = []
    steps = {"steps": 16, "warmup": 0.2, "evaluations": 4, "patience": 4}
    tune(loss, lambda: -early.item(), groups, {}, **steps, tell=lambda *now: told.append(now))  # type: ignore[arg-type]
    assert all(value == 0 for _, value in seen[:7])
    # Its rate rises from there: over a fifth of the ten steps that are left.
    moved = [now - before for (_, before), (_, now) in pairwise(seen)]
    assert moved[6] == pytest.approx(0.05, rel=1e-3)
    assert moved[7] == pytest.approx(0.1, rel=1e-2)
    assert [done for done, _ in told] == [4, 8, 12, 16]
    assert [error for _, error in told[:3]] == [-seen[done][0] for done in (4, 8, 12)]


def test_states_are_measured_as_they_are_stored() -> None:
    parameter = nn.Parameter(torch.full((1,), 1.001))
    dtypes = {parameter: torch.bfloat16}
    with rounded(dtypes):
        assert parameter.item() == 1.0
    assert parameter.item() == pytest.approx(1.001)
    tuned = tune(
        lambda step: parameter.sum(), parameter.item, [Group([parameter], 0.1)], dtypes, steps=0, **STEPS
    )  # type: ignore[arg-type]
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
