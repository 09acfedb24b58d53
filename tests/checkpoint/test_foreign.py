"""Layouts of other people's code, written and decoded here without any of this project's code.

The decoders follow the descriptions in docs/checkpoints.md, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from littlebit2.checkpoint import CheckpointError, convert, describe, open_checkpoint
from littlebit2_kernels.reference import dense_weight
from tests.checkpoint import wild

Array = npt.NDArray[np.float64]
NAME = "model.layers.0.self_attn.q_proj"


def stored(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def check(directory: Path, expected: Mapping[str, Array], layout: str) -> None:
    """Weights read in place, and again after a conversion to our format."""
    out = directory.with_name(directory.name + "-ours")
    convert(directory, out, "littlebit2")
    for path, name in ((directory, layout), (out, "littlebit2")):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.format == name
            assert set(checkpoint.layers) == set(expected)
            assert describe(checkpoint)["totals"]["bytes"]["packed"] > 0
            for layer, weight in expected.items():
                got = dense_weight(checkpoint.load_layer(layer), torch.float64).numpy()
                np.testing.assert_allclose(got, weight, rtol=1e-6, atol=1e-6 * np.abs(weight).max())


# Double Binary Factorization.


def flat_bits(signs: Array) -> torch.Tensor:
    """Most significant bit first, a set bit for +1, rows without padding."""
    flat = (signs.flatten() > 0).astype(int).tolist()
    flat += [0] * (-len(flat) % 8)
    values = [sum(bit << (7 - i) for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)]
    return torch.tensor(values, dtype=torch.uint8)


def decode_bits(packed: torch.Tensor, rows: int, cols: int) -> Array:
    signs = np.empty(rows * cols)
    for index in range(rows * cols):
        signs[index] = 1.0 if packed[index // 8].item() >> (7 - index % 8) & 1 else -1.0
    return signs.reshape(rows, cols)


def five(
    nprng: np.random.Generator, k: int, n: int, rank: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    def scale(size: int) -> torch.Tensor:
        return torch.from_numpy(nprng.normal(size=size)).to(dtype)

    def signs(rows: int, cols: int) -> torch.Tensor:
        return flat_bits(nprng.choice([-1.0, 1.0], (rows, cols)))

    return {
        "0.w": scale(k),
        "1.bp": signs(rank, k),
        "2.w": scale(rank),
        "3.bp": signs(n, rank),
        "4.w": scale(n),
    }


def weight_of_five(state: Mapping[str, torch.Tensor]) -> Array:
    w0, w2, w4 = (stored(state[name]) for name in ("0.w", "2.w", "4.w"))
    v = decode_bits(state["1.bp"], len(w2), len(w0))
    u = decode_bits(state["3.bp"], len(w4), len(w2))
    weight: Array = np.diag(w4) @ u @ np.diag(w2) @ v @ np.diag(w0)
    return weight


DENSE = {"model.embed_tokens.weight": torch.ones(3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "n", "rank"), [(32, 24, 16), (40, 33, 12), (13, 7, 5), (64, 64, 64), (9, 3, 3)]
)
def test_double_binary(
    tmp_path: Path, nprng: np.random.Generator, k: int, n: int, rank: int, dtype: torch.dtype
) -> None:
    states = {NAME: five(nprng, k, n, rank, dtype), "lm_head": five(nprng, n, k, rank, dtype)}
    (tmp_path / "dbf").mkdir()
    torch.save(wild.prefixed(states) | DENSE, tmp_path / "dbf" / "llama.pt")
    check(tmp_path / "dbf", {name: weight_of_five(state) for name, state in states.items()}, "dbf")


def test_double_binary_of_a_compiled_model_with_a_bias(tmp_path: Path, nprng: np.random.Generator) -> None:
    state = five(nprng, 24, 16, 8, torch.float16)
    compiled = NAME.replace("model.", "model._orig_mod.")
    tensors = wild.prefixed({compiled: state}) | {f"{compiled}.bias": torch.arange(16.0)}
    wild.write(tmp_path / "dbf", tensors, config=wild.CONFIG)
    check(tmp_path / "dbf", {NAME: weight_of_five(state)}, "dbf")
    with open_checkpoint(tmp_path / "dbf") as checkpoint:
        bias = checkpoint.load_layer(NAME).bias
        assert bias is not None
        assert bias.tolist() == list(range(16))


SHAPES: dict[str, Any] = {
    "cols": lambda rows, cols: (cols,),
    "cols 2-d": lambda rows, cols: (1, cols),
    "rows": lambda rows, cols: (rows, 1),
    "one": lambda rows, cols: (1,),
    "scalar": lambda rows, cols: (),
}


@pytest.mark.parametrize("second", SHAPES)
@pytest.mark.parametrize("first", SHAPES)
def test_double_binary_with_scaled_signs(
    tmp_path: Path, nprng: np.random.Generator, first: str, second: str
) -> None:
    k, n, rank = 24, 40, 12
    state = five(nprng, k, n, rank, torch.float32)
    variant = {
        "0.bp": state["1.bp"],
        "0.scale": torch.from_numpy(nprng.normal(size=SHAPES[first](rank, k))).float(),
        "1.w": state["2.w"],
        "2.bp": state["3.bp"],
        "2.scale": torch.from_numpy(nprng.normal(size=SHAPES[second](n, rank))).float(),
    }
    v = decode_bits(variant["0.bp"], rank, k) * stored(variant["0.scale"])
    u = decode_bits(variant["2.bp"], n, rank) * stored(variant["2.scale"])
    wild.write(tmp_path / "dbf", wild.prefixed({NAME: variant}), config=wild.CONFIG)
    check(tmp_path / "dbf", {NAME: u @ np.diag(stored(variant["1.w"])) @ v}, "dbf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.w": None}, r"q_proj\.2\.w is missing"),
        ({"3.bp": None}, r"q_proj\.3\.bp is missing"),
        ({"1.bp": torch.zeros(3, dtype=torch.uint8)}, r"1\.bp must hold 48 uint8, 16 x 24 signs"),
        ({"1.bp": torch.zeros(48, dtype=torch.int8)}, r"1\.bp must hold 48 uint8.* got torch\.int8"),
        ({"4.w": torch.zeros(16, 2)}, r"4\.w must have shape"),
        ({"5.bp": torch.zeros(48, dtype=torch.uint8)}, r"5\.bp is unexpected"),
        ({"weight": torch.zeros(4, 4)}, r"q_proj\.weight is unexpected"),
    ],
)
def test_damaged_double_binary(
    tmp_path: Path, nprng: np.random.Generator, change: dict[str, Any], message: str
) -> None:
    state: dict[str, Any] = {**five(nprng, 24, 40, 16, torch.float32), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    wild.write(tmp_path, wild.prefixed({NAME: state}), config=wild.CONFIG)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


# LittleBit with one V for both paths.


def words_to_signs(words: torch.Tensor, cols: int) -> Array:
    """Row-major int32, least significant bit first, a set bit for -1."""
    signs = np.empty((words.shape[0], cols))
    for row in range(words.shape[0]):
        for col in range(cols):
            signs[row, col] = -1.0 if words[row, col // 32].item() >> (col % 32) & 1 else 1.0
    return signs


@pytest.mark.parametrize(("kind", "paths"), [("packed", 2), ("packed", 3), ("latent", 2)])
def test_residual_path_that_shares_v(
    tmp_path: Path, nprng: np.random.Generator, kind: str, paths: int
) -> None:
    layer = wild.random_layer(nprng, 48, 40, [16] * paths, bias=True)
    state = layer.upstream() if kind == "packed" else layer.latent(nprng)
    own = ("U", "u1", "u2")
    suffixes = ("_R", "_R2")[: paths - 1]
    state = {
        name: tensor
        for name, tensor in state.items()
        if not any(s in name for s in suffixes) or name.startswith(own)
    }
    first = layer.paths[0]
    weight = sum(
        np.diag(path.u1) @ path.u @ np.diag(first.v1 * path.u2) @ first.v @ np.diag(first.v2)
        for path in layer.paths
    )
    if kind == "packed":  # the decoder above, once in full
        u = words_to_signs(state["U_R_packed"], 16)
        v = words_to_signs(state["V_packed"], 48)
        np.testing.assert_array_equal(u, layer.paths[1].u)
        np.testing.assert_array_equal(v, first.v)
    wild.write(tmp_path / "lb", wild.prefixed({NAME: state}), config=wild.CONFIG, littlebit=wild.SETTINGS)
    check(tmp_path / "lb", {NAME: weight}, "littlebit" if kind == "packed" else "littlebit-latent")
    with open_checkpoint(tmp_path / "lb") as checkpoint:
        assert checkpoint.layers[NAME].shape.shares == (0,) * paths


@pytest.mark.parametrize("kept", ["v1_R", "v2_R", "V_R_shape"])
def test_a_part_of_a_first_stage_is_no_shared_one(
    tmp_path: Path, nprng: np.random.Generator, kept: str
) -> None:
    state = wild.random_layer(nprng, 48, 40, [16, 16]).upstream()
    for name in ("v1_R", "v2_R", "V_R_shape", "V_R_packed"):
        if name != kept:
            del state[name]
    wild.write(tmp_path, wild.prefixed({NAME: state}), config=wild.CONFIG)
    with pytest.raises(CheckpointError, match=r"V_packed_R is missing"):
        open_checkpoint(tmp_path)


# NanoQuant.


@pytest.mark.parametrize("file", ["qwen3-1bit.pt", "model_state.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("rank", [16, 20])
def test_nanoquant_state_dict(tmp_path: Path, nprng: np.random.Generator, file: str, rank: int) -> None:
    layer = wild.random_layer(nprng, 40, 24, [rank])
    state = layer.nanoquant(mid=False)
    scale_pre, scale_post = stored(state["scale_pre"])[0], stored(state["scale_post"])[0]
    u, v = words_to_signs(state["U_packed"], rank), words_to_signs(state["V_packed"], 40)
    (tmp_path / "nq").mkdir()
    torch.save(wild.prefixed({NAME: state}) | DENSE, tmp_path / "nq" / file)
    check(tmp_path / "nq", {NAME: np.diag(scale_post) @ u @ v @ np.diag(scale_pre)}, "nanoquant")


def salient(nprng: np.random.Generator, k: int, n: int, count: int, kind: str) -> dict[str, torch.Tensor]:
    """Columns that stay dense: floats, or int8 and a scale of each column."""
    index = torch.from_numpy(nprng.permutation(k)[:count].astype(np.int32))
    if kind == "int8":
        values = torch.from_numpy(nprng.integers(-127, 128, (n, count)).astype(np.int8))
        scale = torch.from_numpy(nprng.uniform(0.01, 0.1, count)).half()
        return {"salient_idx": index, "salient_weight": values, "salient_scale": scale}
    values = torch.from_numpy(nprng.normal(size=(n, count)))
    return {"salient_idx": index.long(), "salient_weight": values.to(getattr(torch, kind))}


def weight_of_nanoquant(state: Mapping[str, torch.Tensor], k: int, rank: int) -> Array:
    u, v = words_to_signs(state["U_packed"], rank), words_to_signs(state["V_packed"], k)
    scales = [stored(state[name]).reshape(-1) for name in ("scale_post", "scale_mid", "scale_pre")]
    weight: Array = np.diag(scales[0]) @ u @ np.diag(scales[1]) @ v @ np.diag(scales[2])
    if "salient_idx" in state:
        columns = stored(state["salient_weight"])
        if "salient_scale" in state:
            columns = columns * stored(state["salient_scale"]).reshape(1, -1)
        for place, column in enumerate(state["salient_idx"].tolist()):
            weight[:, column] += columns[:, place]
    return weight


@pytest.mark.parametrize("kind", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("k", "n", "rank", "count"), [(40, 24, 16, 3), (33, 17, 20, 33), (64, 8, 8, 1), (40, 24, 16, 0)]
)
def test_nanoquant_s_salient_columns(
    tmp_path: Path, nprng: np.random.Generator, kind: str, k: int, n: int, rank: int, count: int
) -> None:
    state = wild.random_layer(nprng, k, n, [rank], bias=True).nanoquant() | salient(nprng, k, n, count, kind)
    state["scale_pre"][:, state["salient_idx"].long()] = 0
    plain = wild.random_layer(nprng, k, n, [rank]).nanoquant()
    other = NAME.replace("q_proj", "k_proj")
    source, out, again = (tmp_path / name for name in ("nq", "ours", "again"))
    wild.write(source, wild.prefixed({NAME: state, other: plain}) | DENSE, config=wild.CONFIG)
    convert(source, out, "littlebit2")
    convert(out, again, "littlebit2")
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    for path, layout in ((source, "nanoquant"), (out, "littlebit2")):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.format == layout
            assert list(checkpoint.layers) == [other, f"{NAME}.linear"]
            assert set(checkpoint.dense) == set(DENSE)
            spec = checkpoint.columns[NAME]
            assert (spec.name, spec.layer, spec.out_features, spec.count) == (
                NAME,
                f"{NAME}.linear",
                n,
                count,
            )
            packed, columns = checkpoint.load_layer(spec.layer), checkpoint.load_columns(NAME)
            assert columns.weight.dtype == (torch.float32 if kind == "int8" else getattr(torch, kind))
            weight = dense_weight(packed, torch.float64).numpy()
            assert not weight[:, columns.index.numpy()].any()
            weight[:, columns.index.numpy()] += stored(columns.weight)
            expected = weight_of_nanoquant(state, k, rank)
            np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
            bias = packed.bias
            assert bias is not None
            np.testing.assert_array_equal(bias.numpy(), stored(state["bias"]))
            found = describe(checkpoint)
            layer = found["layers"][spec.layer]
            assert layer["salient_columns"] == count
            assert found["layers"][other]["salient_columns"] == 0
            extra = count * (16 * n + 32) / (n * k)
            assert layer["counted_bpw"] == pytest.approx(found["layers"][other]["counted_bpw"] + extra)
            there = [state[leaf] for leaf in state if leaf.startswith("salient")]
            there = there if path == source else [columns.index, columns.weight]
            size = sum(tensor.nbytes for tensor in there)
            assert found["totals"]["bytes"]["salient"] == size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"salient_idx": None}, r"q_proj\.salient_idx is missing"),
        ({"salient_weight": None}, r"q_proj\.salient_weight is missing"),
        ({"salient_scale": None}, r"q_proj\.salient_scale is missing"),
        ({"salient_weight": torch.ones(24, 2)}, r"salient_scale is unexpected beside .* torch\.float32"),
        (
            {"salient_weight": torch.ones(24, 3, dtype=torch.int8)},
            r"must have shape \[24, 2\], got \[24, 3\]",
        ),
        (
            {"salient_weight": torch.ones(24, 2, dtype=torch.int16)},
            r"or int8 with a salient_scale, got torch\.int16",
        ),
        ({"salient_scale": torch.ones(3)}, r"salient_scale must have shape \[2\] or \[1, 2\], got \[3\]"),
        (
            {"salient_idx": torch.tensor([1.0, 2.0])},
            r"salient_idx must be int32 or int64, got torch\.float32",
        ),
        ({"salient_idx": torch.zeros(41, dtype=torch.int32)}, r"salient_idx must hold at most 40 columns"),
    ],
)
def test_damaged_salient_columns(
    tmp_path: Path, nprng: np.random.Generator, change: dict[str, Any], message: str
) -> None:
    state: dict[str, Any] = wild.random_layer(nprng, 40, 24, [16]).nanoquant()
    state = {**state, **salient(nprng, 40, 24, 2, "int8"), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    wild.write(tmp_path, wild.prefixed({NAME: state}), config=wild.CONFIG)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"salient_idx": torch.tensor([3, 40])},
            r"q_proj: salient_idx must hold different columns from 0 to 39",
        ),
        ({"salient_idx": torch.tensor([3, 3])}, r"q_proj: salient_idx must hold different columns"),
        ({"salient_scale": torch.tensor([1.0, float("nan")])}, r"q_proj: salient_weight must be finite"),
    ],
)
def test_salient_columns_with_wrong_values(
    tmp_path: Path, nprng: np.random.Generator, change: dict[str, Any], message: str
) -> None:
    state = wild.random_layer(nprng, 40, 24, [16]).nanoquant() | salient(nprng, 40, 24, 2, "int8") | change
    wild.write(tmp_path, wild.prefixed({NAME: state}), config=wild.CONFIG)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.load_columns(NAME)


def test_salient_columns_elsewhere_are_refused(tmp_path: Path, nprng: np.random.Generator) -> None:
    columns = salient(nprng, 40, 24, 2, "float32")
    state = wild.random_layer(nprng, 40, 24, [16]).upstream() | columns
    wild.write(tmp_path / "theirs", wild.prefixed({NAME: state}), config=wild.CONFIG)
    with pytest.raises(
        CheckpointError, match=r"q_proj\.salient_idx .* beside a layer of layout littlebit, not read"
    ):
        open_checkpoint(tmp_path / "theirs")
    state = wild.random_layer(nprng, 40, 24, [16]).nanoquant() | columns
    wild.write(tmp_path / "nq", wild.prefixed({NAME: state}), config=wild.CONFIG)
    with pytest.raises(
        CheckpointError, match=r"layer .*q_proj: expected no dense columns, got 2 salient ones"
    ):
        convert(tmp_path / "nq", tmp_path / "out", "littlebit")
    convert(tmp_path / "nq", tmp_path / "out", "littlebit2")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["salient_columns"] == {NAME: 2}
    for said in ({}, {NAME: 3}, {NAME: 2, "other": 1}):
        config["quantization_config"]["salient_columns"] = said
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="salient_columns of layer"):
            open_checkpoint(tmp_path / "out")


def test_a_pickle_that_is_not_read_without_running_it(tmp_path: Path) -> None:
    torch.save({"a.U_packed": torch.nn.Linear(2, 2)}, tmp_path / "model_state.pt")
    with pytest.raises(CheckpointError, match="cannot be loaded as tensors alone"):
        open_checkpoint(tmp_path)
