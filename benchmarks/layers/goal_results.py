"""The goals of the CPU kernels as data, and what a set of measurements says about each of them.

Speed goals are geometric means over the four large shapes, one thread, against float32 peers. Those against
the low-rank peer do not depend on the bits per weight and take the mean over all of them too. A goal is
judged only where all of its cells were measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from benchmarks.layers.refcheck import INT16_BOUND
from benchmarks.layers.rows import Check, Row
from benchmarks.markdown import markdown
from benchmarks.shapes import GOAL_BPWS, LARGE_SHAPES
from benchmarks.timing import Timing, spread_of

__all__ = ["GOALS", "Goal", "Result", "by_bpw_table", "evaluate", "goals_table"]

Value = TypeVar("Value")

#: Inputs of the checks that a method's float32 error is the worst of.
ERROR_INPUTS = ("normal", "full")
LOW_RANK = "low-rank float32"
DENSE = "dense float32"
#: What the names of the shapes begin with that two threads are compared on.
LARGEST = "llama2-70b-"


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        method: ``exact`` (float32 tables) or ``int16`` (int16 tables, bfloat16 activations).
        quantity: ``speedup`` over ``peer``; ``threads``, the speed-up of two threads over one; ``error``
            against float64; ``outliers``, the error over that of torch in bfloat16, with 50 times larger
            channels.
        target: least speed-up, or largest error.
        peer: label of the peer.
        tokens: M.
        mode: ``hot`` or ``cold``.
        bpw: counted bits per weight, or ``None`` for all.
    """

    method: str
    quantity: str
    target: float
    peer: str = ""
    tokens: int = 1
    mode: str = "cold"
    bpw: float | None = None

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.quantity in ("speedup", "threads")

    @property
    def text(self) -> str:
        """What is asked for, in words."""
        if self.quantity == "error":
            return "worst error vs float64, float32 output"
        if self.quantity == "outliers":
            return "error with 50x outlier channels over that of bfloat16 torch"
        if self.quantity == "threads":
            return "two threads over one, M=1, cold, 70B shapes"
        at = "" if self.bpw is None else f", {self.bpw:g} bpw"
        return f"M={self.tokens} vs {self.peer}, {self.mode}{at}"

    @property
    def cells(self) -> list[str]:
        """What it is defined over: every shape and bpw, for errors of every kind of inputs."""
        shapes = [s for s in LARGE_SHAPES if self.quantity != "threads" or s.startswith(LARGEST)]
        bpws = GOAL_BPWS if self.bpw is None else (self.bpw,)
        cells = [_cell(shape, bpw) for shape in shapes for bpw in bpws]
        if self.quantity == "error":
            return [f"{cell} {inputs}" for cell in cells for inputs in ERROR_INPUTS]
        return cells


def _cell(shape: str, bpw: float) -> str:
    return f"{shape} bpw={bpw:g}"


def _speed_goals(
    method: str, *, cold: float, hot: float, dense: Sequence[float], batched: Mapping[int, float]
) -> list[Goal]:
    return [
        Goal(method, "speedup", cold, peer=LOW_RANK),
        Goal(method, "speedup", hot, peer=LOW_RANK, mode="hot"),
        *(Goal(method, "speedup", t, peer=DENSE, bpw=bpw) for bpw, t in zip(GOAL_BPWS, dense, strict=True)),
        *(Goal(method, "speedup", t, peer=LOW_RANK, tokens=tokens) for tokens, t in batched.items()),
        Goal(method, "threads", 1.7),
    ]


GOALS = (
    Goal("exact", "error", 2e-6),
    *_speed_goals("exact", cold=13, hot=22, dense=(80, 45, 28, 16), batched={8: 8, 32: 2.5, 128: 1.3}),
    Goal("int16", "error", INT16_BOUND),
    Goal("int16", "outliers", 1.0),
    *_speed_goals("int16", cold=20, hot=35, dense=(130, 60, 38, 22), batched={8: 18, 32: 6, 128: 3}),
)


@dataclass(frozen=True)
class Result:
    """What was measured for a goal.

    Attributes:
        goal: the goal.
        measured: median, over repetitions, of the geometric mean of the cells, or the largest error;
            ``None`` if not measured.
        low: lower quartile of the same geometric means; for errors the smallest.
        high: upper quartile, or the largest error.
        cells: the value of every shape and bpw, for speed-ups the median; those of the goal alone if all of
            them are here.
        reason: why nothing was measured.
    """

    goal: Goal
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    cells: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether everything that the goal is defined over was measured."""
        return set(self.goal.cells) <= self.cells.keys()

    @property
    def coverage(self) -> str:
        """How many of the goal's cells were measured, and how many that are not the goal's."""
        own = sum(cell in self.cells for cell in self.goal.cells)
        others = len(self.cells) - own
        return f"{own} of {len(self.goal.cells)}" + (f", {others} other" if others else "")

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; ``None`` if it was not measured, or only in part."""
        if self.measured is None or not self.complete:
            return None
        return self.measured >= self.goal.target if self.goal.at_least else self.measured <= self.goal.target

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.goal.text, "met": self.met, "coverage": self.coverage, **asdict(self)}


