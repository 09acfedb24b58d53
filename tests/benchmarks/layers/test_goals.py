"""The goals' arithmetic, on made-up rows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.layers.candidates import parse_candidate
from benchmarks.layers.goal_results import GOALS, Goal, Result, by_bpw_table, evaluate, goals_table
from benchmarks.layers.goal_runs import METHOD_DTYPES, goal_cases
from benchmarks.layers.rows import Check, Row
from benchmarks.shapes import GOAL_BPWS, LARGE_SHAPES
from tests.benchmarks.builders import row

METHODS = {"exact": "littlebit2:cpu:exact float32", "int16": "littlebit2:cpu:int16 bfloat16"}
LOW_RANK = "low-rank float32"


def group(ours: list[float], peer: list[float], **changes: object) -> list[Row]:
    return [
        row(samples=ours, **changes),
        row(candidate="low-rank", ours=False, samples=peer, **changes),
    ]


def one(goal: Goal, rows: list[Row], checks: tuple[Check, ...] = ()) -> Result:
    (result,) = evaluate(rows, checks, METHODS, goals=[goal])
    return result


def test_goals_are_those_of_the_table() -> None:
    dense = {
        method: [g.target for g in GOALS if g.method == method and g.peer == "dense float32"]
        for method in METHODS
    }
    assert dense == {"exact": [80, 45, 28, 16], "int16": [130, 60, 38, 22]}
    low_rank = {
        method: [(g.tokens, g.mode, g.target) for g in GOALS if g.method == method and g.peer == LOW_RANK]
        for method in METHODS
    }
    assert low_rank == {
        "exact": [(1, "cold", 13), (1, "hot", 22), (8, "cold", 8), (32, "cold", 2.5), (128, "cold", 1.3)],
        "int16": [(1, "cold", 20), (1, "hot", 35), (8, "cold", 18), (32, "cold", 6), (128, "cold", 3)],
    }
    assert [(g.method, g.target) for g in GOALS if g.quantity == "error"] == [
        ("exact", 2e-6),
        ("int16", 5e-4),
    ]
    assert len(GOALS) == 23


def test_geometric_mean_over_cells_and_spread_over_repetitions() -> None:
    rows = group([1.0, 1.0, 1.0], [4.0, 2.0, 8.0]) + group([1.0, 1.0, 1.0], [16.0, 8.0, 32.0], bpw=0.3)
    result = one(Goal("exact", "speedup", 7.9, peer=LOW_RANK), rows)
    assert result.measured == pytest.approx(8.0)
    assert sorted(result.cells.values()) == [4.0, 16.0]
    assert (result.low, result.high) == (pytest.approx(6.0), pytest.approx(12.0))


def test_measured_is_the_middle_of_what_the_spread_is_of() -> None:
    rows = group([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) + group([1.0, 1.0, 1.0], [9.0, 1.0, 9.0], bpw=0.3)
    result = one(Goal("exact", "speedup", 1, peer=LOW_RANK), rows)
    # Of the rounds' geometric means 3, 2^0.5 and 6; the cells' medians are 2 and 9.
    assert result.measured == pytest.approx(3.0)
    assert (result.low, result.high) == pytest.approx(((3 + 2**0.5) / 2, 4.5))


def test_goals_are_judged_on_all_of_their_cells_only() -> None:
    goal = Goal("exact", "speedup", 7.9, peer=LOW_RANK)
    rows = [r for s in LARGE_SHAPES for bpw in GOAL_BPWS for r in group([1.0], [8.0], shape=s, bpw=bpw)]
    whole = one(goal, rows)
    assert (whole.met, whole.coverage, whole.as_dict()["met"]) == (True, "16 of 16", True)
    assert one(dataclasses.replace(goal, target=8.1), rows).met is False
    # Other shapes and bpw do not count beside them.
    other = group([1.0], [1e6], shape="llama2-7b-qo") + group([1.0], [1e6], bpw=0.4)
    assert one(goal, rows + other).measured == pytest.approx(8.0)
    part = one(goal, rows[2:] + other)
    assert (part.met, part.coverage) == (None, "15 of 16, 2 other")
    assert "partial" in goals_table([part])
    dense = dataclasses.replace(goal, bpw=0.3)
    assert (one(dense, rows).coverage, one(dense, rows[:2]).coverage) == ("4 of 4", "0 of 4")
    assert Goal("exact", "threads", 1.7).cells == [
        f"llama2-70b-{name} bpw={bpw:g}" for name in ("up", "down") for bpw in GOAL_BPWS
    ]


def test_only_rows_that_fit_the_goal_count() -> None:
    rows = (
        group([1.0], [2.0])
        + group([1.0], [50.0], mode="hot")
        + group([1.0], [60.0], tokens=8)
        + group([1.0], [70.0], bpw=0.3)
    )
    assert one(Goal("exact", "speedup", 1, peer=LOW_RANK, bpw=0.1), rows).measured == pytest.approx(2.0)
    assert one(Goal("exact", "speedup", 1, peer=LOW_RANK, mode="hot"), rows).measured == pytest.approx(50.0)
    assert one(Goal("exact", "speedup", 1, peer=LOW_RANK, tokens=8), rows).measured == pytest.approx(60.0)


def test_threads_compare_the_same_candidate_on_70b_shapes() -> None:
    shape = "llama2-70b-up"
    rows = [row(samples=[2.0], shape=shape), row(samples=[1.0], shape=shape, threads=2)]
    rows += [row(samples=[9.0]), row(samples=[1.0], threads=2)]
    assert one(Goal("exact", "threads", 1.7), rows).measured == pytest.approx(2.0)


def check(**changes: object) -> Check:
    base = Check("littlebit2:cpu:int16", "float32", "llama2-7b-up", 0.1, "normal", 4e-4)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def everywhere(**changes: object) -> tuple[Check, ...]:
    return tuple(
        check(shape=shape, bpw=bpw, inputs=inputs, **changes)
        for shape in LARGE_SHAPES
        for bpw in GOAL_BPWS
        for inputs in ("normal", "full")
    )


def test_errors_are_judged_by_the_worst() -> None:
    goal = Goal("int16", "error", 5e-4)
    good = everywhere()
    worse = (
        *good,
        check(inputs="full", bpw=0.3, error=6e-4),
        check(bpw=1.0, error=9.0, dtype="bfloat16"),
        check(candidate="littlebit2:cpu:exact", error=5.0),
    )
    result = one(goal, [], worse)
    assert (result.measured, result.low, result.met) == (6e-4, 4e-4, False)
    assert (one(goal, [], good).met, one(goal, [], good).coverage) == (True, "32 of 32")
    assert (one(goal, [], good[1:]).met, one(goal, [], good[1:]).coverage) == (None, "31 of 32")
    nan = one(goal, [], (*good, check(bpw=0.3, error=math.nan)))
    assert nan.measured == math.inf
    assert nan.met is False


def test_outliers_are_compared_with_torch() -> None:
    checks = (check(inputs="outliers", dtype="bfloat16", error=1e-3, torch_error=4e-3),)
    result = one(Goal("int16", "outliers", 1.0), [], checks)
    assert result.measured == pytest.approx(0.25)
    assert (result.met, result.coverage) == (None, "1 of 16")


def test_what_was_not_measured_says_why() -> None:
    results = evaluate([], [], METHODS, reasons={"exact": "no such argument"})
    assert {result.met for result in results} == {None}
    assert {r.reason for r in results if r.goal.method == "exact"} == {"no such argument"}
    assert all(result.reason for result in results)
    text = goals_table(results)
    assert text.count("not measured") == len(GOALS)
    assert len(text.splitlines()) == 2 + len(GOALS)


def test_tables() -> None:
    rows = group([1.0, 1.0, 1.0], [4.0, 2.0, 8.0]) + group([1.0, 1.0, 1.0], [16.0, 8.0, 32.0], bpw=0.3)
    results = evaluate(rows, [], METHODS, goals=[Goal("exact", "speedup", 9, peer=LOW_RANK)])
    last = [cell.strip() for cell in goals_table(results).splitlines()[-1].split("|")[1:-1]]
    assert last == ["exact", "M=1 vs low-rank float32, cold", ">= 9x", "8x", "6x - 12x", "2 of 16", "partial"]
    columns = [cell.strip() for cell in by_bpw_table(rows, METHODS).splitlines()[-1].split("|")[1:-1]]
    assert columns == ["exact", "M=1 vs low-rank float32, cold", "4x", "16x"]


def test_peers_in_the_dtype_of_the_method_are_shown_beside_those_of_the_goals() -> None:
    ours = row(candidate="littlebit2:cpu:int16", dtype="bfloat16", samples=[1.0])
    rows = [row(samples=[1.0]), ours]
    for candidate, dtype, seconds in (
        ("low-rank", "float32", 8.0),
        ("low-rank", "bfloat16", 4.0),
        ("dense", "float32", 6.0),
        ("dense", "bfloat16", 3.0),
    ):
        rows.append(row(candidate=candidate, dtype=dtype, ours=False, samples=[seconds]))
    lines = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in by_bpw_table(rows, METHODS).splitlines()[2:]
    ]
    assert lines == [
        ("exact", "M=1 vs low-rank float32, cold", "8x"),
        ("exact", "M=1 vs dense float32, cold", "6x"),
        ("int16", "M=1 vs low-rank float32, cold", "8x"),
        ("int16", "M=1 vs dense float32, cold", "6x"),
        ("int16", "M=1 vs low-rank bfloat16, cold", "4x"),
        ("int16", "M=1 vs dense bfloat16, cold", "3x"),
    ]


def test_what_is_interleaved() -> None:
    methods = [parse_candidate(METHODS[name].split()[0], METHOD_DTYPES[name]) for name in METHODS]
    cases = {
        (case.tokens, case.mode): [entry.label for entry in case.entries if not entry.candidate.ours]
        for case in goal_cases(methods, two_threads=False, repetitions=9)
    }
    low_rank = ["low-rank float32 1", "low-rank bfloat16 1"]
    assert cases == {
        (1, "cold"): [*low_rank, "dense float32 1", "dense bfloat16 1"],
        (1, "hot"): low_rank[:1],
        **{(tokens, "cold"): low_rank for tokens in (8, 32, 128)},
    }
    exact_only = goal_cases(methods[:1], two_threads=False, repetitions=9)
    assert {e.candidate.dtype for case in exact_only for e in case.entries} == {torch.float32}
