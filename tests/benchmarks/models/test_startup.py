"""The command that times interpreter starts."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.models import startup


def test_both_environments_are_measured() -> None:
    fastest = startup.measure("pass", starts=1)
    assert list(fastest) == ["elapsed", "CPU"]
    assert all(value > 0 for pair in fastest.values() for value in pair)
    # One of the two has no hook.
    with pytest.raises(subprocess.CalledProcessError):
        startup.measure("import _littlebit2_autoregister", starts=1)


def test_table() -> None:
    lines = startup.startup_table(
        {"nothing": {"elapsed": (0.010, 0.0105), "CPU": (0.009, 0.0088)}}
    ).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "nothing",
        "elapsed",
        "10.00",
        "10.50",
        "+0.50",
    ]
    assert lines[3].split("|")[-2].strip() == "-0.20"
