"""Peak memory does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Prints the peak of resident memory (bytes) before and after quantizing a checkpoint. File pages count.
MEASURE = """
import sys
from pathlib import Path
import torch
from littlebit2.quantize import QuantConfig
from littlebit2.offline import quantize_checkpoint

torch.set_num_threads(1)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

rank, method = int(sys.argv[5]), sys.argv[6]
few = {"method": method, "admm_iterations": 1, "refine_rounds": 1}
config = QuantConfig(ranks=(rank,), **few)
# What torch and LAPACK take once, whatever they work on.
quantize_checkpoint(sys.argv[1], sys.argv[4], QuantConfig(ranks=(8,), **few), workers=1, progress=False)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
quantize_checkpoint(sys.argv[2], sys.argv[3], config, workers=1, progress=False)
print(before, peak())
"""

#: Square, where a Gram matrix would be as large as the layer, and large enough that the fixed buffers of
#: BLAS are small beside it.
ROWS = COLUMNS = 2048
LAYER_BYTES = 4 * ROWS * COLUMNS


def write_layers(
    path: Path, count: int, columns: int, rng: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Path:
    path.mkdir()
    tensors = {
        f"layers.{i}.weight": torch.randn(ROWS, columns, generator=rng).to(dtype) for i in range(count)
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "none"}))
    return path


def growth(
    tmp_path: Path,
    layers: int,
    rng: torch.Generator,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rank: int = 8,
    method: str = "dual-svid",
) -> float:
    """Peak above what the process had before, in layers' worth of float32, in which a layer is computed."""
    warm_up = write_layers(tmp_path / f"small-{layers}", 1, 256, rng)
    model = write_layers(tmp_path / f"model-{layers}", layers, COLUMNS, rng, dtype)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            *map(
                str, (warm_up, model, tmp_path / f"out-{layers}", tmp_path / f"warm-{layers}", rank, method)
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
        # The allocator maps and returns blocks of 32 MB and more, as real layers are, in any case; smaller
        # ones like these only if told so.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"},
    )
    before, after = map(int, result.stdout.split())
    return (after - before) / LAYER_BYTES


def test_eight_layers_take_less_than_two(tmp_path: Path, rng: torch.Generator) -> None:
    one, eight = growth(tmp_path, 1, rng), growth(tmp_path, 8, rng)
    print(f"peak: {one:.2f} layers' worth for 1 layer, {eight:.2f} for 8")
    assert eight < 2
    assert eight < one + 0.2


def test_a_float32_source_is_not_held_twice(tmp_path: Path, rng: torch.Generator) -> None:
    peak = growth(tmp_path, 1, rng, torch.float32)
    print(f"peak: {peak:.2f} layers' worth for a float32 source")
    assert peak < 1.95


def test_the_duals_of_admm_are_no_layer_of_their_own(tmp_path: Path, rng: torch.Generator) -> None:
    # Rank 1000 is 1.0 bpw: in float32 the duals would take 0.98 of a layer.
    peak = growth(tmp_path, 1, rng, rank=1000, method="admm")
    print(f"peak: {peak:.2f} layers' worth for admm at 1.0 bpw")
    assert peak < 2.6  # it was 2.95 with them in float32, and with systems factorized in copies
