"""Which tensors are linear weights."""

from __future__ import annotations

import pytest
import torch

from littlebit2.architecture.parts import Whole
from littlebit2.architecture.select import DEFAULT_EXCLUDE
from littlebit2.architecture.shapes import model_shapes
from littlebit2.architecture.tensors import select_layers
from littlebit2.plan import load_config, shipped_configs

SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"intermediate_size": 112, "attention_bias": True},
    "mistral": {"intermediate_size": 112, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 112},
    "qwen3": {"intermediate_size": 112},
    "gemma": {"intermediate_size": 112},
    "gemma2": {"intermediate_size": 112},
    "gemma3_text": {"intermediate_size": 112},
    "phi": {"intermediate_size": 112, "qk_layernorm": True},
    "phi3": {"intermediate_size": 112},
    "opt": {"ffn_dim": 112, "max_position_embeddings": 30, "word_embed_proj_dim": 32},
    "bert": {
        "intermediate_size": 112,
        "max_position_embeddings": 30,
        "tie_word_embeddings": False,
        "architectures": ["BertForMaskedLM"],
    },
}


def tensors_of(config: dict) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    shapes = model_shapes(config)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for linear in shapes.linears:
        tensors[f"{linear.name}.weight"] = ((linear.out_features, linear.in_features), torch.bfloat16)
        if linear.bias:
            tensors[f"{linear.name}.bias"] = ((linear.out_features,), torch.bfloat16)
    tensors.update({dense.name: (dense.shape, torch.bfloat16) for dense in shapes.dense})
    return tensors


@pytest.mark.parametrize("config", [*FAMILIES, *shipped_configs()])
def test_names_and_shapes_find_the_linear_layers_of_every_family(config: str) -> None:
    values = (
        {"model_type": config, **SIZES, **FAMILIES[config]} if config in FAMILIES else load_config(config)
    )
    found = select_layers(tensors_of(values), values)
    expected = [linear for linear in model_shapes(values).linears if not linear.is_head]
    assert {layer.name for layer in found} == {linear.name for linear in expected}
    by_name = {linear.name: linear for linear in expected}
    for layer in found:
        linear = by_name[layer.name]
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
        assert layer.bias == (Whole(f"{layer.name}.bias") if linear.bias else None)


DENSE = ((8, 16), torch.float32)


def test_what_is_no_linear_weight_is_left_alone() -> None:
    tensors = {
        "a.weight": DENSE,
        "a.bias": ((8,), torch.float32),
        "wrong_bias.weight": DENSE,
        "wrong_bias.bias": ((3,), torch.float32),
        "embed_tokens.weight": DENSE,
        "wte.weight": DENSE,
        "patch_embedding.weight": DENSE,
        "some_norm.weight": DENSE,
        "mlp.gate.weight": DENSE,
        "conv.weight": ((8, 16, 3), torch.float32),
        "experts.gate_up_proj": ((4, 8, 16), torch.float32),
        "table.weight": ((40, 16), torch.float32),
        "ids.weight": ((8, 16), torch.int64),
        "not_a_weight": DENSE,
        "score.weight": DENSE,
        "model.classifier.weight": DENSE,
    }
    found = select_layers(tensors, {"vocab_size": 40, "hidden_size": 16})
    assert [(layer.name, layer.bias and layer.bias.files[0]) for layer in found] == [
        ("a", "a.bias"),
        ("wrong_bias", None),
        ("model.classifier", None),
    ]


def test_a_vocabulary_as_large_as_another_dimension_tells_nothing() -> None:
    tensors = {"up_proj.weight": ((48, 16), torch.float32), "embed_tokens.weight": ((48, 16), torch.float32)}
    config = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 48}
    assert [layer.name for layer in select_layers(tensors, config)] == ["up_proj"]


@pytest.mark.parametrize("vocabulary", [96, 48, 192, 64, 112, 224])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_vocabulary_as_large_as_a_projection_tells_nothing(family: str, vocabulary: int) -> None:
    config = {
        "model_type": family,
        **SIZES,
        "intermediate_size": 112,
        "head_dim": 24,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
    }
    found = {layer.name for layer in select_layers(tensors_of(config), config)}
    assert found == {linear.name for linear in model_shapes(config).linears if not linear.is_head}


def test_patterns() -> None:
    tensors = {f"layers.{i}.{name}.weight": DENSE for i in range(2) for name in ("q", "k")}
    tensors["lm_head.weight"] = DENSE
    named = [layer.name for layer in select_layers(tensors, {}, include="*.q", exclude=["layers.0.*"])]
    assert named == ["layers.1.q"]
    assert "lm_head" in [layer.name for layer in select_layers(tensors, {}, exclude=())]
    with pytest.raises(
        ValueError, match=r"include must select at least one linear layer besides heads, got include=\['x'\]$"
    ):
        select_layers(tensors, {}, include="x")
    with pytest.raises(
        ValueError, match=r"select at least one linear layer besides heads, got exclude=\['\*'\]$"
    ):
        select_layers(tensors, {}, exclude=[*DEFAULT_EXCLUDE, "*"])
    with pytest.raises(ValueError, match=r"^the model has no linear layer to pack besides heads$"):
        select_layers({"lm_head.weight": DENSE}, {})
    with pytest.raises(ValueError, match=r"^the model has no linear layer to pack$"):
        select_layers({"norm.weight": DENSE}, {}, exclude=())
    with pytest.raises(TypeError, match="exclude must hold strings, got 3"):
        select_layers(tensors, {}, exclude=[3])  # type: ignore[list-item]


def test_weights_that_cannot_be_quantized_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.weight must be float64, .* got torch\.float8_e4m3fn"):
        select_layers({"a.weight": ((8, 16), torch.float8_e4m3fn)}, {})
    with pytest.raises(ValueError, match="got 'gpt2', whose Conv1D modules store them"):
        select_layers({"a.weight": DENSE}, {"model_type": "gpt2"})


def test_heads_of_any_name_are_dense_by_default() -> None:
    tensors = {
        f"{name}.weight": DENSE for name in ("score", "classifier", "qa_outputs", "lm_head", "up_proj")
    }
    assert [layer.name for layer in select_layers(tensors, {})] == ["up_proj"]
    assert len(select_layers(tensors, {}, exclude=())) == 5
