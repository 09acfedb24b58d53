"""A run that is killed with SIGKILL continues, and logs what it would have logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from littlebit2.cli import main
from tests.train.builders import write_teacher, write_text

STEPS = 40
OPTIONS = f"""
    --ranks 8 --init dual-svid --block 32 --steps {STEPS} --batch-size 4 --lr 1e-3 --log-steps 2
    --save-steps 4 --hold-out 0.1 --eval-steps 20 --no-tensorboard --quiet --json
""".split()


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in report["history"] if "train_runtime" not in entry]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads: runs that are to agree to the bit must have the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_killed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = write_teacher(tmp_path / "teacher")
    data = write_text(tmp_path / "text.txt", 6000)

    def command(out: Path) -> list[str]:
        return ["finetune", str(teacher), str(out), "--data", str(data), *OPTIONS]

    whole = run_main(capsys, *command(tmp_path / "whole"))
    killed = tmp_path / "killed"
    checkpoints = tmp_path / "killed.finetune" / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-m", "littlebit2", *command(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        give_up = time.monotonic() + 300
        while not (checkpoints / "checkpoint-4" / "complete").exists():
            assert process.poll() is None, process.stderr.read() if process.stderr else b""
            assert time.monotonic() < give_up
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    # What a process that is killed while it writes a checkpoint leaves: later steps, without the mark.
    torn = checkpoints / f"checkpoint-{STEPS - 1}"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half a file")
    resumed = run_main(capsys, *command(killed))
    assert entries(resumed) == entries(whole)
    assert resumed["perplexity"] == whole["perplexity"]
    name = "model.safetensors"
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not torn.exists()
