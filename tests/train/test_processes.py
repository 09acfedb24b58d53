"""Two processes (gloo) train as one does: copies of the model, and a model that is sharded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from littlebit2.cli import main
from tests.train.builders import write_teacher, write_text

OPTIONS = [
    *("--ranks", "16", "--init", "joint-itq", "--block", "32", "--steps", "6", "--lr", "1e-3"),
    *("--log-steps", "2", "--save-steps", "2", "--hold-out", "0.1", "--eval-steps", "4"),
    *("--no-tensorboard", "--quiet", "--json"),
]
WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    return folder, write_teacher(folder / "teacher"), write_text(folder / "text.txt", 6000)


@pytest.fixture
def alone(inputs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report of one process that takes twice the batch."""
    folder, teacher, data = inputs
    arguments = ["finetune", str(teacher), str(folder / "alone"), "--data", str(data), *OPTIONS]
    assert main([*arguments, "--batch-size", "8", "--overwrite"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def launch(*arguments: str) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            f"--master-port={port}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("how", ["copies", "sharded"])
def test_two_processes_train_as_one(inputs: tuple[Path, Path, Path], alone: dict[str, Any], how: str) -> None:
    folder, teacher, data = inputs
    out = folder / how
    program = ["-m", "littlebit2"] if how == "copies" else [str(WORKER)]
    options = [*OPTIONS, "--batch-size", "4", "--keep-work", *(["--fsdp"] if how == "sharded" else [])]
    together = launch(*program, "finetune", str(teacher), str(out), "--data", str(data), *options)
    compared = 0
    for one, two in zip(alone["history"], together["history"], strict=True):
        for key in ("loss", "kl", "hidden_mse", "grad_norm", "eval_loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
                compared += 1
        if "flip_rate" in one:
            assert two["flip_rate"] == pytest.approx(one["flip_rate"], abs=1e-4)
    assert compared == 3 * 4 + 3  # evaluated before, once between, and after
    assert together["perplexity"]["packed"] == pytest.approx(alone["perplexity"]["packed"], rel=1e-3)
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in (how, "alone"))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(
        ours["model.layers.0.mlp.up_proj.u1"],
        theirs["model.layers.0.mlp.up_proj.u1"],
        rtol=1e-3,
        atol=1e-5,
    )
    last = folder / f"{how}.finetune" / "checkpoints" / "checkpoint-6"
    flips = [torch.load(last / f"flips-{rank}.pt")["start"] for rank in (0, 1)]
    name = "model.layers.0.mlp.up_proj.paths.0.U"  # [96, 16]: 48 words, or 24 in each half
    assert [words[name].numel() for words in flips] == ([48, 48] if how == "copies" else [24, 24])


@pytest.mark.slow  # three Python processes for one message
def test_sharding_that_would_not_happen_is_refused(inputs: tuple[Path, Path, Path]) -> None:
    folder, teacher, data = inputs
    arguments = ["finetune", str(teacher), str(folder / "x"), "--data", str(data), *OPTIONS, "--fsdp"]
    with pytest.raises(
        AssertionError, match="fsdp must be used on devices that accelerate shards over, got cpu"
    ):
        launch("-m", "littlebit2", *arguments)
