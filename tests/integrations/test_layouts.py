"""Files of other names, other people's layouts and given settings, up to the loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import littlebit2
from littlebit2.checkpoint import CheckpointError
from littlebit2.integrations.modules import layers_of
from littlebit2.integrations.transformers import LittleBit2Config
from littlebit2_kernels import LittleBitLinear
from tests.integrations import upstream
from tests.integrations.families import assert_same, dense_model, outputs, token_ids

LAYER = "model.layers.1.mlp.up_proj"


def nanoquant(model: Any) -> dict[str, torch.Tensor]:
    """A state dict as NanoQuant saves it, random in every linear layer but the head."""
    random = upstream.np.random.default_rng(3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            del state[f"{name}.weight"]
            n, k = linear.weight.shape
            for matrix, shape in (("U", (n, 16)), ("V", (16, k))):
                state[f"{name}.{matrix}_packed"] = upstream.pack(random.choice([-1.0, 1.0], shape))
                state[f"{name}.{matrix}_shape"] = torch.tensor(shape)
            state[f"{name}.scale_pre"] = torch.full((1, k), 0.05)
            state[f"{name}.scale_post"] = torch.full((1, n), 0.5)
    return state


@pytest.mark.parametrize("name", ["quantized.safetensors", "model.fp16.safetensors", "model.pt"])
@pytest.mark.parametrize("layout", ["littlebit2", "littlebit", "dense"])
def test_load_takes_the_files_that_open_checkpoint_takes(
    packed: Any, path: Path, tmp_path: Path, name: str, layout: str
) -> None:
    model, source = packed, path
    if layout == "littlebit":
        model, source = dense_model("llama"), tmp_path / "theirs"
        upstream.write(source, model)
        model.generation_config.save_pretrained(source)
    elif layout == "dense":
        model, source = dense_model("llama"), tmp_path / "dense"
        model.save_pretrained(source)
    expected = outputs(model, token_ids())
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if name.endswith(".pt"):
        torch.save(tensors, source / name)
    else:
        save_file(tensors, source / name, {"format": "pt"})
    loaded = littlebit2.load(source)
    torch.testing.assert_close(outputs(loaded, token_ids()), expected, rtol=1e-4, atol=1e-4)
    assert Path(loaded.name_or_path) == source
    assert len(layers_of(loaded)) == (0 if layout == "dense" else 14)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_a_missing_tensor_of_such_a_file_is_named(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    del tensors["model.norm.weight"]
    save_file(tensors, path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.norm\.weight"):
        littlebit2.load(path)


def test_double_binary_model_of_torch_compile(packed: Any, tmp_path: Path) -> None:
    """Names of a compiled model, layers spread over five modules: nothing that transformers would find."""
    dense = dense_model("llama")
    dense.config.save_pretrained(tmp_path)
    state, expected = {}, dense_model("llama")
    random = upstream.np.random.default_rng(5)
    for name, tensor in dense.state_dict().items():
        if "_proj" not in name:
            state[name.replace("model.", "model._orig_mod.", 1)] = tensor
            continue
        layer, (n, k) = name.removesuffix(".weight"), tensor.shape
        v, u = random.choice([-1, 1], (16, k)), random.choice([-1, 1], (n, 16))
        scales = [torch.from_numpy(random.uniform(0.02, 0.2, size)).float() for size in (k, 16, n)]
        for step, signs in ((1, v), (3, u)):
            state[f"{layer}.{step}.bp"] = torch.from_numpy(upstream.np.packbits(signs.flatten() > 0))
        state |= {f"{layer}.{step}.w": scale for step, scale in zip((0, 2, 4), scales, strict=True)}
        weight = torch.from_numpy(u).float() * scales[1] @ torch.from_numpy(v).float() * scales[0]
        expected.get_submodule(layer).weight.data = scales[2][:, None] * weight
    torch.save(state, tmp_path / "compressed.pt")
    loaded = littlebit2.load(tmp_path)
    torch.testing.assert_close(
        outputs(loaded, token_ids()), outputs(expected, token_ids()), rtol=1e-3, atol=1e-3
    )
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "compressed.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"its tensor names are not those of the model: use littlebit2\.load"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_nanoquant_bin_is_no_random_dense_model(tmp_path: Path) -> None:
    dense = dense_model("llama")
    dense.config.save_pretrained(tmp_path)
    torch.save(nanoquant(dense), tmp_path / "pytorch_model.bin")
    littlebit2.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(layers_of(model)) == 14
    torch.testing.assert_close(outputs(model, token_ids()), outputs(littlebit2.load(tmp_path), token_ids()))


@pytest.mark.parametrize("said", ["littlebit_config.json", "nanoquant_config.json", "quant_func", "nothing"])
def test_packed_layers_of_an_unknown_layout_are_refused(tmp_path: Path, said: str) -> None:
    """Never a random dense model for a directory that says it is packed, by a file or by its tensors."""
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        weight, layer = state.pop(name), name.removesuffix(".weight")
        dtype = torch.int32 if said == "nothing" else torch.float32
        state[f"{layer}.left"] = torch.ones(weight.shape[0], 2, dtype=dtype)
        state[f"{layer}.right"] = torch.ones(2, weight.shape[1])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    if said.endswith(".json"):
        (tmp_path / said).write_text(json.dumps({"quant_func": "SmoothSign"}))
    elif said == "quant_func":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, said: "SmoothSign"}))
    littlebit2.register()
    message = r"expected packed layers.*left"
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        littlebit2.load(tmp_path)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    "given", [{"activation": "int8"}, {"backend": "reference"}, {"prepack": False}, {"fuse": False}, {}]
)
def test_settings_given_to_from_pretrained(
    path: Path, tmp_path: Path, given: dict[str, Any], foreign: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if foreign:
        path = tmp_path / "theirs"
        upstream.write(path, dense_model("llama"), (40, 8))
    prepacked: list[Any] = []

    def record(layer: LittleBitLinear) -> None:
        prepacked.append(layer)

    monkeypatch.setattr(LittleBitLinear, "prepack_", record)
    littlebit2.register()
    config = LittleBit2Config(**given)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    layer = model.get_submodule(LAYER)
    assert layer.activation == given.get("activation", "auto")
    assert layer.backend == given.get("backend", "auto")
    assert (layer in prepacked) == (given.get("prepack", True) and layer.backend == "auto")
    model.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert not stored.keys() & {"activation", "backend", "prepack", "fuse", "source"}
    assert stored["ranks"][LAYER] == [40, 8]


def test_given_settings_may_not_contradict_the_checkpoint(path: Path) -> None:
    littlebit2.register()
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match=r"quantization_config must leave ranks out.* got \{'a': \[8\]\}"):
        load(path, quantization_config=LittleBit2Config(ranks={"a": [8]}))
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        load(path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    same = LittleBit2Config(**stored, activation="int8")
    assert load(path, quantization_config=same).get_submodule(LAYER).activation == "int8"


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_variant_of_the_weights(packed: Any, tmp_path: Path, size: str) -> None:
    """``model.fp16.safetensors``, whole and in shards; beside others, it is not clear which are meant."""
    packed.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    assert not (tmp_path / "model.safetensors").exists()
    littlebit2.register()
    expected = outputs(packed, token_ids())
    auto = transformers.AutoModelForCausalLM
    for model in (littlebit2.load(tmp_path), auto.from_pretrained(tmp_path, variant="fp16")):
        assert len(layers_of(model)) == 14
        assert_same(outputs(model, token_ids()), expected)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        auto.from_pretrained(tmp_path)
    packed.save_pretrained(tmp_path)
    assert_same(outputs(auto.from_pretrained(tmp_path), token_ids()), expected)
    with pytest.raises(
        CheckpointError, match=r"asked for are in model\.fp16.*read from model\.safetensors: keep one"
    ):
        auto.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("count", [1, 3])
def test_weights_of_torch_save(packed: Any, path: Path, count: int) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"pytorch_model-{i + 1:05}-of-{count:05}.bin" for i in range(count)]
    files = files if count > 1 else ["pytorch_model.bin"]
    for number, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[number::count]}, path / file)
    if count > 1:
        weight_map = {name: files[number % count] for number, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    littlebit2.register()
    expected = outputs(packed, token_ids())
    for load in (littlebit2.load, transformers.AutoModelForCausalLM.from_pretrained):
        model = load(path)
        assert len(layers_of(model)) == 14
        assert_same(outputs(model, token_ids()), expected)


_PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}, dict.fromkeys(_PARTS, "cpu")])
def test_device_maps(packed: Any, path: Path, where: Any) -> None:
    littlebit2.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map=where)
    assert len(layers_of(model)) == 14
    assert_same(outputs(model, token_ids()), outputs(packed, token_ids()))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"device_map": {"model": "disk", "lm_head": "cpu"}}, "disk"),
        ({"device_map": "auto", "max_memory": {"cpu": "60KB"}}, "disk"),
        ({"device_map": "meta"}, "meta"),
        ({"device_map": {"": "meta"}}, "meta"),
    ],
)
def test_device_maps_without_values_are_refused(
    path: Path, tmp_path: Path, options: dict[str, Any], place: str
) -> None:
    littlebit2.register()
    with pytest.raises(ValueError, match=f'device_map must not place modules on "{place}"'):
        transformers.AutoModelForCausalLM.from_pretrained(
            path, offload_folder=str(tmp_path / "off"), **options
        )
