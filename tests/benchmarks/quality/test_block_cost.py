"""`block-cost` scales what it measured, on a shape that takes no time."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.quality.block_cost import scaled


def test_parts_are_scaled_by_what_they_grow_with() -> None:
    options = Namespace(samples=28, measured_samples=4, steps=50, measured_steps=5)
    seconds = {"targets": 6.0, "quantization": 8.0, "tuning": 4.0}
    assert scaled(seconds, 2, options) == {"targets": 15.0, "quantization": 4.0, "tuning": 20.0}


def test_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["block-cost", "--shape", "tiny", "--measured-samples", "4", "--measured-steps", "2"]
    threads = str(torch.get_num_threads())
    assert main([*arguments, "--blocks", "2", "--threads", threads, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "hours for 2 blocks" in printed
    found = json.loads((tmp_path / "block-cost.json").read_text())
    assert found["scaled"]["tuning"] == pytest.approx(found["seconds"]["tuning"] / 2 * 100)
    assert found["peak"] > 0
