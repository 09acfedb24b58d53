"""Conversion between the layouts, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from littlebit2.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    convert,
    export_upstream,
    open_checkpoint,
)
from littlebit2_kernels import PackedLinear, PackedPath, packed_to_state
from littlebit2_kernels.testing import make_packed
from tests.checkpoint import wild
from tests.checkpoint.wild import UP, Q


def check_same(a: Path, b: Path) -> None:
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        assert set(first.layers) == set(second.layers)
        for name, spec in first.layers.items():
            assert second.layers[name] == spec
            ours = packed_to_state(second.load_layer(name))
            for leaf, tensor in packed_to_state(first.load_layer(name)).items():
                assert torch.equal(ours[leaf], tensor), (name, leaf)
        assert set(first.dense) == set(second.dense)
        for name in first.dense:
            assert torch.equal(first.load_tensor(name), second.load_tensor(name)), name


@pytest.mark.parametrize("paths", [1, 2])
def test_there_and_back(tmp_path: Path, nprng: np.random.Generator, paths: int) -> None:
    theirs, ours, back, again = (tmp_path / name for name in ("theirs", "ours", "back", "again"))
    layers = wild.upstream_model(theirs, nprng, paths=paths, shards=2)
    (theirs / "tokenizer.json").write_text("{}")
    convert(theirs, ours, "littlebit2")
    check_same(theirs, ours)
    with open_checkpoint(ours) as checkpoint:
        assert checkpoint.format == "littlebit2"
        assert checkpoint.problems == []
        assert checkpoint.metadata["quant_func"] == "SmoothSign"
        assert checkpoint.config["quantization_config"]["ranks"] == {Q: [16] * paths, UP: [40] * paths}
        assert checkpoint.config["quantization_config"]["modules_to_not_convert"] == [
            "lm_head",
            "model.embed_tokens",
        ]
    assert not (ours / "littlebit_config.json").exists()
    convert(ours, back, "littlebit")
    check_same(theirs, back)
    assert json.loads((back / "config.json").read_text()) == wild.CONFIG
    assert json.loads((back / "littlebit_config.json").read_text()) == wild.SETTINGS | {
        "residual": paths == 2
    }
    convert(back, again, "littlebit2")
    check_same(ours, again)
    for directory in (ours, back, again):
        assert (directory / "tokenizer.json").read_text() == "{}"
    names = set(safetensors.torch.load_file(back / "model.safetensors"))
    expected = wild.prefixed({name: layer.upstream() for name, layer in layers.items()})
    assert {name for name in names if name.startswith((Q, UP))} == set(expected)


def test_exported_tensors(tmp_path: Path, nprng: np.random.Generator) -> None:
    """Names, shapes and dtypes are the authors'; v1 carries the folded scale and u2 is one."""
    layers = wild.upstream_model(tmp_path / "theirs", nprng, dtype=torch.float32)
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        export_upstream(checkpoint, tmp_path / "out")
    got = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in layers.items():
        for leaf, tensor in layer.upstream(torch.float32).items():
            mine = got[f"{name}.{leaf}"]
            assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), leaf
            if leaf.startswith("u2"):
                assert torch.equal(mine, torch.ones_like(mine))
            elif leaf.startswith("v1"):
                assert torch.equal(mine, tensor * layer.upstream(torch.float32)[leaf.replace("v1", "u2")])
            elif not leaf.startswith("_"):
                assert torch.equal(mine, tensor), leaf


def test_settings_are_described_where_none_are_known(tmp_path: Path, rng: torch.Generator) -> None:
    with CheckpointWriter(tmp_path / "ours", {}) as writer:
        writer.add_layer("a.q_proj", make_packed(64, 64, (16,), generator=rng))
        writer.finish()
    convert(tmp_path / "ours", tmp_path / "out", "littlebit")
    settings = json.loads((tmp_path / "out" / "littlebit_config.json").read_text())
    assert settings["residual"] is False
    assert settings["split_dim"] == 16
    assert settings["eff_bit"] == pytest.approx((16 * (128 + 16) + 16 * 128) / 64**2)


def test_latents_become_packed(tmp_path: Path, nprng: np.random.Generator) -> None:
    layers, dense = wild.model(nprng)
    states = {name: layer.latent(nprng) for name, layer in layers.items()}
    wild.write(
        tmp_path / "theirs", wild.prefixed(states) | dense, config=wild.CONFIG, littlebit=wild.SETTINGS
    )
    convert(tmp_path / "theirs", tmp_path / "ours", "littlebit2")
    check_same(tmp_path / "theirs", tmp_path / "ours")


def test_what_the_authors_layout_cannot_hold(tmp_path: Path, rng: torch.Generator) -> None:
    def problem(ranks: tuple[int, ...] | None) -> PackedLinear:
        return make_packed(40, 24, ranks, generator=rng)

    first, second = problem((8, 8)).paths
    sharing = PackedPath(first.v, first.in_scale, second.out_scale, second.u, second.latent_scale)
    layers = {
        "three": problem((8, 8, 8)),
        "unequal": problem((8, 16)),
        "single": problem(None),
        "shared": PackedLinear((first, sharing)),
        "lm_head": problem((8, 8)),
        "m.0.q_proj": problem((8, 8)),
    }
    with CheckpointWriter(tmp_path / "ours", {}) as writer:
        for name, packed in layers.items():
            writer.add_layer(name, packed)
        writer.add_tensor("m.1.q_proj.weight", torch.ones(4, 4))
        writer.finish()
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "ours", tmp_path / "out", "littlebit")
    for text in (
        "layer three: expected one or two paths, got 3",
        "layer unequal: expected equal ranks, got [8, 16]",
        "layer single: expected two stages, got one",
        "layer shared: expected a V of its own in every path, got shares [0, 0]",
        "layer lm_head: expected a dense head",
        "layer m.1.q_proj: expected a packed layer like others of its name, got a dense one",
        "expected the same number of paths in every layer, got [1, 2, 3]",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_targets_and_sources(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path / "a", nprng)
    with pytest.raises(ValueError, match="to must be 'littlebit2' or 'littlebit', got 'gguf'"):
        convert(tmp_path / "a", tmp_path / "out", "gguf")
    wild.write(tmp_path / "dense", {"a.weight": torch.ones(3, 3)}, config={})
    for to in ("littlebit", "littlebit2"):
        with pytest.raises(CheckpointError, match="got a dense model"):
            convert(tmp_path / "dense", tmp_path / "out", to)
        with pytest.raises(FileExistsError):
            convert(tmp_path / "a", tmp_path / "a", to)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "dense"]


def test_a_damaged_layer_leaves_no_output(tmp_path: Path, nprng: np.random.Generator) -> None:
    layers, dense = wild.model(nprng)
    states = {name: layer.upstream() for name, layer in layers.items()}
    states[UP]["u1"][0, 5] = float("nan")
    wild.write(tmp_path / "theirs", wild.prefixed(states) | dense, config=wild.CONFIG)
    for to in ("littlebit", "littlebit2"):
        with pytest.raises(CheckpointError, match=r"up_proj.*out_scale must be finite, got nan at index 5"):
            convert(tmp_path / "theirs", tmp_path / "out", to)
    assert [item.name for item in tmp_path.iterdir()] == ["theirs"]
