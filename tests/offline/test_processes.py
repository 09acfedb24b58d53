"""Several processes, as torchrun starts them, share one run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from littlebit2.architecture.parts import Whole
from littlebit2.architecture.tensors import LayerSource
from littlebit2.offline import quantize_checkpoint
from littlebit2.offline.group import share_out
from littlebit2.offline.jobs import Job
from littlebit2.quantize import QuantConfig
from tests.offline.builders import QUICK, contents, llama_tensors, write_model

QUICK_OPTIONS = (
    *("--ranks", *map(str, QUICK["ranks"])),  # type: ignore[call-overload]
    *("--method", str(QUICK["method"]), "--itq-iterations", str(QUICK["itq_iterations"])),
)


def start(rank: int, port: int, model_dir: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["-m", "littlebit2", "quantize", str(model_dir), str(out), *options]
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (QUICK_OPTIONS, QuantConfig(**QUICK)),
        (
            ("--bpw", "3", "--budget", "spectral", "--admm-iterations", "3"),
            QuantConfig(bpw=3.0, budget="spectral", admm_iterations=3),
        ),
    ],
    ids=["uniform", "spectral"],
)
def test_two_processes_write_what_one_writes(
    options: tuple[str, ...], config: QuantConfig, model_dir: Path, tmp_path: Path
) -> None:
    port = free_port()
    crew = [start(rank, port, model_dir, tmp_path / "two", *options) for rank in range(2)]
    results = [process.communicate(timeout=120) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], results
    assert "14 layers" in results[0][0]
    assert results[1][0] == ""
    quantize_checkpoint(model_dir, tmp_path / "one", config, workers=1, progress=False)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not (tmp_path / "two.partial").exists()


def test_a_failure_of_one_process_is_a_failure_of_all(tmp_path: Path, rng: torch.Generator) -> None:
    tensors = llama_tensors(rng)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    model_dir = write_model(tmp_path / "bad", tensors)
    port = free_port()
    crew = [start(rank, port, model_dir, tmp_path / "two", *QUICK_OPTIONS, "--quiet") for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in crew]
    assert [process.returncode for process in crew] == [1, 1]
    assert sum("error: layer 'model.layers.1.mlp.up_proj': weight must be finite" in e for e in errors) == 1
    assert sum("error: rank " in e for e in errors) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_whole_and_even(size: int) -> None:
    config = QuantConfig(ranks=(8,))
    shapes = [(64, 64)] * 10 + [(64, 256)] * 6
    jobs = [
        Job(i, LayerSource(str(i), k, n, Whole(f"{i}.weight"), None), config)
        for i, (k, n) in enumerate(shapes)
    ]
    shares = share_out(jobs, size)
    assert sorted(job.index for share in shares for job in share) == list(range(16))
    assert all([job.index for job in share] == sorted(job.index for job in share) for share in shares)
    loads = [sum(job.cost for job in share) for share in shares]
    assert max(loads) - min(loads) <= max(job.cost for job in jobs)
