"""Measure groups of candidates, one problem after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.layers.candidates import Candidate, Forward
from benchmarks.layers.refcheck import error_bound, error_of
from benchmarks.layers.rows import Floor, Row, floor_fraction
from benchmarks.problems import Problem
from benchmarks.shapes import Shape
from benchmarks.timing import Timer, Timing, time_interleaved
from benchmarks.timing_cuda import CALLS_PER_GRAPH
from littlebit2_kernels.reference import linear_reference

__all__ = [
    "Case",
    "Entry",
    "Settings",
    "Sweep",
    "available",
]

#: Most copies of one layer, for making one takes time; a layer that needs more to be cold is marked warm.
MAX_COPIES = 16384


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: the device.
        timer: what measures.
        repetitions: rounds of every group.
        seconds: least duration of one candidate's turn.
        cold_bytes: bytes that the copies of a cold candidate occupy together.
        memory_bytes: most bytes that all weights of one problem may take.
        refcheck: whether to compare our candidates with the float64 reference.
    """

    device: torch.device
    timer: Timer
    repetitions: int = 11
    seconds: float = 0.02
    cold_bytes: int = 2**28
    memory_bytes: int = 12 * 2**30
    refcheck: bool = False


@dataclass(frozen=True)
class Entry:
    """A candidate on a number of threads (0 on a GPU)."""

    candidate: Candidate
    threads: int

    @property
    def label(self) -> str:
        """Unique within a group."""
        return f"{self.candidate.label} {self.threads}"


@dataclass(frozen=True)
class Case:
    """A group of entries to interleave on one problem.

    Attributes:
        tokens: M.
        mode: ``hot`` or ``cold``.
        entries: what to time.
        repetitions: rounds, where they differ from the settings'.
    """

    tokens: int
    mode: str
    entries: Sequence[Entry]
    repetitions: int | None = None


@dataclass
class _Layers:
    """Forward calls of the copies of one candidate."""

    forwards: list[Forward]
    nbytes: int


