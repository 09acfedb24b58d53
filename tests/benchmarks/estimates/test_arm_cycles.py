"""Cycles of loops for 64-bit ARM: which loop is taken, and what is refused. The tools are stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.estimates import arm_cycles
from benchmarks.estimates.arm_cycles import LOOPS, Loop, count_cycles, inner_loop
from benchmarks.records import read_result

LOOP = Loop("source", "Blocks", "tbl", 2, 100)
ASSEMBLY = """
_ZN5OtherBlock:
.L1:
\ttbl\tv0.16b, {v1.16b - v2.16b}, v3.16b
\tbne\t.L1
_ZN6Blocks3run:
.L2:
\tmov\tx0, x1
.L3:
\t.loc 1 2
\ttbl\tv0.16b, {v1.16b - v2.16b}, v3.16b
\ttbl\tv4.16b, {v1.16b - v2.16b}, v3.16b
\tcmp\tx0, x2
\tblt\t.L3
\tcbnz\tx5, .L2
\tret
"""


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text, "utf-8")
    path.chmod(0o755)
    return str(path)


def test_the_innermost_loop_of_the_function_is_taken() -> None:
    body = inner_loop(ASSEMBLY, LOOP)
    assert body.count("tbl") == 2
    assert body.splitlines()[-1].split() == ["blt", ".L3"]
    assert "mov" not in body
    assert ".loc" not in body


def test_a_kernel_that_changed_is_refused() -> None:
    with pytest.raises(ValueError, match="inner loop of Blocks must have 3 times tbl, got 2"):
        inner_loop(ASSEMBLY, Loop("source", "Blocks", "tbl", 3, 100))
    with pytest.raises(ValueError, match="inner loop of Missing must have 2 times tbl, got 0"):
        inner_loop(ASSEMBLY, Loop("source", "Missing", "tbl", 2, 100))


def test_cycles_are_those_of_one_pass(tmp_path: Path) -> None:
    analyzer = script(
        tmp_path / "mca", 'cat >/dev/null; echo "Instructions:      9"; echo "Total Cycles:      26500"'
    )
    assert count_cycles(analyzer, "apple-m1", "\tret\n") == 26.5
    silent = script(tmp_path / "silent", "cat >/dev/null; echo nothing")
    with pytest.raises(ValueError, match="must print 'Total Cycles', got: nothing"):
        count_cycles(silent, "apple-m1", "\tret\n")
    failing = script(tmp_path / "failing", "echo unknown core >&2; exit 1")
    with pytest.raises(ValueError, match="failed: unknown core"):
        count_cycles(failing, "apple-m1", "\tret\n")


def test_the_table_marks_figures_as_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def assembly(loop: Loop) -> str:
        return f"_Z{loop.function}:\n.L1:\n" + loop.times * f"\t{loop.instruction}\tv0\n" + "\tbne\t.L1\n"

    sources = {loop.source for loop in LOOPS.values()}
    made = {s: "".join(assembly(loop) for loop in LOOPS.values() if loop.source == s) for s in sources}
    monkeypatch.setattr(arm_cycles, "_assemblies", lambda compiler: made)
    analyzer = script(
        tmp_path / "mca",
        '[ "$1" = --version ] && echo "LLVM version 19.1.7" && exit 0\n'
        'cat >/dev/null; echo "Total Cycles: 32000"',
    )
    arguments = [
        "arm-cycles",
        "--compiler",
        "c++",
        "--analyzer",
        analyzer,
        "--json",
        str(tmp_path / "counts.json"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("counted with llvm-mca 19.1.7, one token, 3 GHz")
    assert "| lookup, int16 and int8 | 960            | 32.0, 90 " in printed
    assert "int16 on neoverse-n1: 90 GMAC/s counted, the goal is 60: reached" in printed
    assert "int16 on apple-m1: 90 GMAC/s counted, the goal is 150: not reached" in printed
    counts = read_result(tmp_path / "counts.json", ["arm-cycles"])["counts"]
    assert len(counts) == len(LOOPS) * len(arm_cycles.CORES)
    assert {count["gmacs"] for count in counts if count["loop"] == "lookup, sign"} == {45.0}


def test_an_old_analyzer_or_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = script(tmp_path / "mca", 'echo "LLVM version 14.0.6"')
    assert main(["arm-cycles", "--compiler", "c++", "--analyzer", old]) != 0
    assert "must be of LLVM 16 or newer, which knows neoverse-n1, got 14.0.6" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["arm-cycles"]) != 0
    assert "install the package g++-aarch64-linux-gnu" in capsys.readouterr().err
