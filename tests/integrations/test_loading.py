"""``littlebit2.load`` is complete or an error; the quantizer's other promises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import littlebit2
from littlebit2.checkpoint import CheckpointError
from littlebit2.integrations import loading
from littlebit2.integrations.transformers import LittleBit2Config, attach
from littlebit2_kernels import LittleBitLinear
from tests.integrations.families import (
    dense_model,
    greedy,
    outputs,
    quantized_copy,
    reconstructed_copy,
    relative_error,
    token_ids,
)

LAYER = "model.layers.1.mlp.up_proj"


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def _edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda t: t.pop(f"{LAYER}.u1"), rf"{LAYER}\.u1"),
        (lambda t: t.update({"model.extra": torch.zeros(2)}), r"unexpected tensors: model\.extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model\.norm\.weight must have shape \[64\], got \[7\]",
        ),
        (lambda t: t[f"{LAYER}.u1"].fill_(float("nan")), rf"{LAYER}.*u?out_scale|{LAYER}.*finite"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)],
            rf"{LAYER}",
        ),
    ],
    ids=["missing", "missing scale", "unexpected", "mis-shaped", "nan", "missing layer"],
)
def test_incomplete_checkpoints(path: Path, change: Any, message: str) -> None:
    _edit(path, change)
    with pytest.raises(CheckpointError, match=message):
        littlebit2.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.u1"), rf"{LAYER}\.u1"),
        (lambda t: t[f"{LAYER}.u1"].fill_(float("nan")), rf"{LAYER}.*finite"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(LAYER)], rf"{LAYER}"),
    ],
    ids=["missing scale", "nan", "missing layer"],
)
def test_from_pretrained_needs_every_packed_layer(path: Path, change: Any, message: str) -> None:
    _edit(path, change)
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_layer_of_another_shape(path: Path) -> None:
    _edit_config(path, lambda config: config.update(intermediate_size=128))
    expected = (
        rf"{LAYER}: \(in_features, out_features, bias\) must be \(64, 128, False\), got \(64, 96, False\)"
    )
    with pytest.raises(CheckpointError, match=expected):
        littlebit2.load(path)


def test_layer_without_a_place(path: Path) -> None:
    _edit_config(path, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=rf"{LAYER}: the model has no module there"):
        littlebit2.load(path)


def test_newer_format(path: Path) -> None:
    _edit_config(path, lambda config: config["quantization_config"].update(format_version=2))
    for load in (littlebit2.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="format_version"):
            load(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pack": "i8"}, "pack must be 'i32-lsb-neg1', got 'i8'"),
        ({"ranked": {}}, "unknown entries: ranked"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"activation": "int2"}, "activation"),
        ({"quant_method": "awq"}, "quant_method must be 'littlebit2', got 'awq'"),
    ],
)
def test_malformed_configuration(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LittleBit2Config(**entry)


def test_no_directory_and_no_config(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        littlebit2.load(path / "absent")
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        littlebit2.load(path)


def test_arguments_are_checked_first() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        littlebit2.load("absent", backend="tpu")
    with pytest.raises(TypeError, match="path must be a str or a path, got NoneType"):
        littlebit2.load(None)  # type: ignore[arg-type]
    for device in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"device must .*'{device}'"):
            littlebit2.load("absent", device=device)


def test_options_reach_the_layers(path: Path) -> None:
    model = littlebit2.load(path, backend="reference", activation="exact")
    layers = [module for module in model.modules() if isinstance(module, LittleBitLinear)]
    assert {(layer.backend, layer.activation) for layer in layers} == {("reference", "exact")}
    # The reference reads the portable tensors; a prepacked layer would be unpacked at every call.
    assert all("V_packed" in layer._buffers for layer in layers)
    stored = json.loads(model.config.to_json_string())["quantization_config"]
    assert not {"backend", "activation", "prepack", "stream"} & set(stored)


def test_layers_are_prepacked_and_frozen(path: Path) -> None:
    model = littlebit2.load(path)
    layers = [module for module in model.modules() if isinstance(module, LittleBitLinear)]
    assert all("prepacked" in layer._buffers for layer in layers)
    assert not model.training
    assert not any(layer.training for layer in layers)
    quantizer = model.hf_quantizer
    assert (quantizer.is_serializable(), quantizer.is_trainable, quantizer.is_compileable) == (
        True,
        True,
        True,
    )


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_scales_stay_float32(path: Path, way: str) -> None:
    load = littlebit2.load if way == "load" else transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float16)
    assert model.dtype == torch.float16
    model = model.to(torch.bfloat16)
    layer = model.get_submodule(LAYER)
    assert layer.u1.dtype == layer.latent_scale.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert outputs(model, token_ids()).isfinite().all()


def test_dense_checkpoint(tmp_path: Path) -> None:
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path)
    model = littlebit2.load(tmp_path)
    assert torch.equal(outputs(model, token_ids()), outputs(dense, token_ids()))
    _edit(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=rf"missing tensors: {LAYER}\.weight"):
        littlebit2.load(tmp_path)


def test_dense_checkpoint_is_not_quantized_on_the_fly(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LittleBit2Config())


def test_save_and_load_again(path: Path, packed: Any, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = littlebit2.load(tmp_path / "again")
    first = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, first[name]), name
    stored = [
        json.loads((p / "config.json").read_text())["quantization_config"] for p in (path, tmp_path / "again")
    ]
    assert stored[0] == stored[1]
    assert stored[0]["ranks"][LAYER] == [40, 8]
    assert stored[0]["modules_to_not_convert"] == ["lm_head"]


def test_base_model_of_a_causal_checkpoint(path: Path) -> None:
    whole, base = littlebit2.load(path), transformers.AutoModel.from_pretrained(path)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_state_dict_without_files(path: Path, packed: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(path)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(outputs(model, token_ids()), outputs(littlebit2.load(path), token_ids()))


def test_attach_needs_packed_layers() -> None:
    with pytest.raises(ValueError, match="at least one LittleBitLinear"):
        attach(dense_model("llama"))


_NANOQUANT = {"v2": "scale_pre", "u1": "scale_post", "latent_scale": "scale_mid"}


def _as_nanoquant(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = {leaf: tensor for leaf, tensor in layer.items() if not leaf.endswith(("_R", "_shape"))}
    return {_NANOQUANT.get(leaf, leaf): tensor for leaf, tensor in kept.items()}


def _without_middle(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = _as_nanoquant(layer)
    renamed["scale_post"] = renamed["scale_post"] * renamed.pop("scale_mid").mean()
    return renamed


def _as_onebit(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One sign matrix ``[N, K]``: the rows of V over and over."""
    rows = torch.arange(layer["u1"].shape[-1]) % len(layer["V_packed"])
    return {"V_packed": layer["V_packed"][rows], "v2": layer["v2"], "u1": layer["u1"] / 50}


