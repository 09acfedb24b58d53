"""``littlebit2 doctor`` and ``--version``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from littlebit2.cli import main
from littlebit2_kernels import __version__, diagnostics
from littlebit2_kernels._native import core


def test_version_needs_no_torch() -> None:
    code = "import sys, littlebit2.cli; c = littlebit2.cli.main(['--version']); "
    code += "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy; exit(c)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"littlebit2 {__version__}\n"


def test_every_backend_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    before = core().cpu_isa()
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert core().cpu_isa() == before
    for isa in core().cpu_isas():
        assert re.search(rf"^ok +cpu \({isa}(, used here)?\) +largest relative error", printed, re.MULTILINE)
    assert re.search(r"^ok +reference", printed, re.MULTILINE)
    assert re.search(r"^ok +blas", printed, re.MULTILINE)
    if not torch.cuda.is_available():
        assert re.search(r"^- +cuda +(this torch|torch finds|this package)", printed, re.MULTILINE)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_test"] == "ok"
    found = {test["name"]: test["passed"] for test in report["self_tests"]}
    assert set(found) >= {"cuda", "triton", "blas", "reference"}
    assert found["reference"] is True


def test_an_instruction_set_that_cannot_run_is_told() -> None:
    command = [sys.executable, "-m", "littlebit2", "doctor"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LB2_CPU_ISA": "sse9"}
    )
    assert done.returncode == 1
    assert re.search(r'^FAIL +cpu +.*LB2_CPU_ISA must be .* got "sse9"', done.stdout, re.MULTILINE)
    assert re.search(r"^ok +reference", done.stdout, re.MULTILINE)


def test_wrong_results_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = diagnostics.littlebit_linear

    def wrong(x: torch.Tensor, layer: object, *, backend: str = "auto", **options: object) -> torch.Tensor:
        y = right(x, layer, backend=backend, **options)  # type: ignore[arg-type]
        return y * 1.01 if backend == "blas" else y

    monkeypatch.setattr(diagnostics, "littlebit_linear", wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^FAIL +blas +relative error 1.0e-02 in torch.float32, allowed", printed, re.MULTILINE)
    assert re.search(r"^ok +reference", printed, re.MULTILINE)


def test_a_missing_library_is_told(tmp_path: Path) -> None:
    script = "import sys; sys.modules['littlebit2_kernels._native.abi'] = None; "
    script += "from littlebit2.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 1
    assert re.search(r"^FAIL +cpu +the core library cannot be loaded", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +reference", done.stdout, re.MULTILINE)
