"""The summary of a checkpoint: its numbers are those of the papers' formula and of the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import CheckpointWriter, describe, open_checkpoint
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.testing import make_packed
from tests.checkpoint import wild
from tests.checkpoint.wild import UP, Q


def test_authors_checkpoint(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng)
    with open_checkpoint(tmp_path) as checkpoint:
        summary = json.loads(json.dumps(describe(checkpoint)))
    assert summary["format"] == "littlebit"
    assert summary["model_type"] == "llama"
    assert summary["layers"][Q]["counted_bpw"] == pytest.approx(LayerShape(48, 40, (16, 16)).counted_bpw)
    up = summary["layers"][UP]
    assert up["ranks"] == [40, 40]
    words, scales = 2 * (100 * 2 + 40 * 2) * 4, 2 * (100 + 40 + 40 + 48) * 2
    assert up["stored_bpw"] == pytest.approx(8 * (words + scales) / (48 * 100))
    assert up["bytes"] == words + scales + 2 * 2 * 16 + 4 + 8 + 4
    totals = summary["totals"]
    assert totals["packed_weights"] == 48 * 40 + 48 * 100
    assert totals["dense_parameters"] == 2 * 11 * 48 + 48
    assert totals["bytes"]["dense"] == 2 * totals["dense_parameters"]
    assert totals["bytes"]["bias"] == 2 * 40
    assert totals["bytes"]["all"] == sum(size for part, size in totals["bytes"].items() if part != "all")
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert totals["bytes"]["all"] == (tmp_path / "model.safetensors").stat().st_size - header


def test_our_checkpoint(tmp_path: Path, rng: torch.Generator) -> None:
    packed = make_packed(64, 96, (16, 8), bias=True, generator=rng)
    single = make_packed(64, 96, None, generator=rng)
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add_layer("a", packed)
        writer.add_layer("b", single)
        writer.finish()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        layers = describe(checkpoint)["layers"]
    assert layers["a"]["counted_bpw"] == pytest.approx(LayerShape(64, 96, (16, 8)).counted_bpw)
    assert layers["a"]["stored_bpw"] == pytest.approx(packed.shape.stored_bpw)
    assert layers["b"]["ranks"] is None
    assert layers["b"]["counted_bpw"] == pytest.approx(1 + 16 * (64 + 96) / (64 * 96))
    assert layers["b"]["stored_bpw"] == pytest.approx(single.shape.stored_bpw)


def test_dense_checkpoint(tmp_path: Path) -> None:
    wild.write(tmp_path, {"a.weight": torch.ones(3, 3)}, config={})
    with open_checkpoint(tmp_path) as checkpoint:
        summary = describe(checkpoint)
    assert summary["totals"]["counted_bpw"] is None
    assert summary["dense"] == {"a.weight": {"shape": [3, 3], "dtype": "float32", "bytes": 36}}
