"""GPT-2, whose linear layers are ``Conv1D`` modules with weights ``[K, N]``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import littlebit2
from benchmarks.quality.families import dequantized
from littlebit2 import QuantConfig, quantize_, quantize_linear
from littlebit2.architecture.select import DEFAULT_EXCLUDE
from littlebit2.architecture.transposed import expand_transposed, is_transposed
from littlebit2.integrations.transformers import attach
from littlebit2.plan import plan_model
from littlebit2.quantize import collect_importance
from littlebit2.train import make_trainable
from littlebit2_kernels import LittleBitLinear

QUANT = QuantConfig(ranks=(16,), method="joint-itq", itq_iterations=2)
#: Modules of a block by name: K and N.
LAYERS = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 96), "mlp.c_proj": (96, 64)}


@pytest.fixture
def model() -> Any:
    config = transformers.GPT2Config(
        vocab_size=160, n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    made = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LittleBitLinear)}


def test_files_and_memory_give_models_that_load_and_compute(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "dense")
    littlebit2.quantize_checkpoint(tmp_path / "dense", tmp_path / "files", QUANT, progress=False)
    from_files = littlebit2.load(tmp_path / "files")
    from_files.save_pretrained(tmp_path / "again")
    in_memory = copy.deepcopy(model)
    quantize_(in_memory, QUANT, progress=False)
    attach(in_memory)
    in_memory.save_pretrained(tmp_path / "memory")
    library = type(model).from_pretrained(tmp_path / "files")
    again, memory = (littlebit2.load(tmp_path / folder) for folder in ("again", "memory"))
    wanted = {f"transformer.h.{block}.{name}" for block in range(2) for name in LAYERS}
    for packed in (from_files, again, in_memory, memory, library):
        assert names(packed) == wanted
        torch.testing.assert_close(logits(packed), logits(dequantized(packed, model)), atol=2e-4, rtol=2e-3)


def test_layers_left_out_stay_what_they_are(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "dense")
    report = littlebit2.quantize_checkpoint(
        tmp_path / "dense", tmp_path / "files", QUANT, exclude=("*attn*", *DEFAULT_EXCLUDE), progress=False
    )
    assert set(report.reasons["excluded"]) == {
        f"transformer.h.{block}.attn.{name}" for block in range(2) for name in ("c_attn", "c_proj")
    }
    packed = littlebit2.load(tmp_path / "files")
    block = packed.transformer.h[0]
    assert type(block.attn.c_attn) is Conv1D
    assert torch.equal(block.attn.c_attn.weight, model.transformer.h[0].attn.c_attn.weight)
    assert isinstance(block.mlp.c_fc, LittleBitLinear)

    in_memory = copy.deepcopy(model)
    found = quantize_(in_memory, QUANT, exclude=("*attn*", *DEFAULT_EXCLUDE), progress=False)
    assert type(in_memory.transformer.h[0].attn.c_attn) is Conv1D
    assert {(one.name, one.kind, one.reason) for one in found.dense if "h.0" in one.name} == {
        ("transformer.h.0.attn.c_attn", "Conv1D", "pattern"),
        ("transformer.h.0.attn.c_proj", "Conv1D", "pattern"),
    }


def test_importance_sees_the_layers(model: Any) -> None:
    before = dict(model.named_modules())
    found = collect_importance(
        model, [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}], loss=lambda o: o.loss
    )
    assert dict(model.named_modules()) == before
    for name, (k, n) in LAYERS.items():
        one = found[f"transformer.h.1.{name}"]
        assert one.inputs.shape == (k,)
        assert one.outputs is not None
        assert one.outputs.shape == (n,)


def test_plan_counts_the_layers(model: Any) -> None:
    planned = plan_model(model.config.to_dict(), QUANT)
    assert {
        layer.name.removeprefix("transformer.h.0."): (layer.in_features, layer.out_features)
        for layer in planned.layers
        if ".h.0." in layer.name
    } == LAYERS


def test_one_layer_is_quantized_and_trained(model: Any) -> None:
    source = model.transformer.h[0].mlp.c_fc
    assert isinstance(source, Conv1D)
    packed = quantize_linear(source, QUANT)
    assert (packed.in_features, packed.out_features) == LAYERS["mlp.c_fc"]
    linear = nn.Linear(64, 96)
    with torch.no_grad():
        linear.weight.copy_(source.weight.T)
        linear.bias.copy_(source.bias)
    expected = quantize_linear(linear, QUANT)
    assert torch.equal(packed.dequantize(), expected.dequantize())
    name = "transformer.h.0.mlp.c_fc"
    assert make_trainable(model, {name: packed.packed}) == [name]


def test_what_only_looks_like_it_is_left_alone() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).abs()

    model = nn.Sequential(Conv1D(), nn.Conv1d(4, 4, 1), nn.Linear(8, 8))
    assert not any(map(is_transposed, model))
    before = list(model)
    expand_transposed(model)
    assert list(model) == before
