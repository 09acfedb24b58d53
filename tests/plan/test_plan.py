"""Ranks and sizes of whole models from their configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from littlebit2.plan import ModelPlan, load_config, plan_model, shipped_configs
from littlebit2.quantize import QuantConfig
from littlebit2_kernels.format import PackedLinear, PackedPath, words_per_row

#: Ranks of each of two paths, by model, bits per weight and projection (LittleBit's rule, see
#: docs/quantization.md).
RANKS = {
    "llama-2-7b": {
        1.0: {"q_proj": 1000, "k_proj": 1000, "up_proj": 1472, "down_proj": 1472},
        0.55: {"q_proj": 544, "k_proj": 544, "up_proj": 800, "down_proj": 800},
        0.3: {"q_proj": 288, "k_proj": 288, "up_proj": 424, "down_proj": 424},
        0.1: {"q_proj": 80, "k_proj": 80, "up_proj": 128, "down_proj": 128},
    },
    "llama-2-13b": {
        1.0: {"q_proj": 1256, "k_proj": 1256, "up_proj": 1848, "down_proj": 1848},
        0.55: {"q_proj": 680, "k_proj": 680, "up_proj": 1008, "down_proj": 1008},
        0.3: {"q_proj": 360, "k_proj": 360, "up_proj": 536, "down_proj": 536},
        0.1: {"q_proj": 104, "k_proj": 104, "up_proj": 168, "down_proj": 168},
    },
    "llama-2-70b": {
        1.0: {"q_proj": 2024, "k_proj": 432, "v_proj": 432, "up_proj": 3168},
        0.55: {"q_proj": 1104, "k_proj": 232, "v_proj": 232, "up_proj": 1728},
        0.3: {"q_proj": 592, "k_proj": 120, "v_proj": 120, "up_proj": 936},
        0.1: {"q_proj": 184, "k_proj": 24, "v_proj": 24, "up_proj": 296},
    },
    "llama-3-8b": {
        1.0: {"q_proj": 1000, "k_proj": 392, "v_proj": 392, "up_proj": 1568},
        0.55: {"q_proj": 544, "k_proj": 208, "v_proj": 208, "up_proj": 856},
        0.3: {"q_proj": 288, "k_proj": 104, "v_proj": 104, "up_proj": 456},
        0.1: {"q_proj": 80, "k_proj": 24, "v_proj": 24, "up_proj": 136},
    },
}


def planned(name: str, bpw: float, **options: object) -> ModelPlan:
    return plan_model(name, QuantConfig(bpw=bpw, **{"paths": 2, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("bpw", [1.0, 0.55, 0.3, 0.1])
def test_ranks_are_those_of_the_papers_rule(name: str, bpw: float) -> None:
    plan = planned(name, bpw)
    for layer in plan.layers:
        expected = RANKS[name][bpw].get(layer.name.rpartition(".")[2])
        if expected is not None:
            assert layer.ranks == (expected, expected), layer.name
    assert bpw - 0.005 < plan.counted_bpw <= bpw


@pytest.mark.parametrize(
    ("name", "bpw", "reported", "tolerance"),
    [
        ("llama-2-13b", 0.1, 0.84, 0.03),
        ("llama-2-7b", 0.1, 0.63, 0.03),
        ("llama-2-7b", 0.3, 0.79, 0.03),
    ],
)
def test_total_size_is_what_the_papers_report(
    name: str, bpw: float, reported: float, tolerance: float
) -> None:
    total = planned(name, bpw).bytes()["total"]
    assert abs(total / 1e9 - reported) < tolerance * reported


def test_further_reported_sizes() -> None:
    assert planned("llama-2-70b", 0.1).bytes()["total"] < 2e9
    size = planned("llama-2-13b", 0.1).bytes()
    assert size["total"] < 0.9e9
    assert round(size["model_fp16"] / size["total"]) == 31


def test_parts_add_up() -> None:
    size = planned("llama-2-7b", 0.55).bytes()
    assert size["linear_fp16"] == 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert size["embeddings"] == size["heads"] == 2 * 32000 * 4096
    assert size["norms"] == 2 * 65 * 4096
    dense = size["embeddings"] + size["heads"] + size["norms"]
    assert size["model_fp16"] == size["linear_fp16"] + dense == 2 * 6_738_415_616
    assert size["total"] == size["words"] + size["scales_fp32"] + dense
    assert size["total_fp16_scales"] == size["total"] - size["scales_fp16"]
    assert size["scales_fp32"] == 2 * size["scales_fp16"]
    assert size["total_without_embeddings"] == size["words"] + size["scales_fp32"] + size["norms"]


def test_a_layer_is_as_large_as_planned() -> None:
    layer = planned("llama-3-8b", 0.1).layers[1]
    k, n = layer.in_features, layer.out_features
    assert (layer.name, k, n) == ("model.layers.0.self_attn.k_proj", 4096, 1024)
    paths = [
        PackedPath(
            v=torch.zeros(rank, words_per_row(k), dtype=torch.int32),
            in_scale=torch.ones(k),
            out_scale=torch.ones(n),
            u=torch.zeros(n, words_per_row(rank), dtype=torch.int32),
            latent_scale=torch.ones(rank),
        )
        for rank in layer.ranks
    ]
    packed = PackedLinear(paths)
    assert layer.stored_bytes() == packed.nbytes
    assert layer.stored_bpw == packed.shape.stored_bpw


def test_options_select_layers_and_ranks() -> None:
    plan = planned("llama-3-8b", 0.55, kv_factor=2.0)
    by_name = {layer.name.rpartition(".")[2]: layer.ranks for layer in plan.layers}
    assert by_name["k_proj"] == by_name["v_proj"] == (416, 416)
    assert by_name["q_proj"] == (544, 544)
    plan = plan_model("llama-3-8b", QuantConfig(ranks=(64, 32, 8)), exclude=("*lm_head*", "*.mlp.*"))
    assert {layer.ranks for layer in plan.layers} == {(64, 32, 8)}
    assert len(plan.layers) == 4 * 32
    assert plan.bytes()["other_matrices"] == 2 * 32 * 3 * 4096 * 14336
    assert "lm_head" in [layer.name for layer in plan_model("llama-3-8b", QuantConfig(), exclude=()).layers]
    with pytest.raises(
        ValueError, match=r"include must select at least one linear layer besides heads, got include=\['x'\]"
    ):
        plan_model("llama-3-8b", QuantConfig(), include="x")
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj': bpw must be above"):
        planned("llama-3-8b", 0.01)


def test_layers_that_are_too_small_stay_dense() -> None:
    plan = planned("llama-3-8b", 0.03)  # the scales of two paths alone take 0.039 bits of k_proj and v_proj
    small = {shape.name.rpartition(".")[2] for shape in plan.left_dense}
    assert small == {"k_proj", "v_proj", "lm_head"}
    assert len(plan.layers) == 5 * 32
    assert plan.bytes()["other_matrices"] == 2 * 2 * 32 * 4096 * 1024


def test_a_tied_head_is_counted_once() -> None:
    config = {**load_config("llama-2-7b"), "tie_word_embeddings": True}
    size = plan_model(config, QuantConfig(bpw=0.1)).bytes()
    assert size["heads"] == 0
    assert size["embeddings"] == 2 * 32000 * 4096


def test_configurations_are_found(tmp_path: Path) -> None:
    assert shipped_configs() == ("llama-2-13b", "llama-2-70b", "llama-2-7b", "llama-3-8b", "qwen3-8b")
    config = load_config("Llama-2-7B")
    assert config["hidden_size"] == 4096
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == config
    with pytest.raises(FileNotFoundError, match=r"nothing: expected a config\.json, .*llama-2-13b"):
        load_config("nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_config(tmp_path)
