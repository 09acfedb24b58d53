"""The measurement of overhead from end to end, shortened; nothing here looks at a measured time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.layers.overhead import Row, overhead_table
from benchmarks.records import ROOT, read_result


def test_a_checkout_beside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overhead.json"
    short = ["overhead", "--rounds", "1", "--seconds", "1e-6", "--no-model", "--cpu-time"]
    assert main([*short, "--against", str(ROOT), "--json", str(path)]) == 0
    rows = [Row(**row) for row in read_result(path, ("overhead",))["rows"]]
    assert [row.name for row in rows] == [
        "call: littlebit_linear, packed",
        "call: littlebit_linear, prepacked",
        "call: LittleBitLinear",
        "call: LittleBitLinear, prepack_()",
        "call: F.linear",
        "call: nn.Linear",
        "import littlebit2_kernels",
        "import littlebit2",
        "littlebit2 --help",
    ]
    for row in rows:
        assert row.against is not None
        assert len(row.samples) == len(row.against) == 1
        assert row.samples[0] > 0
    assert "| littlebit2 --help" in capsys.readouterr().out


def test_table() -> None:
    rows = [Row("call: a", [1e-6, 2e-6, 3e-6], [2e-6, 4e-6, 6e-6]), Row("import b", [0.5], None)]
    lines = overhead_table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "call: a",
        "2.00 us (1.50-2.50)",
        "500000",
        "4.00 us (3.00-5.00)",
        "2.00x (2.00-2.00)",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "import b",
        "500.00 ms (500.00-500.00)",
        "",
        "",
        "",
    ]


def test_another_checkout_must_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overhead", "--against", str(tmp_path)]) == 2
    assert "against must be the root of a checkout" in capsys.readouterr().err
