"""The rows of `make test-matrix` cover what they promise, and say what a machine cannot run."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.harness.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(ROOT / ".ci" / "matrix.py", monkeypatch)


def test_rows_cover_every_setting(matrix: ModuleType) -> None:
    rows = matrix.ROWS.values()
    assert len({row.seed for row in rows}) == 3
    assert {row.threads for row in rows} == {1, 2}
    limits = {setting for row in rows for setting in row.limits.items()}
    assert limits == {
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("LB2_CPU_ISA", "avx2"),
        ("LB2_CPU_ISA", "scalar"),
    }
    assert any(not row.limits for row in rows)


def test_files_left_out_exist(matrix: ModuleType) -> None:
    assert all((ROOT / file).is_file() for file in matrix.COMPILERS)
    ignored = {name: "--ignore" in " ".join(matrix.command(row, 2)) for name, row in matrix.ROWS.items()}
    assert ignored == {"native": False, "avx2": True, "plain": True}


def test_rows_that_cannot_run_are_named(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        started.append((command, env))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(matrix, "core", lambda: SimpleNamespace(cpu_isas=lambda: ["scalar"]))
    monkeypatch.setattr(matrix.os, "cpu_count", lambda: 2)
    assert matrix.main(["--processes", "2", "avx2", "plain"]) == 1
    ((command, env),) = started
    assert "--random-order-seed=3" in command
    assert (env["OMP_NUM_THREADS"], env["LB2_CPU_ISA"]) == ("2", "scalar")
    shown = capsys.readouterr().out
    assert "avx2: skipped: needs the instruction set avx2, this CPU has scalar\n" in shown
    assert "plain: failed with status 1\n" in shown
    monkeypatch.setattr(matrix.os, "cpu_count", lambda: 1)
    assert matrix.main(["native", "avx2"]) == 0
    assert "native: skipped: needs 2 cores, this machine has 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        matrix.main(["avx1024"])
    assert "ROW must be one of native, avx2, plain, got avx1024" in capsys.readouterr().err
