"""Every layout in the wild gives the layer that its numbers mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import Checkpoint, LayerSpec, open_checkpoint
from littlebit2_kernels import PackedLinear, packed_to_state
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.reference import dense_weight
from tests.checkpoint import wild
from tests.checkpoint.wild import UP, Q


def check_layer(checkpoint: Checkpoint, name: str, layer: wild.Layer) -> PackedLinear:
    packed = checkpoint.load_layer(name)
    np.testing.assert_array_equal(dense_weight(packed, torch.float64).numpy(), layer.dense())
    if layer.bias is None:
        assert packed.bias is None
    else:
        assert packed.bias is not None
        np.testing.assert_array_equal(packed.bias.numpy(), layer.bias)
    return packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("paths", [1, 2])
def test_authors_layout(
    tmp_path: Path, nprng: np.random.Generator, paths: int, shards: int, dtype: torch.dtype
) -> None:
    layers = wild.upstream_model(tmp_path, nprng, paths=paths, dtype=dtype, shards=shards)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "littlebit"
        assert checkpoint.config == wild.CONFIG
        assert checkpoint.metadata["eff_bit"] == 0.55
        assert checkpoint.metadata["source"] == "littlebit_config.json"
        assert checkpoint.problems == []
        assert set(checkpoint.layers) == {Q, UP}
        assert checkpoint.layers[UP] == LayerSpec(UP, LayerShape(48, 100, (40,) * paths), False)
        assert checkpoint.layers[Q].bias
        for name, layer in layers.items():
            check_layer(checkpoint, name, layer)
        assert set(checkpoint.dense) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert checkpoint.dense["model.norm.weight"] == ((48,), torch.bfloat16)
        assert torch.equal(checkpoint.load_tensor("model.norm.weight"), torch.ones(48, dtype=torch.bfloat16))


def test_residual_names_of_either_order(tmp_path: Path, nprng: np.random.Generator) -> None:
    layer = wild.random_layer(nprng, 40, 24, [8, 8])
    theirs = layer.upstream()
    ours = {
        name.replace("_R_packed", "_packed_R").replace("_R_shape", "_shape_R"): t.clone()
        for name, t in theirs.items()
    }
    assert "U_R_packed" in theirs
    assert "U_packed_R" in ours
    wild.write(tmp_path, wild.prefixed({"a": theirs, "b": ours}))
    with open_checkpoint(tmp_path) as checkpoint:
        check_layer(checkpoint, "a", layer)
        check_layer(checkpoint, "b", layer)


def test_three_paths_and_unequal_ranks(tmp_path: Path, nprng: np.random.Generator) -> None:
    layer = wild.random_layer(nprng, 40, 24, [8, 40, 16])
    state = layer.upstream() | {"_split_dim_R_final": torch.tensor(40)}
    wild.write(tmp_path, wild.prefixed({"a": state}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layers["a"].shape.ranks == (8, 40, 16)
        check_layer(checkpoint, "a", layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("paths", [1, 2])
def test_unpacked_latents(tmp_path: Path, nprng: np.random.Generator, paths: int, dtype: torch.dtype) -> None:
    layers, dense = wild.model(nprng, paths)
    states = {name: layer.latent(nprng, dtype) for name, layer in layers.items()}
    wild.write(tmp_path, wild.prefixed(states) | dense, config=wild.CONFIG, littlebit=wild.SETTINGS, shards=2)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "littlebit-latent"
        assert set(checkpoint.dense) == set(dense)
        for name, layer in layers.items():
            check_layer(checkpoint, name, layer)


def test_no_config_at_all(tmp_path: Path, nprng: np.random.Generator) -> None:
    layer = wild.random_layer(nprng, 33, 24, [24, 24])
    wild.write(tmp_path, wild.prefixed({"a.b": layer.upstream(extras=False)}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "littlebit"
        assert checkpoint.layers["a.b"].shape.ranks == (24, 24)
        assert checkpoint.metadata == {}
        assert any("config.json is missing" in problem for problem in checkpoint.problems)
        check_layer(checkpoint, "a.b", layer)


def test_older_settings_in_config(tmp_path: Path, nprng: np.random.Generator) -> None:
    older = {"quant_func": "STEBinary", "eff_bit": 1.0, "split_dim": 64, "residual": False}
    layer = wild.random_layer(nprng, 40, 24, [8])
    wild.write(tmp_path, wild.prefixed({"a": layer.upstream()}), config=wild.CONFIG | older)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata == {**older, "source": "config.json"}


def test_kv_factor_means_ranks_by_layer(tmp_path: Path, nprng: np.random.Generator) -> None:
    q, k = wild.random_layer(nprng, 64, 64, [16]), wild.random_layer(nprng, 64, 16, [32])
    wild.write(
        tmp_path,
        wild.prefixed({"m.q_proj": q.upstream(), "m.k_proj": k.upstream()}),
        littlebit=wild.SETTINGS | {"kv_factor": 2.0},
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert [spec.shape.ranks for spec in checkpoint.layers.values()] == [(32,), (16,)]
        assert checkpoint.metadata["kv_factor"] == 2.0
        check_layer(checkpoint, "m.k_proj", k)


@pytest.mark.parametrize("rank", [16, 40, 20, 33])
@pytest.mark.parametrize("mid", [True, False])
def test_nanoquant(tmp_path: Path, nprng: np.random.Generator, mid: bool, rank: int) -> None:
    layer = wild.random_layer(nprng, 50, 36, [rank], bias=True)
    if not mid:
        layer.paths[0].u2[:] = layer.paths[0].v1[:] = 1
    wild.write(tmp_path, wild.prefixed({"a.b": layer.nanoquant(mid)}), config=wild.CONFIG)
    (tmp_path / "nanoquant_config.json").write_text('{"bits": 1.0}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "nanoquant"
        assert checkpoint.metadata["bits"] == 1.0
        padded = -(-rank // 8) * 8
        assert checkpoint.layers["a.b"].shape.ranks == (padded,)
        assert bool(checkpoint.problems) == (padded != rank)
        check_layer(checkpoint, "a.b", layer)


def test_single_stage(tmp_path: Path, nprng: np.random.Generator) -> None:
    signs = nprng.choice([-1.0, 1.0], (24, 40))
    g, h = nprng.standard_normal(40), nprng.standard_normal(24)
    state = {
        "V_packed": wild.pack(signs),
        "v2": torch.from_numpy(g).float(),
        "u1": torch.from_numpy(h).float()[None],
    }
    wild.write(tmp_path, wild.prefixed({"a": state}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "onebit"
        assert checkpoint.layers["a"] == LayerSpec("a", LayerShape(40, 24, None), False)
        weight = dense_weight(checkpoint.load_layer("a"), torch.float64).numpy()
        np.testing.assert_allclose(weight, signs * h[:, None] * g, rtol=1e-6)


def test_scales_are_folded_in_float32(tmp_path: Path, nprng: np.random.Generator) -> None:
    """A bfloat16 product would round: the trained layer does not."""
    layer = wild.random_layer(nprng, 40, 24, [8])
    layer.paths[0].v1[:] = 1.0078125
    layer.paths[0].u2[:] = 1.0078125
    wild.write(tmp_path, wild.prefixed({"a": layer.upstream()}))
    with open_checkpoint(tmp_path) as checkpoint:
        latent = checkpoint.load_layer("a").paths[0].latent_scale
    assert latent is not None
    assert latent.tolist() == [1.0078125**2] * 8


def test_phi_split_projection_is_reported(tmp_path: Path, nprng: np.random.Generator) -> None:
    states = {f"m.{kind}_proj": wild.random_layer(nprng, 32, 32, [8]).upstream() for kind in "qkv"}
    wild.write(tmp_path, wild.prefixed(states), config={"model_type": "phi3"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.metadata["split_qkv"] is True
        assert any("qkv_proj" in problem for problem in checkpoint.problems)
        assert set(checkpoint.layers) == {"m.q_proj", "m.k_proj", "m.v_proj"}


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"], "lm_head.weight"),
        ({"text_config": {"tie_word_embeddings": True}}, ["m.embed_tokens.weight"], "lm_head.weight"),
        ({"model_type": "gemma2"}, ["model.embed_tokens.weight"], "lm_head.weight"),
        ({"model_type": "llama"}, ["model.embed_tokens.weight"], None),
        ({"tie_word_embeddings": False, "model_type": "gemma2"}, ["model.embed_tokens.weight"], None),
        ({"tie_word_embeddings": True}, ["model.embed_tokens.weight", "lm_head.weight"], None),
        ({"tie_word_embeddings": True}, ["model.norm.weight"], None),
        (
            {"model_type": "bert"},
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
            "cls.predictions.decoder.weight",
        ),
    ],
)
def test_tied(tmp_path: Path, config: dict[str, object], names: list[str], expected: str | None) -> None:
    wild.write(tmp_path, {name: torch.ones(4, 4) for name in names}, config=config)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "dense"
        assert checkpoint.tied() == ({expected: names[0]} if expected else {})


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights(tmp_path: Path, nprng: np.random.Generator, sharded: bool) -> None:
    layer = wild.random_layer(nprng, 40, 24, [8, 8])
    tensors = wild.prefixed({"a": layer.upstream()})
    if sharded:
        names = sorted(tensors)
        files = {
            "pytorch_model-00001-of-00002.bin": names[::2],
            "pytorch_model-00002-of-00002.bin": names[1::2],
        }
        index = {"weight_map": {name: file for file, mine in files.items() for name in mine}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        files = {"pytorch_model.bin": list(tensors)}
    for file, mine in files.items():
        torch.save(
            {name: torch.nn.Parameter(tensors[name], requires_grad=False) for name in mine}, tmp_path / file
        )
    with open_checkpoint(tmp_path) as checkpoint:
        check_layer(checkpoint, "a", layer)


def test_download_cache_links_are_followed(tmp_path: Path, nprng: np.random.Generator) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    layer = wild.random_layer(nprng, 40, 24, [8])
    wild.write(snapshot, wild.prefixed({"a": layer.upstream()}), config=wild.CONFIG)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    with open_checkpoint(snapshot) as checkpoint:
        check_layer(checkpoint, "a", layer)


def test_loaded_layers_own_their_memory(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng, dtype=torch.float32)
    with open_checkpoint(tmp_path) as checkpoint:
        packed = checkpoint.load_layer(UP)
    for name, tensor in packed_to_state(packed).items():
        assert tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size(), name


def test_state_is_read_without_quantization_config(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path / "a", nprng)
    with open_checkpoint(tmp_path / "a") as checkpoint:
        state = packed_to_state(checkpoint.load_layer(UP))
    wild.write(tmp_path / "b", wild.prefixed({UP: {name: t.contiguous() for name, t in state.items()}}))
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert checkpoint.format == "littlebit2"
        assert checkpoint.load_layer(UP).ranks == (40, 40)


def test_unknown_names(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng)
    with open_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(KeyError, match=r"packed layer of .*, got 'model\.nothing'; there are \d+: model"):
            checkpoint.load_layer("model.nothing")
        with pytest.raises(KeyError, match="must be a dense tensor of"):
            checkpoint.load_tensor(f"{UP}.u1")


def test_layers_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    names = [f"m.{number}.{kind}.weight" for number in (0, 2, 10, 11) for kind in ("a", "b")]
    wild.write(tmp_path, {name: torch.ones(1) for name in reversed(names)}, config={})
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.dense) == names


def test_paths_that_are_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "x")
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match="got the file"):
        open_checkpoint(tmp_path / "f")


def test_dense_tensors_in_memory_of_their_own(tmp_path: Path, nprng: np.random.Generator) -> None:
    wild.upstream_model(tmp_path, nprng, shards=3)
    with open_checkpoint(tmp_path) as checkpoint:
        for name in checkpoint.dense:
            mine, mapped = checkpoint.read_tensor(name), checkpoint.load_tensor(name)
            assert torch.equal(mine, mapped)
            mine.zero_()  # nobody else's memory
        assert not torch.equal(checkpoint.load_tensor(name), mine)
        with pytest.raises(KeyError, match="name must be a dense tensor of"):
            checkpoint.read_tensor("nothing")
