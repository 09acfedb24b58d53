"""The benchmark of the quantizer: its tables, on weights small enough for a test."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.quality import methods


def test_every_method_is_measured_and_ranked() -> None:
    weight = methods.synthetic(96, 0.6)
    outcomes = [o for bpw in (1.0, 2.0) for o in methods.methods("k^-0.6", "k^-0.6", weight, bpw, 20)]
    for bpw in (1.0, 2.0):
        error = {o.method: o.error for o in outcomes if o.bpw == bpw}
        assert error["admm"] < error["Joint-ITQ, 50 SVDs"] < error["Dual-SVID, SVD"]
        assert error["refine"] < error["joint-itq"]
    table = methods.error_table(outcomes).splitlines()
    assert len(table) == 4
    assert "| k^-0.6" in table[2]


def test_goals_are_relative_to_the_baseline_of_the_same_weight() -> None:
    def outcome(weight: str, method: str, error: float) -> methods.Outcome:
        return methods.Outcome(weight, weight, 1.0, 8, method, error, 1.0, 0.0)

    errors = {"joint-itq": 0.5, "refine": 0.4, "admm": 0.25}
    outcomes = [
        outcome(name, method, value * scale)
        for name, scale in (("a", 1.0), ("b", 0.5), *((f"k^-{d:g}", 0.1) for d in methods.DECAYS))
        for method, value in {"Joint-ITQ, 50 SVDs": 0.5, **errors}.items()
    ]
    admm = methods.goal_table(outcomes).splitlines()[-1]
    assert [cell.strip() for cell in admm.split("|")[1:-1]] == [
        "admm",
        "1",
        "0.65",
        "0.500",
        "0.500-0.500",
        *["0.500"] * 3,
    ]


def test_an_unknown_part_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantizer", "everything"]) == 2
    assert "PART must be one of errors, itq, batches, model, got everything" in capsys.readouterr().err