@dataclass
class Sweep:
    """Measures problem after problem; keeps a peer's weights while they fit the next problem too."""

    settings: Settings
    floors: Sequence[Floor] = ()
    _kept: dict[tuple[str, Shape], _Layers] = field(default_factory=dict)

    def measure(self, problem: Problem, cases: Sequence[Case]) -> Iterator[Row]:
        """Measure the cases; yields the rows of one group after the other.

        Raises:
            ValueError: the weights would take more memory than the settings allow.
        """
        cold = any(case.mode == "cold" for case in cases)
        candidates = {e.candidate.label: e.candidate for case in cases for e in case.entries}
        self._check_memory(problem, candidates.values(), cold=cold)
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] == problem.shape}
        layers = {label: self._layers(c, problem, cold=cold) for label, c in candidates.items()}
        for case in cases:
            yield from self._group(problem, case, layers)
        del layers
        gc.collect()

    def copies(self, nbytes: int) -> int:
        """How many copies of ``nbytes`` make up the cold size."""
        # On a GPU the cache is flushed between graphs, and a graph uses a copy once.
        most = CALLS_PER_GRAPH if self.settings.device.type == "cuda" else MAX_COPIES
        return min(most, max(1, -(-self.settings.cold_bytes // max(nbytes, 1))))

    def mode(self, wanted: str, nbytes: int) -> str:
        """``wanted``, but ``warm`` for cold where the copies of ``nbytes`` do not make up the cold size."""
        if wanted != "cold" or self.settings.device.type == "cuda":
            return wanted
        return "cold" if self.copies(nbytes) * nbytes >= self.settings.cold_bytes else "warm"

    def _check_memory(self, problem: Problem, candidates: Iterable[Candidate], *, cold: bool) -> None:
        planned = 0
        for candidate in candidates:
            nbytes = candidate.planned_bytes(problem)
            planned += nbytes * (self.copies(nbytes) if cold else 1)
        if planned > self.settings.memory_bytes:
            raise ValueError(
                f"weights of {problem.shape.name} at {problem.bpw:g} bpw must fit "
                f"{self.settings.memory_bytes / 2**30:.1f} GiB, they would take {planned / 2**30:.1f}: "
                "compare fewer candidates at once, or allow more memory"
            )

    def _layers(self, candidate: Candidate, problem: Problem, *, cold: bool) -> _Layers:
        key = (candidate.label, problem.shape)
        if key in self._kept:
            return self._kept[key]
        built = candidate.build(problem)
        layers = _Layers(built.forwards(self.copies(built.nbytes) if cold else 1), built.nbytes)
        if not candidate.uses_signs:
            self._kept[key] = layers
        return layers

    def _group(self, problem: Problem, case: Case, layers: dict[str, _Layers]) -> Iterator[Row]:
        x = problem.activations(case.tokens)
        inputs = {e.candidate.dtype: x.to(e.candidate.dtype) for e in case.entries}
        runs: dict[str, list[Callable[[], object]]] = {}
        for entry in case.entries:
            forwards = layers[entry.candidate.label].forwards
            used = forwards if case.mode == "cold" else forwards[:1]
            runs[entry.label] = [partial(forward, inputs[entry.candidate.dtype]) for forward in used]
        errors = self._errors(problem, case, layers, inputs)
        before = torch.get_num_threads()
        try:
            with torch.inference_mode():
                timings = time_interleaved(
                    runs,
                    repetitions=case.repetitions or self.settings.repetitions,
                    seconds=self.settings.seconds,
                    cold=case.mode == "cold",
                    timer=self.settings.timer,
                    setups={
                        e.label: partial(torch.set_num_threads, e.threads) for e in case.entries if e.threads
                    },
                )
        finally:
            torch.set_num_threads(before)
        for entry in case.entries:
            yield self._row(problem, case, entry, timings, layers, errors.get(entry.candidate.label))

    def _errors(
        self,
        problem: Problem,
        case: Case,
        layers: dict[str, _Layers],
        inputs: dict[torch.dtype, torch.Tensor],
    ) -> dict[str, tuple[float, float | None]]:
        """Error and bound of our candidates, by label."""
        if not self.settings.refcheck:
            return {}
        ours = {e.candidate.label: e.candidate for e in case.entries if e.candidate.ours}
        truths = {c.dtype: linear_reference(inputs[c.dtype], problem.packed) for c in ours.values()}
        errors = {}
        for label, candidate in ours.items():
            x, truth = inputs[candidate.dtype], truths[candidate.dtype]
            with torch.inference_mode():
                actual = layers[label].forwards[0](x)
            error = error_of(actual, truth, x, problem.packed)
            errors[label] = (error, error_bound(candidate, truth, x, problem.packed))
        return errors

    def _row(
        self,
        problem: Problem,
        case: Case,
        entry: Entry,
        timings: dict[str, Timing],
        layers: dict[str, _Layers],
        error: tuple[float, float | None] | None,
    ) -> Row:
        candidate = entry.candidate
        timing = timings[entry.label]
        spread = timing.spread
        own = layers[candidate.label]
        mode = self.mode(case.mode, own.nbytes)
        floor = next((floor for floor in self.floors if floor.threads == entry.threads), None)
        speedups = {}
        for other in case.entries:
            if other.candidate.ours or other.threads != entry.threads or other.label == entry.label:
                continue
            # A warm row beside a cold one says nothing about either candidate.
            if self.mode(case.mode, layers[other.candidate.label].nbytes) != mode:
                continue
            ratio = timing.speedup_spread(timings[other.label])
            speedups[other.candidate.label] = [ratio.median, ratio.low, ratio.high]
        fraction = None
        if mode == "cold" and floor is not None:
            fraction = floor_fraction(own.nbytes, spread.median, floor)
        return Row(
            group=f"{problem.shape.name} bpw={problem.bpw:g} M={case.tokens} {case.mode}",
            candidate=candidate.name,
            dtype=candidate.label.rpartition(" ")[2],
            ours=candidate.ours,
            shape=problem.shape.name,
            in_features=problem.shape.in_features,
            out_features=problem.shape.out_features,
            bpw=problem.bpw,
            ranks=problem.ranks,
            tokens=case.tokens,
            mode=mode,
            threads=entry.threads,
            copies=len(own.forwards) if case.mode == "cold" else 1,
            weight_bytes=own.nbytes,
            macs=case.tokens * candidate.macs(problem),
            samples=list(timing.samples),
            median=spread.median,
            low=spread.low,
            high=spread.high,
            floor_fraction=fraction,
            error=None if error is None else error[0],
            error_bound=None if error is None else error[1],
            speedups=speedups,
        )


def available(
    candidates: Iterable[Candidate], device: torch.device
) -> tuple[list[Candidate], dict[str, str]]:
    """Split candidates into those that can run and the reasons of the others, by label."""
    usable, reasons = [], {}
    for candidate in candidates:
        reason = candidate.unavailable(device)
        if reason is None:
            usable.append(candidate)
        else:
            reasons[candidate.label] = reason
    return usable, reasons
