"""kill -9 at any moment: the same command finishes, byte for byte the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.offline.builders import contents, llama_tensors, write_model

#: Kills itself before the k-th change of the file system, for every k, each time in a fork.
EVERY_CHANGE = """
import itertools, sys
from pathlib import Path
from littlebit2.quantize import QuantConfig
from littlebit2.offline import quantize_checkpoint
from tests.harness.killing import changes_of
from tests.offline.builders import QUICK, contents
import torch

torch.set_num_threads(1)
model_dir, base = Path(sys.argv[1]), Path(sys.argv[2])

def run(out):
    quantize_checkpoint(model_dir, out, QuantConfig(**QUICK), workers=1, progress=False)

run(base / "whole")
expected = contents(base / "whole")
for number in itertools.count(1):
    out = base / str(number)
    killed = changes_of(run, out, kill_before=number) is None
    run(out)
    assert contents(out) == expected, number
    if not killed:
        break
    left = [path.name for path in base.iterdir() if path.name.startswith((f"{number}.", f".{number}."))]
    assert left == [], left
print(number)
"""


def test_killed_before_every_change_of_the_file_system(tmp_path: Path, rng: torch.Generator) -> None:
    model_dir = write_model(tmp_path / "dense", llama_tensors(rng, layers=1))
    base = tmp_path / "runs"
    base.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", EVERY_CHANGE, str(model_dir), str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Seven layers of one file each, the shards, report, configuration, renames and removals.
    assert int(result.stdout) > 30


def command(model_dir: Path, out: Path) -> list[str]:
    options = [
        "--ranks",
        "16",
        "8",
        "--method",
        "joint-itq",
        "--itq-iterations",
        "40",
        "--workers",
        "2",
        "--quiet",
    ]
    return [sys.executable, "-m", "littlebit2", "quantize", str(model_dir), str(out), *options]


def test_killed_from_outside_at_random_moments(
    tmp_path: Path, rng: torch.Generator, request: pytest.FixtureRequest
) -> None:
    model_dir = write_model(tmp_path / "dense", llama_tensors(rng, layers=6))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    moments = random.Random(request.node.nodeid)
    kills = 0
    for _ in range(2):
        before = len(list(partial.glob("*.safetensors")))
        wanted = before + moments.randint(1, 15)
        process = subprocess.Popen(command(model_dir, out), env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(partial.glob("*.safetensors"))) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills > 0
    for target in (out, tmp_path / "whole"):
        subprocess.run(command(model_dir, target), env=environment, check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert not partial.exists()
