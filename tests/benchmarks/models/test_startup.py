"""The command that times interpreter starts."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.models import startup


def test_both_environments_are_measured() -> None:
    without, with_hook = startup.measure("pass", starts=1)
    assert without > 0
    assert with_hook > 0
    # One of the two has no hook.
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure("import _littlebit2_autoregister", starts=1)
