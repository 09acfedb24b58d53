"""Side-by-side timing: every candidate in every repetition, in rotating order.

A candidate is a call, or a list of calls on distinct copies of its weights that are used in turn. With one
copy the weights are *hot*; with more copies than the caches hold they are *cold*. Ratios are formed within a
repetition, where candidates ran close together, and summarized by their median and quartiles.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "Call",
    "CpuTimer",
    "Setup",
    "Spread",
    "Timer",
    "Timing",
    "Turn",
    "UnitTimer",
    "spread_of",
    "time_interleaved",
]

Call = Callable[[], object]
Setup = Callable[[], object]
#: Runs one candidate for a while; returns seconds per call.
Turn = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over repetitions."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles of ``values``.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over repetitions.

    Attributes:
        samples: one value per repetition, in order, so that repetitions of several candidates pair up.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of one call."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> Spread:
        """Median and quartiles of the seconds of one call."""
        return spread_of(self.samples)

    def ratios_over(self, other: Timing) -> tuple[float, ...]:
        """How many times faster than ``other``, one ratio per repetition.

        Raises:
            ValueError: the numbers of repetitions differ.
        """
        return tuple(b / a for a, b in zip(self.samples, other.samples, strict=True))

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than ``other``: the median of the ratios within each repetition."""
        return statistics.median(self.ratios_over(other))

    def speedup_spread(self, other: Timing) -> Spread:
        """Median and quartiles of the ratios within each repetition."""
        return spread_of(self.ratios_over(other))


class Timer(Protocol):
    """Makes turns of candidates; there is one kind per kind of device."""

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        """Warm a candidate up and return what times one turn of it.

        Args:
            runs: one call per copy of the weights; used in order, and over again.
            seconds: least duration of a turn; short calls are repeated to fill it.
            cold: whether a call should find its weights outside the caches.
            setup: run at the start of every turn, untimed.
        """
        ...


class UnitTimer:
    """For dry runs: every call runs once, and takes a microsecond."""

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        """See :class:`Timer`."""
        if setup is not None:
            setup()
        for run in runs:
            run()
        return lambda: 1e-6


class CpuTimer:
    """Times by the clock, with the calls of a turn back to back.

    A turn of several calls begins with an untimed one: it brings the code, worker threads and, where the
    weights are hot, the weights back after the other candidates' turns.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        """See :class:`Timer`; ``cold`` needs nothing beyond enough copies in ``runs``."""
        # The cycle goes on where the last turn stopped, so a copy is next used after all the others.
        rotation = itertools.cycle(runs)

        def elapsed(calls: int) -> float:
            start = self._clock()
            for run in itertools.islice(rotation, calls):
                run()
            return self._clock() - start

        if setup is not None:
            setup()
        estimate = elapsed(1)
        # What first use costs must not pass for the cost of a call, unless calls are long anyway.
        if estimate < 10 * seconds:
            estimate = elapsed(1)
        calls = max(1, math.ceil(seconds / max(estimate, 1e-7)))

        def turn() -> float:
            if setup is not None:
                setup()
            if calls > 1:
                elapsed(1)
            return elapsed(calls) / calls

        return turn


def time_interleaved(
    candidates: Mapping[str, Call | Sequence[Call]],
    *,
    repetitions: int = 11,
    seconds: float = 0.02,
    cold: bool = False,
    timer: Timer | None = None,
    setups: Mapping[str, Setup] | None = None,
) -> dict[str, Timing]:
    """Time the candidates against each other.

    Args:
        candidates: by name, a call or a list of calls on distinct copies that are used in turn.
        repetitions: rounds; in each, every candidate has one turn, in an order that rotates.
        seconds: least duration of one candidate's turn; short calls are repeated to fill it.
        cold: whether calls should find their weights outside the caches; the caller gives enough copies.
        timer: what measures, by default a :class:`CpuTimer`.
        setups: by name, what a candidate needs before its turn (a number of threads), untimed.

    Returns:
        Seconds per call of each candidate.

    Raises:
        ValueError: ``repetitions`` is below 1, or a candidate has no call.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    timer = CpuTimer() if timer is None else timer
    setups = setups or {}
    turns: dict[str, Turn] = {}
    for name, given in candidates.items():
        runs = [given] if callable(given) else list(given)
        if not runs:
            raise ValueError(f"candidates[{name!r}] must hold at least one call, got none")
        turns[name] = timer.prepare(runs, seconds=seconds, cold=cold, setup=setups.get(name))
    names = list(turns)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        shift = repetition % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            samples[name].append(turns[name]())
    return {name: Timing(tuple(values)) for name, values in samples.items()}
