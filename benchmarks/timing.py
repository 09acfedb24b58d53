"""Side-by-side timing: every candidate in every repetition, in rotating order."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Timing", "time_interleaved"]


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

    def speedup_over(self, other: Timing) -> float:
        """How many times faster than ``other``: the median of the ratios within each repetition."""
        return statistics.median(b / a for a, b in zip(self.samples, other.samples, strict=True))


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], *, repetitions: int = 11, seconds: float = 0.02
) -> dict[str, Timing]:
    """Time the candidates against each other.

    Args:
        candidates: calls to time, by name.
        repetitions: rounds; in each, every candidate runs once, in an order that rotates.
        seconds: least duration of one candidate's turn; short calls are repeated to fill it.

    Returns:
        Seconds per call of each candidate.
    """
    calls: dict[str, int] = {}
    for name, run in candidates.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-7)))
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            run = candidates[name]
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing(tuple(values)) for name, values in samples.items()}