def evaluate(
    rows: Iterable[Row],
    checks: Iterable[Check],
    methods: Mapping[str, str],
    *,
    goals: Sequence[Goal] = GOALS,
    reasons: Mapping[str, str] | None = None,
) -> list[Result]:
    """Compare measurements with the goals.

    Args:
        rows: timings; rows of one group were interleaved.
        checks: errors.
        methods: label (candidate and dtype) of each method's timed rows.
        goals: what to compare with.
        reasons: by method, why nothing of it was measured.
    """
    rows, checks = list(rows), list(checks)
    results = []
    for goal in goals:
        candidate = methods[goal.method].rpartition(" ")[0]
        if goal.quantity in ("error", "outliers"):
            result = _error_result(goal, [c for c in checks if c.candidate == candidate])
        else:
            result = _ratio_result(goal, rows, methods[goal.method])
        if result.measured is None and reasons and goal.method in reasons:
            result = Result(goal, reason=reasons[goal.method])
        results.append(result)
    return results


def _error_result(goal: Goal, checks: Sequence[Check]) -> Result:
    cells: dict[str, float] = {}
    for check in checks:
        where = _cell(check.shape, check.bpw)
        if goal.quantity == "error" and check.dtype == "float32" and check.inputs in ERROR_INPUTS:
            cells[f"{where} {check.inputs}"] = check.error
        if goal.quantity == "outliers" and check.inputs == "outliers" and check.torch_error:
            cells[where] = check.error / check.torch_error
    if not cells:
        return Result(goal, reason="no such error was measured")
    cells = _own_cells(goal, cells)
    values = cells.values()
    # A NaN must not hide behind a comparison that is false.
    worst = math.inf if any(math.isnan(value) for value in values) else max(values)
    return Result(goal, worst, min(values), worst, cells)


def _own_cells(goal: Goal, cells: dict[str, Value]) -> dict[str, Value]:
    """The cells of the goal if all of them are there, otherwise whatever there is."""
    return {cell: cells[cell] for cell in goal.cells} if set(goal.cells) <= cells.keys() else cells


def _ratio_result(goal: Goal, rows: Sequence[Row], label: str) -> Result:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        fits = row.tokens == goal.tokens and row.mode == goal.mode and goal.bpw in (None, row.bpw)
        if fits and (goal.quantity != "threads" or row.shape.startswith(LARGEST)):
            groups.setdefault(_cell(row.shape, row.bpw), []).append(row)
    ratios: dict[str, tuple[float, ...]] = {}
    for cell, members in groups.items():
        ours, base = _pair(goal, members, label)
        if ours is not None and base is not None:
            ratios[cell] = Timing(tuple(ours.samples)).ratios_over(Timing(tuple(base.samples)))
    if not ratios:
        return Result(goal, reason="no such pair of rows was measured")
    ratios = _own_cells(goal, ratios)
    cells = {cell: statistics.median(values) for cell, values in ratios.items()}
    # Repetition r of one cell has nothing to do with repetition r of another, but each is one measurement.
    repetitions = min(map(len, ratios.values()))
    means = [statistics.geometric_mean(v[r] for v in ratios.values()) for r in range(repetitions)]
    spread = spread_of(means)
    return Result(goal, spread.median, spread.low, spread.high, cells)


def _pair(goal: Goal, members: Sequence[Row], label: str) -> tuple[Row | None, Row | None]:
    """The faster and the slower row, as the goal would have it."""

    def find(wanted: Callable[[Row], bool]) -> Row | None:
        return next(filter(wanted, members), None)

    if goal.quantity == "threads":
        return (
            find(lambda row: row.label == label and row.threads == 2),
            find(lambda row: row.label == label and row.threads == 1),
        )
    return (
        find(lambda row: row.label == label and row.threads == 1),
        find(lambda row: row.label == goal.peer and row.threads == 1),
    )


def _number(goal: Goal, value: float) -> str:
    if goal.quantity == "error":
        return f"{value:.1e}"
    return f"{value:.3g}" + ("x" if goal.at_least else "")


def goals_table(results: Iterable[Result]) -> str:
    """Goals beside measurements; the spread is that of the quartiles, for errors of all problems."""
    lines = []
    for result in results:
        goal = result.goal
        sign = ">=" if goal.at_least else "<="
        line = [goal.method, goal.text, f"{sign} {_number(goal, goal.target)}"]
        if result.measured is None or result.low is None or result.high is None:
            line += ["not measured", result.reason, result.coverage, ""]
        else:
            spread = f"{_number(goal, result.low)} - {_number(goal, result.high)}"
            met = {None: "partial", True: "yes", False: "NO"}[result.met]
            line += [_number(goal, result.measured), spread, result.coverage, met]
        lines.append(line)
    return markdown(["method", "goal", "target", "measured", "spread", "cells", "met?"], lines)


def by_bpw_table(rows: Iterable[Row], methods: Mapping[str, str]) -> str:
    """Geometric means over the shapes of the speed-ups over the peers, one column per bpw.

    Peers in float32, and in the dtype that the method was timed in.
    """
    rows = list(rows)
    bpws = sorted({row.bpw for row in rows})
    lines = []
    for method in methods:
        dtype = methods[method].rpartition(" ")[2]
        for peer in dict.fromkeys((LOW_RANK, DENSE, f"low-rank {dtype}", f"dense {dtype}")):
            for tokens, mode in sorted({(row.tokens, row.mode) for row in rows}):
                results = [
                    _ratio_result(Goal(method, "speedup", 0, peer, tokens, mode, bpw), rows, methods[method])
                    for bpw in bpws
                ]
                if any(result.measured is not None for result in results):
                    cells = ["" if r.measured is None else f"{r.measured:.3g}x" for r in results]
                    lines.append([method, f"M={tokens} vs {peer}, {mode}", *cells])
    return markdown(["method", "ratio", *(f"{bpw:g} bpw" for bpw in bpws)], lines)
