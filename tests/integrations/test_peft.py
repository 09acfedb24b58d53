"""LoRA adapters on frozen packed layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from littlebit2 import quantize_linear
from littlebit2.integrations.peft import LoraLittleBitLinear, with_packed_layers
from littlebit2.quantize import QuantConfig
from littlebit2_kernels import LittleBitLinear
from tests.integrations.families import dense_model, quantized_copy, token_ids


def config(**changes: Any) -> LoraConfig:
    settings = {"target_modules": ["q_proj", "up_proj"], "r": 4, "task_type": "CAUSAL_LM", **changes}
    return LoraConfig(**settings)


def quantized_head(head: torch.nn.Linear) -> LittleBitLinear:
    return quantize_linear(head, QuantConfig(ranks=(8,)))


@pytest.fixture
def packed() -> Any:
    return quantized_copy(dense_model("llama"))


def test_adapters_train_and_packed_layers_do_not(packed: Any) -> None:
    ids = token_ids(16)
    before = packed(ids).logits.detach()
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    model = get_peft_model(packed, with_packed_layers(config()))
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, LoraLittleBitLinear)
    assert torch.equal(model(ids).logits, before)  # B starts at zero
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    restored = model.unload()
    assert isinstance(restored.model.layers[0].mlp.up_proj, LittleBitLinear)
    assert restored.state_dict().keys() == state.keys()
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_adapter_adds_its_weight(packed: Any, rng: torch.Generator) -> None:
    model = get_peft_model(packed, with_packed_layers(config(lora_alpha=8)))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=rng)
    x = torch.randn(3, layer.in_features, generator=rng)
    added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(added, x @ layer.get_delta_weight("default").T, rtol=1e-3, atol=1e-3)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half - layer(x)).detach().norm() / layer(x).detach().norm()) < 0.02


def test_saved_adapters_load(packed: Any, tmp_path: Path) -> None:
    ids = token_ids(16)
    other = copy.deepcopy(packed)
    model = get_peft_model(packed, with_packed_layers(config(init_lora_weights=False)))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(
        other, tmp_path, config=with_packed_layers(PeftConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def adapted(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_all_linear_takes_packed_and_dense_layers_but_no_head(packed: Any, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    dense = torch.nn.Linear(packed.get_submodule(name).in_features, packed.get_submodule(name).out_features)
    packed.set_submodule(name, dense)
    linear = {name for name, module in packed.named_modules() if isinstance(module, LittleBitLinear)}
    other = copy.deepcopy(packed)
    model = get_peft_model(packed, with_packed_layers(config(target_modules="all-linear")))
    assert adapted(model) == linear | {name}
    model.add_adapter("second", with_packed_layers(config(target_modules="ALL-LINEAR")))
    assert adapted(model) == linear | {name}, "an adapter's own layers are no targets"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        other, tmp_path, config=with_packed_layers(PeftConfig.from_pretrained(tmp_path))
    )
    assert torch.equal(loaded(token_ids(8)).logits, model(token_ids(8)).logits)


def test_all_linear_leaves_a_packed_head_out(packed: Any) -> None:
    head = packed.lm_head
    packed.set_submodule("lm_head", quantized_head(head))
    model = get_peft_model(packed, with_packed_layers(config(target_modules="all-linear")))
    assert "lm_head" not in adapted(model)
    assert "model.layers.0.mlp.up_proj" in adapted(model)


def test_all_linear_of_other_configurations_is_peft_s_own(packed: Any) -> None:
    get_peft_model(copy.deepcopy(packed), with_packed_layers(config()))
    with pytest.raises(ValueError, match="target"):  # no dense linear layer but the head
        get_peft_model(packed, config(target_modules="all-linear"))


def test_merging_is_refused(packed: Any) -> None:
    model = get_peft_model(packed, with_packed_layers(config()))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="a LoRA adapter cannot be merged into a packed layer"):
            merge()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be one of False.* got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of True.* got 'pissa'"),
        ({"init_lora_weights": "olora"}, "which have no dense weight, got 'olora'"),
    ],
)
def test_what_needs_the_dense_weight_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_packed_layers(config(**changes))


def test_other_configurations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got dict"):
        with_packed_layers({})  # type: ignore[arg-type]
