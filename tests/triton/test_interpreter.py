"""Runs the suite of the kernels in Triton's interpreter: a session of its own, for triton is told once."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(
    ("file", "marked"),
    [
        ("test_linear.py", "not slow"),
        ("test_gradients.py", "not slow"),
        ("test_unpack.py", "not slow"),
        pytest.param("test_linear.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(file: str, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", marked]
    command.append(f"tests/triton/kernels/{file}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
