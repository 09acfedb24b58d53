"""Our own checkpoints: what is written, that it is all or nothing, and that it reads back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from littlebit2.checkpoint import (
    CheckpointWriter,
    LayerSpec,
    open_checkpoint,
    quantization_config,
)
from littlebit2_kernels import PackedLinear, PackedPath, packed_to_state
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.testing import make_packed
from tests.checkpoint import wild
from tests.disk.limits import files_up_to


def layer(
    rng: torch.Generator, ranks: tuple[int, ...] | None = (16, 8), *, bias: bool = True
) -> PackedLinear:
    return make_packed(40, 24, ranks, bias=bias, generator=rng)


def shared(rng: torch.Generator) -> PackedLinear:
    first, second = layer(rng, (16, 16)).paths
    return PackedLinear(
        (first, PackedPath(first.v, first.in_scale, second.out_scale, second.u, second.latent_scale))
    )


def check_equal(got: PackedLinear, wanted: PackedLinear) -> None:
    ours, theirs = packed_to_state(got), packed_to_state(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def nothing_but(directory: Path, *names: str) -> bool:
    return sorted(item.name for item in directory.iterdir()) == sorted(names)


@pytest.mark.parametrize("limit", [10**9, 3000, 1])
def test_round_trip(tmp_path: Path, rng: torch.Generator, limit: int) -> None:
    layers = {
        "m.a": layer(rng),
        "m.b": shared(rng),
        "m.c": layer(rng, None),
        "m.d": layer(rng, (8, 24, 16), bias=False),
    }
    dense = {
        "m.embed.weight": torch.randn(5, 40, generator=rng).to(torch.bfloat16),
        "m.count": torch.tensor(3),
        "m.mask": torch.tensor([True, False, True]),
        "m.none": torch.empty(0, 4),
        "m.strided": torch.randn(6, 4, generator=rng).T,
    }
    config = {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "x"},
    }
    with CheckpointWriter(tmp_path / "out", config, max_shard_bytes=limit) as writer:
        for name, packed in layers.items():
            writer.add_layer(name, packed)
        for name, tensor in dense.items():
            writer.add_tensor(name, tensor)
        writer.finish()
    assert nothing_but(tmp_path, "out")
    assert config["quantization_config"] == {"quant_method": "x"}
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.format == "littlebit2"
        assert checkpoint.problems == []
        assert set(checkpoint.layers) == set(layers)
        for name, packed in layers.items():
            check_equal(checkpoint.load_layer(name), packed)
        for name, tensor in dense.items():
            assert torch.equal(checkpoint.load_tensor(name), tensor), name
        assert checkpoint.config["quantization_config"] == {
            "quant_method": "littlebit2",
            "format_version": 1,
            "pack": "i32-lsb-neg1",
            "ranks": {"m.a": [16, 8], "m.b": [16, 16], "m.d": [8, 24, 16]},
            "single_stage": ["m.c"],
            "shares": {"m.b": [0, 0]},
            "modules_to_not_convert": ["m.embed", "lm_head"],
        }
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (limit == 10**9)
    assert (files[0].name == "model.safetensors") == (limit == 10**9)
    for file in files:
        with safetensors.safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
            assert len(metadata.pop("sha256")) == 64
            assert metadata == {"format": "pt", "quant_method": "littlebit2", "format_version": "1"}
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            assert header % 8 == 0
            widths = [handle.get_tensor(name).element_size() for name in handle.offset_keys()]
        assert widths == sorted(widths, reverse=True), "narrow tensors first would misalign the wide ones"


def test_same_calls_give_the_same_bytes(tmp_path: Path, rng: torch.Generator) -> None:
    packed, tensor = layer(rng), torch.randn(5, 40, generator=rng)
    for out in ("a", "b"):
        with CheckpointWriter(tmp_path / out, {"model_type": "llama"}, max_shard_bytes=1000) as writer:
            writer.add_layer("m.q", packed)
            writer.add_tensor("m.e.weight", tensor)
            writer.finish()
    names = sorted(item.name for item in (tmp_path / "a").iterdir())
    assert "model-00001-of-00002.safetensors" in names
    assert nothing_but(tmp_path / "b", *names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_given_modules_to_not_convert_are_kept(tmp_path: Path, rng: torch.Generator) -> None:
    config = {"quantization_config": {"modules_to_not_convert": ["lm_head", "vision"]}}
    with CheckpointWriter(tmp_path / "out", config) as writer:
        writer.add_layer("q", layer(rng))
        writer.finish()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["modules_to_not_convert"] == ["lm_head", "vision"]


def test_config_of_several_single_stage_paths() -> None:
    config = quantization_config([LayerSpec("a", LayerShape(8, 8, None, (0, 1)), False)], [])
    assert (config["single_stage"], config["shares"], config["ranks"]) == (["a"], {"a": [0, 1]}, {})


@pytest.mark.parametrize("how", ["exception", "no finish"])
def test_nothing_is_left_of_a_broken_write(tmp_path: Path, rng: torch.Generator, how: str) -> None:
    def broken() -> None:
        with CheckpointWriter(tmp_path / "out", {}, max_shard_bytes=100) as writer:
            writer.add_layer("a", layer(rng))
            writer.add_layer("b", layer(rng))
            if how == "exception":
                raise KeyboardInterrupt

    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            broken()
    else:
        broken()
    assert nothing_but(tmp_path)


WRITE_AND_HANG = """
import sys, time, torch
from littlebit2.checkpoint import CheckpointWriter
with CheckpointWriter(sys.argv[1], {}, max_shard_bytes=1000) as writer:
    for index in range(5):
        writer.add_tensor(f"t{index}", torch.ones(500))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_kill_leaves_no_output_and_a_rerun_works(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_HANG, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (running,) = tmp_path.iterdir()
    assert running != out
    with CheckpointWriter(out, {}):
        assert running.exists(), "a live writer's directory must be left alone"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert running.exists()
    with CheckpointWriter(out, {}) as writer:
        assert not running.exists(), "a dead writer's directory must go"
        writer.add_tensor("t", torch.ones(3))
        writer.finish()
    assert nothing_but(tmp_path, "out")
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint.dense) == {"t"}


