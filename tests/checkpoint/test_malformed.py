"""Malformed input: one clear CheckpointError each, naming file, tensor, expected and got."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import CheckpointError, CheckpointWriter, describe, open_checkpoint
from littlebit2_kernels.testing import make_packed
from tests.checkpoint import wild

Tensors = dict[str, torch.Tensor]


def load_all(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        describe(checkpoint)
        for name in checkpoint.layers:
            checkpoint.load_layer(name)
        for name in checkpoint.dense:
            checkpoint.load_tensor(name)


# --- Tensors -----------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Tensors], object]:
    def apply(state: Tensors) -> None:
        del state[name]

    return apply


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    def apply(state: Tensors) -> None:
        state[name] = change(state[name]).contiguous()

    return apply


def spoil(name: str, value: float) -> Callable[[Tensors], object]:
    def apply(state: Tensors) -> None:
        state[name][0, 3] = value

    return apply


def add(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda state: state.update({name: tensor})


def set_pad_bit(state: Tensors) -> None:
    state["U_packed"][2, -1] |= 1 << 30


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing-scale": (drop("u1"), r"m\.a\.u1 is missing"),
    "missing-words": (drop("U_R_packed"), r"m\.a\.U_packed_R is missing"),
    "missing-half-of-the-pair": (drop("u2"), r"m\.a\.u2 is missing"),
    "missing-path-scale": (drop("v2_R"), r"m\.a\.v2_R is missing"),
    "missing-rank-scales": (
        lambda state: [state.pop(name) for name in ("v1", "u2")],
        r"m\.a\.latent_scale is missing",
    ),
    "rank-and-words": (
        put("U_packed", lambda t: t[:, :1]),
        r"m\.a\.U_packed must have shape \[24, 2\], got \[24, 1\]",
    ),
    "rank-and-scale": (
        put("u2", lambda t: t[:, :8]),
        r"m\.a\.u2 must have shape \[1, 40\] or \[40\], got \[1, 8\]",
    ),
    "rows": (put("V_packed", lambda t: t[:8]), r"m\.a\.v1 must have shape \[1, 8\]"),
    "columns": (put("v2", lambda t: t[:, :20]), r"m\.a\.V_packed must have shape \[rows, 1\], got \[40, 2\]"),
    "scale-matrix": (put("u1", lambda t: t.reshape(2, 12)), r"m\.a\.u1 must have shape .*got \[2, 12\]"),
    "empty-scale": (put("v2", lambda t: t[:, :0]), r"m\.a\.v2 must have shape"),
    "word-dtype": (
        put("V_packed", lambda t: t.long()),
        r"m\.a\.V_packed must be torch\.int32, got torch\.int64",
    ),
    "scale-dtype": (put("u1", lambda t: t.int()), r"m\.a\.u1 must be float32, float16 or bfloat16"),
    "shape-dtype": (put("V_shape", lambda t: t.int()), r"m\.a\.V_shape must hold 2 int64, got torch\.int32"),
    "stored-shape": (
        put("V_shape", lambda t: t + 1),
        r"layer m\.a: m\.a\.V_shape = \[41, 41\] does not agree",
    ),
    "nan": (spoil("u1", float("nan")), r"layer m\.a: .*out_scale must be finite, got nan at index 3"),
    "inf": (spoil("v2_R", float("inf")), r"layer m\.a: .*in_scale must be finite, got inf at index 3"),
    "overflowing-product": (
        lambda state: [state[name].fill_(1e38) for name in ("v1", "u2")],
        r"layer m\.a: .*latent_scale must be finite, got inf",
    ),
    "pad-bit": (set_pad_bit, r"layer m\.a: .*u has non-zero pad bits past column 40 \(first in row 2\)"),
    "unexpected": (add("w3", torch.ones(2)), r"m\.a\.w3 is unexpected"),
    "unexpected-path": (add("u1_R1", torch.ones(24)), r"m\.a\.u1_R1 is unexpected"),
    "product-and-factors": (
        add("latent_scale", torch.ones(1, 40)),
        r"m\.a\.latent_scale must not be stored together with v1 and u2",
    ),
    "both-orders": (
        add("U_packed_R", torch.zeros(24, 1, dtype=torch.int32)),
        r"m\.a\.U_(R_packed|packed_R) must not be stored together with m\.a\.U_(R_packed|packed_R)",
    ),
    "gap-in-paths": (add("u1_R3", torch.ones(24)), r"m\.a\.u1_R2 is missing"),
    "bias": (add("bias", torch.ones(25)), r"m\.a\.bias must have shape \[1, 24\] or \[24\], got \[25\]"),
    "shared-with-itself": (add("V_shared", torch.tensor([0])), r"m\.a\.V_shared must name an earlier path"),
    "bias-dtype": (add("bias", torch.ones(24, dtype=torch.float64)), r"m\.a\.bias must be float32"),
}


@pytest.mark.parametrize(("change", "message"), TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_faulty_tensors(
    tmp_path: Path, nprng: np.random.Generator, change: Callable[[Tensors], object], message: str
) -> None:
    state = wild.random_layer(nprng, 40, 24, [40, 16]).upstream()
    change(state)
    wild.write(tmp_path, wild.prefixed({"m.a": state}), config=wild.CONFIG)
    with pytest.raises(CheckpointError, match=message):
        load_all(tmp_path)


def test_all_faults_are_named_at_once(tmp_path: Path, nprng: np.random.Generator) -> None:
    a = wild.random_layer(nprng, 40, 24, [8]).upstream()
    b = wild.random_layer(nprng, 40, 24, [8]).upstream()
    del a["u1"], b["V_packed"]
    b["x"] = torch.ones(1)
    wild.write(tmp_path, wild.prefixed({"a": a, "b": b}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    for text in ("a.u1 is missing", "b.V_packed is missing", "model.safetensors: b.x is unexpected"):
        assert text in str(caught.value)


def test_long_lists_are_cut(tmp_path: Path, nprng: np.random.Generator) -> None:
    state = wild.random_layer(nprng, 40, 24, [8]).upstream()
    state |= {f"x{index}": torch.ones(1) for index in range(50)}
    wild.write(tmp_path, wild.prefixed({"a": state}))
    with pytest.raises(CheckpointError, match="and 30 more"):
        open_checkpoint(tmp_path)


def test_latents_with_nan(tmp_path: Path, nprng: np.random.Generator) -> None:
    state = wild.random_layer(nprng, 40, 24, [8]).latent(nprng)
    state["V"][1, 2] = float("nan")
    wild.write(tmp_path, wild.prefixed({"a": state}))
    with pytest.raises(CheckpointError, match="layer a: values must not contain NaN"):
        load_all(tmp_path)


def test_pad_bits_below_a_padded_rank(tmp_path: Path, nprng: np.random.Generator) -> None:
    state = wild.random_layer(nprng, 40, 24, [20]).nanoquant()
    state["U_packed"][0, 0] |= 1 << 21
    wild.write(tmp_path, wild.prefixed({"a": state}))
    with pytest.raises(CheckpointError, match="layer a: U_packed has non-zero pad bits past column 20"):
        load_all(tmp_path)


def test_mixed_layouts(tmp_path: Path, nprng: np.random.Generator) -> None:
    layer = wild.random_layer(nprng, 40, 24, [8])
    wild.write(tmp_path, wild.prefixed({"a": layer.upstream(), "b": layer.nanoquant()}))
    with pytest.raises(CheckpointError, match=r"one layout, got \['littlebit', 'nanoquant'\]"):
        open_checkpoint(tmp_path)


# --- Our config --------------------------------------------------------------------------------------


def quantization(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].update(changes)


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (quantization(format_version=2), "format_version must be at most 1, .* got 2: install a newer"),
    "no-version": (quantization(format_version=None), "format_version must be a positive integer, got None"),
    "text-version": (quantization(format_version="1"), "format_version must be a positive integer, got '1'"),
    "true-version": (
        quantization(format_version=True),
        "format_version must be a positive integer, got True",
    ),
    "pack": (quantization(pack="msb"), "pack must be 'i32-lsb-neg1', got 'msb'"),
    "ranks": (
        quantization(ranks={"a": [16, 16]}),
        r"ranks of layer a: expected \[16, 16\], .* got \[16, 8\]",
    ),
    "missing-layer": (
        quantization(ranks={"a": [16, 8], "c": [8]}),
        r"ranks of layer c: expected \[8\], as the config says, got None",
    ),
    "unexpected-layer": (quantization(ranks={}), r"ranks of layer a: expected None, .* got \[16, 8\]"),
    "missing-single": (quantization(single_stage=["b", "c"]), "layer 'c': expected a single-stage layer"),
    "unexpected-single": (quantization(single_stage=[]), "layer b: expected in single_stage"),
    "shares": (quantization(shares={"a": [0, 0]}), r"shares of layer a: expected \[0, 0\]"),
    "ranks-type": (quantization(ranks=[1]), "ranks must be an object, got list"),
    "ranks-value": (quantization(ranks={"a": 3}), r"ranks of layer a: expected 3, .* got \[16, 8\]"),
    "no-object": (
        lambda config: config.update(quantization_config=[1]),
        r"quantization_config must be an object, got \[1\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_faulty_config(
    tmp_path: Path, rng: torch.Generator, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with CheckpointWriter(tmp_path / "out", {"model_type": "llama"}) as writer:
        writer.add_layer("a", make_packed(40, 24, (16, 8), generator=rng))
        writer.add_layer("b", make_packed(40, 24, None, generator=rng))
        writer.finish()
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_our_format_is_read_strictly(tmp_path: Path, nprng: np.random.Generator) -> None:
    ours = {
        "quantization_config": {"quant_method": "littlebit2", "format_version": 1, "pack": "i32-lsb-neg1"}
    }
    layer = wild.random_layer(nprng, 40, 24, [8])
    wild.write(tmp_path / "a", wild.prefixed({"a": layer.nanoquant()}), config=ours)
    with pytest.raises(CheckpointError, match=r"littlebit2 format, got \['nanoquant'\]"):
        open_checkpoint(tmp_path / "a")
    state = layer.upstream()
    del state["V_shape"]
    wild.write(tmp_path / "b", wild.prefixed({"a": state}), config=ours)
    with pytest.raises(CheckpointError, match=r"a\.V_shape is missing"):
        open_checkpoint(tmp_path / "b")
    wild.write(
        tmp_path / "c", wild.prefixed({"a": wild.random_layer(nprng, 40, 24, [12]).upstream()}), config=ours
    )
    with pytest.raises(CheckpointError, match="V_packed must have a multiple of 8 rows, got 12"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "littlebit_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "must hold a JSON object, got list"),
        (b"{", "must be JSON in UTF-8"),
        (b'{"a": "\xff"}', "must be JSON in UTF-8"),
        (b'{"a": 1, "a": 2}', "must be JSON in UTF-8: key 'a' is repeated"),
        (b'{"a":' * 100_000, "must be JSON in UTF-8"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "must be JSON in UTF-8"),
    ],
    ids=["list", "cut", "encoding", "repeated", "deep", "long-number"],
)
def test_faulty_json(
    tmp_path: Path, nprng: np.random.Generator, name: str, text: bytes, message: str
) -> None:
    wild.upstream_model(tmp_path, nprng)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        open_checkpoint(tmp_path)


# --- Files -------------------------------------------------------------------------------------------


def write_raw(directory: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (directory / "model.safetensors").write_bytes(prefix + text + data)


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = entry([2], [0, 8])
HEADER_FAULTS: dict[str, tuple[object, int | None, str]] = {
    "huge-length": ({"a": GOOD}, 2**63, "header must fit the file"),
    "long-length": ({"a": GOOD}, 1000, "header must fit the file"),
    "short-length": ({"a": GOOD}, 5, "must be JSON in UTF-8"),
    "list": ([1], None, "must hold a JSON object, got list"),
    "no-entry": ({"a": 3}, None, "tensor a: its header must hold dtype, shape and data_offsets"),
    "dtype": ({"a": entry([2], [0, 8], "F4")}, None, "tensor a: dtype must be one of .* got 'F4'"),
    "dtype-type": ({"a": {**GOOD, "dtype": []}}, None, "tensor a: dtype must be one of"),
    "negative": ({"a": entry([-2], [0, 8])}, None, "must be lists of sizes"),
    "fraction": ({"a": entry([2.0], [0, 8])}, None, "must be lists of sizes"),
    "too-big": ({"a": entry([2**64], [0, 8])}, None, "must be lists of sizes"),
    "offsets": ({"a": entry([2], [8])}, None, "must be lists of sizes"),
    "size": ({"a": entry([3], [0, 8])}, None, r"F32 of shape \[3\] has 12 bytes, got data_offsets \[0, 8\]"),
    "backward": ({"a": entry([2], [8, 0])}, None, "has 8 bytes, got data_offsets"),
    "hole": ({"a": GOOD, "b": entry([0], [9, 9])}, None, "tensor b: its data must begin at offset 8.* got 9"),
    "overlap": ({"a": GOOD, "b": entry([2], [0, 8])}, None, "its data must begin at offset 8, .* got 0"),
    "past-the-end": ({"a": entry([4], [0, 16])}, None, "the file must have .* bytes, as its header says"),
    "unused-bytes": ({"a": entry([1], [0, 4])}, None, "the file must have .* bytes, as its header says"),
    "metadata": ({"__metadata__": {"a": 1}, "a": GOOD}, None, "__metadata__ must map names to strings"),
    "repeated": (b'{"a":' + json.dumps(GOOD).encode() + b',"a":1}', None, "key 'a' is repeated"),
}


@pytest.mark.parametrize(("header", "length", "message"), HEADER_FAULTS.values(), ids=HEADER_FAULTS)
def test_faulty_header(tmp_path: Path, header: object, length: int | None, message: str) -> None:
    write_raw(tmp_path, header, bytes(8), length)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated_file(tmp_path: Path, nprng: np.random.Generator, size: int) -> None:
    wild.upstream_model(tmp_path, nprng)
    file = tmp_path / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-map": (lambda index: index.pop("weight_map"), "weight_map must map tensor names to file names"),
    "empty-map": (lambda index: index.update(weight_map={}), "weight_map must map"),
    "map-values": (lambda index: index["weight_map"].update(x=3), "weight_map must map"),
    "traversal": (
        lambda index: index["weight_map"].update(x="../other.safetensors"),
        "plain name, got '../other",
    ),
    "absolute": (lambda index: index["weight_map"].update(x="/etc/passwd"), "plain name, got '/etc/passwd'"),
    "folder": (lambda index: index["weight_map"].update(x="a/b.safetensors"), "plain name, got 'a/b"),
    "backslash": (lambda index: index["weight_map"].update(x="..\\b"), "plain name"),
    "parent": (lambda index: index["weight_map"].update(x=".."), "plain name"),
    "empty-name": (lambda index: index["weight_map"].update(x=""), "plain name"),
    "nul": (lambda index: index["weight_map"].update(x="a\0b"), "plain name"),
    "surrogate": (lambda index: index["weight_map"].update(x="\ud800"), "missing"),
    "unknown-tensor": (
        lambda index: index["weight_map"].update(x=SHARD_1),
        "tensor x must be in .*00001.* but it is in no shard",
    ),
    "wrong-shard": (
        lambda index: index["weight_map"].update({"lm_head.weight": SHARD_2}),
        "tensor lm_head.weight must be in .*00002.* but it is in .*00001",
    ),
    "missing-shard": (lambda index: index["weight_map"].update(x="z.safetensors"), "missing: z.safetensors"),
    "not-a-shard": (
        lambda index: index["weight_map"].update(x="config.json"),
        "config.json: the header must fit",
    ),
}


@pytest.mark.parametrize(("change", "message"), INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_faulty_index(
    tmp_path: Path,
    nprng: np.random.Generator,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    wild.upstream_model(tmp_path, nprng, shards=2)
    edit_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_missing_shards_are_all_named(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng, shards=2)
    (tmp_path / SHARD_1).unlink()
    (tmp_path / SHARD_2).unlink()
    with pytest.raises(CheckpointError, match=f"shards are missing: {SHARD_1}, {SHARD_2}"):
        open_checkpoint(tmp_path)


def test_duplicate_across_shards(tmp_path: Path) -> None:
    wild.write(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    wild.save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / SHARD_2)
    with pytest.raises(
        CheckpointError, match=f"{SHARD_2}: tensor a must be in one shard, but {SHARD_1} holds"
    ):
        open_checkpoint(tmp_path)


def test_tensor_that_the_index_leaves_out_is_a_remark(tmp_path: Path) -> None:
    wild.write(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    wild.save_file({"b": torch.ones(1), "c": torch.ones(1)}, tmp_path / SHARD_2)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.dense) == {"a", "b"}
        assert any("tensor c of" in problem for problem in checkpoint.problems)


@pytest.mark.parametrize("name", [SHARD_1, "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("target", ["../outside", "/dev/zero", "missing", "loop"])
def test_links_out_of_the_directory(
    tmp_path: Path, nprng: np.random.Generator, name: str, target: str
) -> None:
    directory = tmp_path / "checkpoint"
    wild.upstream_model(directory, nprng, shards=2)
    (directory / name).rename(tmp_path / "outside")
    (directory / name).symlink_to(name if target == "loop" else target)
    with pytest.raises(CheckpointError, match=r"must lie inside|is missing or its link is broken"):
        open_checkpoint(directory)


def test_shards_without_an_index(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=f"index.json is missing: .*{SHARD_1}, {SHARD_2}"):
        open_checkpoint(tmp_path)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected one of model\.safetensors.*got an empty directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="must be a regular file"):
        open_checkpoint(tmp_path)


def test_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    wild.write(tmp_path, {"a": torch.ones(4)})
    with open_checkpoint(tmp_path) as checkpoint:
        wild.write(tmp_path, {"a": torch.ones(8)})
        with pytest.raises(CheckpointError, match="the file was changed while it was open"):
            checkpoint.load_tensor("a")
        (tmp_path / "model.safetensors").write_bytes(b"no")
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load_tensor("a")


def test_pickles_that_are_more_than_tensors(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Path()}, path)
    with pytest.raises(CheckpointError, match="cannot be loaded as tensors alone"):
        open_checkpoint(tmp_path)
    for value, message in (
        ([torch.ones(1)], "must hold a dict of tensors, got list"),
        ({"a": 1}, "must hold dense tensors by name, got int"),
        ({3: torch.ones(1)}, "must hold dense tensors by name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "must hold dense tensors by name"),
        ({"a": torch.ones(1).expand(2**40)}, "must hold dense tensors by name"),
    ):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


def test_messages_are_printable(tmp_path: Path) -> None:
    state = {"a.V_packed": torch.zeros(1, 1, dtype=torch.int32), "a.\x1b[31m\n": torch.ones(1)}
    wild.write(tmp_path, state)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert r"a.\x1b[31m\n is unexpected" in str(caught.value)


@pytest.mark.parametrize("suffix", ["int8", "half2", "marlin"])
def test_nanoquant_layers_in_the_order_of_a_kernel_are_refused(
    tmp_path: Path, nprng: np.random.Generator, suffix: str
) -> None:
    state = wild.random_layer(nprng, 40, 24, [16]).nanoquant()
    for matrix in "UV":
        state[f"{matrix}_{suffix}"] = state.pop(f"{matrix}_packed").to(torch.int8)
        del state[f"{matrix}_shape"]
    wild.write(tmp_path, wild.prefixed({"a.b": state}), config=wild.CONFIG)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"a.b.U_{suffix} is in the order of one of NanoQuant's kernels, which cannot be read" in message
    assert "a.b.V_packed is missing" in message


def test_a_layer_of_scales_alone_is_refused(tmp_path: Path, nprng: np.random.Generator) -> None:
    state = wild.random_layer(nprng, 40, 24, [16]).nanoquant()
    kept = {name: tensor for name, tensor in state.items() if name.startswith("scale")}
    wild.write(tmp_path, wild.prefixed({"a.b": kept}), config=wild.CONFIG)
    with pytest.raises(CheckpointError, match=r"a\.b\.V_packed is missing"):
        open_checkpoint(tmp_path)
