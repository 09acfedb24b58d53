"""A capture without a call before, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda import first_call

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("chained", [True, False], ids=["chained", "unchained"])
@pytest.mark.parametrize(("tokens", "mode"), [(1, "int16"), (8, "float16"), (40, "float16"), (700, "int8")])
def test_capture_of_a_first_call(device: torch.device, tokens: int, mode: str, chained: bool) -> None:
    variables = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python")))}
    if not chained:
        variables["LB2_CUDA_CHAINED"] = "0"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.first_call", str(tokens), mode],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_the_process_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: results pass, wrong ones do not."""
    assert first_call.main(3, "exact", "cpu") == ""
    monkeypatch.setattr(first_call.modes, "allowed", lambda *_: 0.0)
    assert first_call.main(3, "exact", "cpu").startswith("relative error")