@pytest.mark.parametrize("relative", [_as_nanoquant, _without_middle, _as_onebit])
def test_relatives(relative: Any, tmp_path: Path) -> None:
    dense = dense_model("llama")
    packed = quantized_copy(dense)
    attach(packed)
    packed.save_pretrained(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in packed.config.quantization_config.layer_names:
            leaves = [key for key in tensors if key.startswith(f"{name}.")]
            layer = {key.removeprefix(f"{name}."): tensors.pop(key) for key in leaves}
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in relative(layer).items()}

    _edit(tmp_path, change)
    _edit_config(tmp_path, lambda config: config.pop("quantization_config"))
    model = littlebit2.load(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, LittleBitLinear)]
    assert {layer.shape.ranks for layer in layers} == {None if relative is _as_onebit else (40,)}
    reference = reconstructed_copy(dense, model)
    assert relative_error(outputs(model, token_ids()), outputs(reference, token_ids())) < 2e-5
    registered = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(registered, token_ids()), outputs(model, token_ids()))
    registered.save_pretrained(tmp_path / "ours")
    saved = littlebit2.load(tmp_path / "ours")
    assert torch.equal(outputs(saved, token_ids()), outputs(model, token_ids()))


def test_decode_step_compiles_without_breaks(path: Path) -> None:
    model = littlebit2.load(path)
    ids = token_ids()
    wanted = greedy(model, ids)
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    new = []
    with torch.inference_mode():
        position = torch.arange(ids.shape[1])[None]
        out = model(ids, past_key_values=cache, position_ids=position)
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            new.append(int(token))
            position = position[:, -1:] + 1
            out = step(token, past_key_values=cache, position_ids=position)
    assert new == wanted[:5]


def test_deepcopy_keeps_the_fused_parts(tmp_path: Path) -> None:
    from tests.integrations.upstream import write

    write(tmp_path / "phi", dense_model("phi3"))
    model = littlebit2.load(tmp_path / "phi")
    copied = copy.deepcopy(model)
    attention = copied.get_submodule("model.layers.0.self_attn")
    assert attention.qkv_proj._parent == (attention,)
    # The copy is not fused.
    torch.testing.assert_close(
        outputs(copied, token_ids()), outputs(model, token_ids()), rtol=1e-4, atol=1e-4
    )


class CalledFromAList(transformers.PreTrainedModel):
    """Registers its layers as children and calls them through a list, as MaskFormer's heads do."""

    config_class = transformers.LlamaConfig
    main_input_name = "x"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.layers = [torch.nn.Linear(size, size), torch.nn.LayerNorm(size), torch.nn.Linear(size, size)]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_that_are_called_from_a_list(tmp_path: Path, rng: torch.Generator) -> None:
    model = CalledFromAList(transformers.LlamaConfig(hidden_size=64, num_attention_heads=4))
    packed = quantized_copy(model)
    attach(packed)
    packed.save_pretrained(tmp_path)
    littlebit2.register()
    loaded = CalledFromAList.from_pretrained(tmp_path)
    x = torch.randn(3, 64, generator=rng)
    assert isinstance(loaded.layers[0], LittleBitLinear)
    assert loaded.layers[0] is loaded.get_submodule("0")
    torch.testing.assert_close(loaded(x), packed(x))
    torch.testing.assert_close(packed(x), reconstructed_copy(model, packed)(x), rtol=1e-4, atol=1e-4)


def test_voices_that_a_class_reads_are_asked_for(tmp_path: Path) -> None:
    kind = transformers.Qwen2_5OmniForConditionalGeneration
    with pytest.raises(CheckpointError, match=r"spk_dict\.pt is missing, which Qwen2_5Omni.* reads"):
        loading._with_info(kind, tmp_path)()
