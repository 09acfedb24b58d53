"""How many sequences and steps fit a given time, from times measured on the first block and the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from littlebit2.offline.jobs import Job
from littlebit2.train.model import make_trainable

from ..settings import BlockwiseSettings
from .block import BlockRunner, trained_parameters
from .distill import SIGNS_FROM, Distillation, evaluations
from .precision import products
from .tune import relative_error

__all__ = ["MOST", "PER_STEP", "fitting", "fitting_steps", "is_worth_distilling", "seconds_of_blocks"]

#: Steps at least and at most.
LEAST, MOST = 32, 1024
#: Sequences for each step: with fewer, blocks fit the text and not the language, the first ones most.
PER_STEP = 1
#: Share of the time that is planned for; the rest is for what is not measured.
_PLANNED = 0.9
#: The first run of a step is the slowest: its memory comes from the system.
_TRIALS = 2
#: Of the time for everything, what the distillation gets: a step of it brings more than a step of a block.
_DISTILLED = 0.6
#: Share of the time for everything that must be left for a distillation to be worth its preparation.
_WORTH = 0.1
#: Passes over its text that a distillation takes at most.
_PASSES = 4


def seconds_of_blocks(settings: BlockwiseSettings) -> float:
    """Return the part of the time for everything that the blocks get."""
    assert settings.minutes is not None
    rest = _DISTILLED * settings.minutes if settings.distill_minutes is None else settings.distill_minutes
    return 60 * (settings.minutes - rest)


def is_worth_distilling(settings: BlockwiseSettings, spent: float) -> bool:
    """Return whether enough of the time for everything is left after ``spent`` seconds."""
    if settings.minutes is None or settings.distill_minutes is not None:
        return settings.distills
    return 60 * settings.minutes - spent >= _WORTH * 60 * settings.minutes


def fitting_steps(distillation: Distillation, seconds: float) -> int:
    """Return the steps of a distillation that fit the time, from 1 to a few passes over its text.

    Args:
        distillation: which has not begun; its parameters do not change.
        seconds: for all of it, this call included.
    """
    end = time.perf_counter() + _PLANNED * seconds
    size = min(distillation.settings.distill_batch_size, len(distillation.ids))
    parameters = [*distillation.latents, *distillation.scales, *distillation.stored]
    measuring = _timed(distillation.measure, _TRIALS)

    def step() -> None:
        torch.autograd.backward(distillation.loss(range(size)))
        for parameter in parameters:
            parameter.grad = None

    def number_by(steps: int) -> int:
        """Return how many steps fit, each as one of so many."""
        distillation.free(steps)
        one_step = _timed(step, _TRIALS)
        left = end - time.perf_counter()
        return int((left - (evaluations(steps) + 1) * measuring) / one_step)

    few = number_by(SIGNS_FROM - 1)
    # Those that move signs take longer.
    number = few if few < SIGNS_FROM else max(number_by(SIGNS_FROM), SIGNS_FROM - 1)
    return min(max(number, 1), _PASSES * len(distillation.ids) // size)


def fitting(runner: BlockRunner, jobs: Sequence[Job], blocks: int, seconds: float) -> BlockwiseSettings:
    """Return the settings with as many steps of tuning, and as many sequences, as fit the time.

    Args:
        runner: with at least one batch of sequences.
        jobs: layers of the first block.
        blocks: number of blocks.
        seconds: for all of them.
    """
    settings = runner.settings
    rows = runner.samples[: settings.batch_size]
    device = runner.pieces.device
    block = None

    def load() -> None:
        nonlocal block
        block = runner.pieces.load_block(0)

    loading = _timed(load, 1)
    assert block is not None
    call, hidden = runner.call(0, rows), runner.pieces.embed(runner.ids[rows]).to(device)
    target = torch.empty(0)

    def forward() -> None:
        nonlocal target
        with torch.no_grad():
            target = call(block, hidden)

    one_batch = _timed(forward, _TRIALS)
    packed: dict[str, object] = {}
    quantizing = _timed(lambda: packed.update(runner.quantize(block, 0, jobs, {})[0]), 1)
    make_trainable(block, packed)  # type: ignore[arg-type]
    latents, scales = trained_parameters(block)
    for parameter in (*latents, *scales):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([*latents, *scales], lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with products(settings.precision, device):
            error = relative_error(call(block, hidden), target)
        torch.autograd.backward(error)
        optimizer.step()

    one_step = _timed(step, _TRIALS)
    size = len(rows)
    # Outputs of the dense block, those of the quantized one, importance, and comparisons on held-out text.
    passes = (
        2 * settings.held_out + settings.importance_samples + (settings.evaluations + 1) * settings.held_out
    )
    fixed = loading + quantizing + passes * one_batch / size
    if settings.sensitivity:
        # Every block forward, forward again and backward to its inputs.
        fixed += 2 * loading + 4 * settings.sensitivity_samples * one_batch / size
    each = 2 * PER_STEP * one_batch / size + one_step
    number = int((_PLANNED * seconds / blocks - fixed) / each)
    number = min(max(number, LEAST), MOST)
    return replace(settings, samples=PER_STEP * number, steps=number)


def _timed(do: Callable[[], object], times: int) -> float:
    """Return the least seconds of a few runs."""
    least = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        do()
        least = min(least, time.perf_counter() - start)
    return least
