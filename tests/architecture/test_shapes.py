"""Shapes from a configuration are those of the models that transformers builds."""

from __future__ import annotations

import json

import pytest
import torch

from littlebit2.architecture.shapes import FAMILIES, model_shapes

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
OPT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "ffn_dim": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
}

CASES = [
    ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    ),
    ("MistralForCausalLM", "MistralConfig", GROUPED),
    ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "attention_bias": True}),
    ("GemmaForCausalLM", "GemmaConfig", GROUPED),
    ("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED),
    ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    ("PhiForCausalLM", "PhiConfig", {**GROUPED, "qk_layernorm": True}),
    ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 32}),
    ("OPTForCausalLM", "OPTConfig", {**OPT, "do_layer_norm_before": False, "enable_bias": False}),
    ("OPTForCausalLM", "OPTConfig", {**OPT, "tie_word_embeddings": False}),
    ("BertModel", "BertConfig", SMALL),
    ("BertForMaskedLM", "BertConfig", SMALL),
]


@pytest.mark.parametrize(("model", "config", "sizes"), CASES)
def test_shapes_are_those_of_the_model(model: str, config: str, sizes: dict) -> None:
    transformers = pytest.importorskip("transformers")
    built_config = getattr(transformers, config)(**sizes)
    with torch.device("meta"):
        built = getattr(transformers, model)(built_config)
    built_config.architectures = [model]
    shapes = model_shapes(json.loads(built_config.to_json_string()))
    found: dict[str, tuple[int, ...]] = {dense.name: dense.shape for dense in shapes.dense}
    for linear in shapes.linears:
        found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    assert found == {name: tuple(tensor.shape) for name, tensor in built.named_parameters()}
    linears = {name for name, module in built.named_modules() if type(module) is torch.nn.Linear}
    heads = {name for name in linears if name in ("lm_head", "cls.predictions.decoder")}
    listed = {linear.name for linear in shapes.linears}
    assert listed | heads == linears
    assert shapes.tied_head == bool(heads - listed)


def test_every_family_is_covered() -> None:
    transformers = pytest.importorskip("transformers")
    assert {getattr(transformers, config).model_type for _, config, _ in CASES} == set(FAMILIES)


def test_errors_name_what_is_wrong() -> None:
    llama = {"model_type": "llama", **GROUPED}
    with pytest.raises(ValueError, match=r"model_type must be one of bert, gemma, .*qwen3, got 'mamba'"):
        model_shapes({"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"got 'gemma3' \(its text_config can be planned on its own\)"):
        model_shapes({"model_type": "gemma3", "text_config": {}})
    with pytest.raises(ValueError, match="config: intermediate_size must be a positive integer, got None"):
        model_shapes({name: value for name, value in llama.items() if name != "intermediate_size"})
    with pytest.raises(ValueError, match="config: hidden_size must be a positive integer, got '64'"):
        model_shapes({**llama, "hidden_size": "64"})
    with pytest.raises(ValueError, match="hidden_size = 65 must be a multiple of num_attention_heads = 4"):
        model_shapes({**llama, "hidden_size": 65})
    with pytest.raises(ValueError, match="config: attention_bias must be true or false, got 1"):
        model_shapes({**llama, "attention_bias": 1})
    with pytest.raises(ValueError, match="must be BertModel or BertForMaskedLM, got 'BertForTokenClass"):
        model_shapes({**SMALL, "model_type": "bert", "architectures": ["BertForTokenClassification"]})
