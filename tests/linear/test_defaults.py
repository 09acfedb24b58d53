"""What torch's default dtype and device are does not matter: to results, to files, to moves of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import CheckpointWriter, open_checkpoint
from littlebit2_kernels import LittleBitLinear, littlebit_linear
from littlebit2_kernels.testing import make_packed, make_problem
from tests.checkpoint import wild
from tests.checkpoint.test_foreign import five


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default dtype, set when a test asks for it by entering the returned dtype."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def test_scales_that_are_balanced_for_float16(rng: torch.Generator, default_dtype: torch.dtype) -> None:
    x, packed = make_problem(3, 64, 40, [16, 8], dtype=torch.float16, generator=rng)
    expected = littlebit_linear(x, packed, backend="blas")
    torch.set_default_dtype(default_dtype)
    assert torch.equal(littlebit_linear(x, packed, backend="blas"), expected)


@pytest.mark.parametrize("kind", ["dbf", "nanoquant"])
def test_scales_that_a_foreign_layout_leaves_out(
    tmp_path: Path, rng: torch.Generator, default_dtype: torch.dtype, kind: str
) -> None:
    name = "model.layers.0.mlp.up_proj"
    nprng = np.random.default_rng(rng.initial_seed())
    layer = wild.random_layer(nprng, 40, 24, [16])
    state = five(nprng, 40, 24, 16, torch.float32) if kind == "dbf" else layer.nanoquant()
    wild.write(tmp_path / kind, wild.prefixed({name: state}), config=wild.CONFIG)
    with open_checkpoint(tmp_path / kind) as checkpoint:
        (read,) = checkpoint.layers
        expected = checkpoint.load_layer(read).paths[0]
    torch.set_default_dtype(default_dtype)
    with open_checkpoint(tmp_path / kind) as checkpoint:
        path = checkpoint.load_layer(read).paths[0]
    for scale in ("in_scale", "latent_scale", "out_scale"):
        assert torch.equal(getattr(path, scale), getattr(expected, scale))


def test_files_are_read_under_a_default_device(tmp_path: Path, rng: torch.Generator) -> None:
    packed = make_packed(40, 24, (16,), generator=rng)
    with CheckpointWriter(tmp_path / "ours", wild.CONFIG) as writer:
        writer.add_layer("m.a", packed)
        writer.finish()
    with torch.device("meta"), open_checkpoint(tmp_path / "ours") as checkpoint:
        read = checkpoint.load_layer("m.a")
    assert torch.equal(read.paths[0].v, packed.paths[0].v)


def test_a_prepacked_layer_keeps_its_bytes_under_a_default_device(rng: torch.Generator) -> None:
    layer = LittleBitLinear.from_packed(make_packed(40, 24, (16,), generator=rng)).prepack_()
    with torch.device("meta"):
        layer.half()
    assert layer._buffers["prepacked"].device.type == "cpu"