def test_existing_output(tmp_path: Path, rng: torch.Generator) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number in (1, 2):  # an empty directory may be filled, a full one only be replaced
        with CheckpointWriter(out, {"number": number}, overwrite=number == 2) as writer:
            writer.add_layer(f"layer{number}", layer(rng))
            writer.finish()
        assert json.loads((out / "config.json").read_text())["number"] == number
        assert nothing_but(tmp_path, "out")
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint.layers) == {"layer2"}
    with pytest.raises(FileExistsError, match="must be a new or empty directory"):
        CheckpointWriter(out, {})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="must be a checkpoint to be overwritten"):
        CheckpointWriter(tmp_path / "home", {}, overwrite=True)
    with pytest.raises(FileExistsError, match="no directory"):
        CheckpointWriter(tmp_path / "home" / "letter.txt", {}, overwrite=True)


@pytest.mark.parametrize("entries", [500, 500_000], ids=["buffered", "unbuffered"])
def test_a_full_disk_names_path_and_sizes_and_leaves_nothing(tmp_path: Path, entries: int) -> None:
    def write() -> None:
        with CheckpointWriter(tmp_path / "out", {}) as writer:
            writer.add_tensor("a", torch.ones(entries))
            writer.finish()

    with (
        files_up_to(1000),
        pytest.raises(OSError, match=rf"write .*out\.partial-.* \({entries * 4e-6:.3f} MB\): File"),
    ):
        write()
    assert not list(tmp_path.iterdir())


def test_output_that_appears_meanwhile_is_not_touched(tmp_path: Path, rng: torch.Generator) -> None:
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add_layer("a", layer(rng))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
        with pytest.raises(FileExistsError, match="new or empty"):
            writer.finish()
    assert nothing_but(tmp_path, "out")
    assert nothing_but(tmp_path / "out", "config.json")


def test_bad_arguments(tmp_path: Path, rng: torch.Generator) -> None:
    with pytest.raises(TypeError, match="config must be a dict, got list"):
        CheckpointWriter(tmp_path / "out", [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        CheckpointWriter(tmp_path / "out", {}, max_shard_bytes=0)
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        with pytest.raises(ValueError, match="at least one tensor"):
            writer.finish()
        with pytest.raises(TypeError, match="packed must be a PackedLinear, got Tensor"):
            writer.add_layer("a", torch.ones(1))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="name must be a module path"):
            writer.add_layer("", layer(rng))
        writer.add_layer("a", layer(rng))
        with pytest.raises(ValueError, match=r"a\.V_packed, which was added before"):
            writer.add_layer("a", layer(rng))
        with pytest.raises(ValueError, match=r"a\.bias, which was added before"):
            writer.add_tensor("a.bias", torch.ones(2))
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
            writer.add_tensor("x", [1])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="meta device"):
            writer.add_tensor("x", torch.ones(1, device="meta"))
        with pytest.raises(TypeError, match="dense tensor"):
            writer.add_tensor("x", torch.ones(2, 2).to_sparse())
        with pytest.raises(ValueError, match="name must be a tensor name"):
            writer.add_tensor("__metadata__", torch.ones(1))
        writer.finish()
        with pytest.raises(RuntimeError, match="already finished"):
            writer.finish()


def test_writing_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Twenty tensors of 16 MiB in one shard: the process may not grow by more than a few of them."""
    script = """
import resource, sys, torch
from littlebit2.checkpoint import CheckpointWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ones(2**22).sum(); before = peak()
with CheckpointWriter(sys.argv[1], {}) as writer:
    for index in range(20):
        writer.add_tensor(f"t{index}", torch.full((2**22,), float(index)))
    writer.finish()
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 3 * 16


def test_written_by_us_read_by_the_formats_definition(tmp_path: Path, nprng: np.random.Generator) -> None:
    """The bits on disk are those of the independent packer."""
    signs = nprng.choice([-1.0, 1.0], (24, 40))
    packed = PackedLinear((PackedPath(wild.pack(signs), torch.ones(40), torch.ones(24)),))
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.add_layer("a", packed)
        writer.finish()
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="np") as handle:
        words = handle.get_tensor("a.V_packed")
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :40]
    np.testing.assert_array_equal(1.0 - 2.0 * bits, signs)
