"""Experts, and families whose files have other names: from files, in memory, saved and loaded again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import littlebit2
from benchmarks.quality.families import dequantized
from littlebit2 import quantize_
from littlebit2.architecture.experts import LittleBitExperts, expand_experts, experts_layout
from littlebit2.checkpoint import open_checkpoint
from littlebit2.integrations.transformers import attach
from littlebit2.quantize import collect_importance
from littlebit2_kernels import LittleBitLinear
from tests.integrations.models.moe import MIXTURES, OTHERS, QUANT, UNPACKED, inputs_of, make, run, share


def quantized(model: Any) -> Any:
    packed = copy.deepcopy(model)
    quantize_(packed, QUANT, progress=False)
    attach(packed)
    return packed


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_files_and_memory_give_models_that_load_and_compute(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    littlebit2.quantize_checkpoint(tmp_path / "dense", tmp_path / "files", QUANT, progress=False)
    from_files = littlebit2.load(tmp_path / "files")
    from_files.save_pretrained(tmp_path / "again")
    in_memory = quantized(model)
    in_memory.save_pretrained(tmp_path / "memory")
    in_memory.save_pretrained(tmp_path / "twice")
    loaded = [littlebit2.load(tmp_path / folder) for folder in ("again", "memory", "twice")]
    library = type(model).from_pretrained(tmp_path / "files")
    for packed in (from_files, *loaded, in_memory, library):
        assert share(packed) > (0.7 if name in ("siglip", "t5") else 0.9)  # they read some weights
        torch.testing.assert_close(run(packed), run(dequantized(packed, model)), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", UNPACKED)
def test_experts_in_other_forms_stay_dense_and_are_named(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    report = littlebit2.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QUANT, progress=False)
    assert any(reason.endswith("holds experts in a form that is not packed") for reason in report.reasons)
    packed = littlebit2.load(tmp_path / "q")
    torch.testing.assert_close(run(packed), run(dequantized(packed, model)), atol=2e-4, rtol=2e-3)
    assert not any("router" in n for n, m in packed.named_modules() if isinstance(m, LittleBitLinear))
    assert len(report.reasons["router or gate"]) == (2 if name == "jetmoe" else 1)
    in_memory = quantize_(copy.deepcopy(model), QUANT, progress=False)
    assert any("experts in a form" in one.detail for one in in_memory.dense)


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_random_checkpoints_have_packed_experts_and_load(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.config.architectures = [type(model).__name__]
    names = littlebit2.synthesize(model.config, tmp_path / "out", 2.0, dtype=torch.float32)
    packed = littlebit2.load(tmp_path / "out")
    assert type(packed) is type(model)
    assert share(packed) > (0.7 if name in ("siglip", "t5") else 0.9)  # they read some weights
    assert run(packed).isfinite().all()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint.layers) == set(names)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_routers_stay_dense_and_experts_are_layers_of_their_own(name: str) -> None:
    packed = quantized(make(name))
    experts = [module for module in packed.modules() if isinstance(module, LittleBitExperts)]
    assert experts
    for module in experts:
        for index in range(module.layout.experts):
            children = dict(module.expert(index).named_children())
            assert set(children) == {"gate_proj", "up_proj", "down_proj"}
            assert all(isinstance(child, LittleBitLinear) for child in children.values())
            assert (children["up_proj"].bias is not None) == (name == "gpt_oss")
    assert not any("router" in n for n, m in packed.named_modules() if isinstance(m, LittleBitLinear))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_stay_dense_beside_packed_ones_load(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    littlebit2.quantize_checkpoint(
        tmp_path / "dense", tmp_path / "q", QUANT, exclude=["*lm_head*", "*.experts.1.*"], progress=False
    )
    packed = littlebit2.load(tmp_path / "q")
    assert type(packed.model.layers[0].mlp.experts.expert(1).up_proj) is torch.nn.Linear
    assert isinstance(packed.model.layers[0].mlp.experts.expert(2).up_proj, LittleBitLinear)
    torch.testing.assert_close(run(packed), run(dequantized(packed, model)), atol=2e-4, rtol=2e-3)
    packed.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(run(littlebit2.load(tmp_path / "again")), run(packed))


def test_importance_is_measured_by_expert_and_the_model_is_left_as_it_was() -> None:
    model = make("qwen3_moe")
    before = {name: type(module) for name, module in model.named_modules()}
    seen = collect_importance(model, [inputs_of(model)])
    assert {name: type(module) for name, module in model.named_modules()} == before
    tokens = inputs_of(model)["input_ids"].numel()
    experts = [name for name in seen if name.startswith("model.layers.0.mlp.experts.")]
    assert 0 < len(experts) <= 3 * 4
    assert tokens > 0
    importances = [seen[name].inputs for name in experts if name.endswith("up_proj")]
    assert not any(torch.equal(importances[0], other) for other in importances[1:])  # type: ignore[arg-type]


class _Experts(torch.nn.Module):
    """Experts as transformers holds them."""

    def __init__(self, experts: int = 6, hidden: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(experts, 2 * inner, hidden))
        self.down_proj = torch.nn.Parameter(torch.randn(experts, hidden, inner))
        self.act_fn = torch.nn.SiLU()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                if expert < len(self.down_proj):
                    gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                    output[token] += weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return output


@pytest.mark.parametrize(
    "index",
    [
        torch.empty(0, 2, dtype=torch.long),
        torch.zeros(5, 2, dtype=torch.long),
        torch.tensor([[3, 3], [0, 5], [5, 0]]),
        torch.tensor([[6, 1], [6, 6]]),
    ],
    ids=["no-tokens", "one-expert", "repeated", "past-the-last"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_routing(index: torch.Tensor, dtype: torch.dtype, rng: torch.Generator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(_Experts()).to(dtype)
    x = torch.randn(len(index), 16, generator=rng).to(dtype)
    weights = torch.rand(index.shape, generator=rng).to(dtype)
    expected = model[0](x, index, weights)
    expand_experts(model)
    got = model[0](x, index, weights)
    assert got.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got, expected, atol=tolerance * 20, rtol=tolerance)
    compiled = torch.compile(model[0], backend="eager")(x, index, weights)
    torch.testing.assert_close(compiled, got)


def test_only_experts_that_are_routed_to_are_called() -> None:
    model = torch.nn.Sequential(_Experts())
    expand_experts(model)
    called: list[int] = []
    for index in range(6):
        model[0].expert(index).down_proj.register_forward_hook(lambda *_, i=index: called.append(i))
    model[0](torch.randn(3, 16), torch.tensor([[4, 1], [1, 4], [4, 4]]), torch.rand(3, 2))
    assert called == [1, 4]


def test_modules_with_other_tensors_are_no_experts() -> None:
    assert experts_layout(torch.nn.Linear(4, 4)) is None
    other = _Experts()
    other.down_proj = torch.nn.Parameter(torch.randn(6, 5, 7))
    assert experts_layout(other) is None
    with pytest.raises(ValueError, match="source must hold 3-D"):
        LittleBitExperts(other)


def test_models_quantized_by_others_are_refused_with_advice(tmp_path: Path) -> None:
    make("gpt_oss").save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"quantized already by fp8.*FineGrainedFP8Config\(dequantize=True\)"
    ):
        littlebit2.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QUANT, progress=False)


def test_names_of_packed_layers_are_those_of_the_files(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path / "dense")
    littlebit2.quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QUANT, progress=False)
    with open_checkpoint(tmp_path / "q") as checkpoint:
        assert "model.layers.0.block_sparse_moe.experts.3.w1" in checkpoint.layers
