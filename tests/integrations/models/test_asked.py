"""Layers whose weight is asked for its dtype, as T5 asks ``wo``: packed, in every dtype."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import littlebit2
from littlebit2.architecture.linears import dense_reasons
from littlebit2.architecture.reads import modules_asked_for_dtype
from littlebit2.architecture.salient import SalientLinear
from littlebit2.architecture.typed import TypedLinear
from littlebit2.integrations.transformers import attach
from littlebit2.train import make_trainable, pack_model
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.testing import make_packed
from tests.integrations.families import quantized_copy, reconstructed_copy, relative_error

SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 160}
WO = "encoder.block.0.layer.1.DenseReluDense.wo"


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES, feed_forward_proj=request.param, initializer_factor=3.0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def packed(model: Any) -> Any:
    made = quantized_copy(model)
    attach(made)
    return made


def outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
    return logits


def test_packed_in_memory_and_from_files(model: Any, packed: Any, tmp_path: Path) -> None:
    layer = packed.get_submodule(WO)
    assert isinstance(layer, TypedLinear)
    assert layer.weight.dtype == torch.float32
    expected = outputs(reconstructed_copy(model, packed))
    assert relative_error(outputs(packed), expected) < 1e-4
    packed.save_pretrained(tmp_path)
    for load in (littlebit2.load, transformers.T5ForConditionalGeneration.from_pretrained):
        loaded = load(tmp_path)
        assert isinstance(loaded.get_submodule(WO), TypedLinear)
        assert relative_error(outputs(loaded), expected) < 1e-4
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    made = transformers.T5ForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    assert relative_error(outputs(made), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_those_of_the_dense_model(
    model: Any, packed: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    reference = reconstructed_copy(model, packed)
    reference.save_pretrained(tmp_path / "dense")
    packed.save_pretrained(tmp_path / "packed")
    dense = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=dtype)
    loaded = littlebit2.load(tmp_path / "packed", dtype=dtype)
    layer = loaded.get_submodule(WO)
    assert isinstance(layer, TypedLinear)
    # The library keeps this weight in float32 where the model is in float16.
    assert layer.weight.dtype == dense.get_submodule(WO).weight.dtype
    assert (layer.weight.dtype == torch.float32) == (dtype == torch.float16)
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, given, result: seen.extend([given[0].dtype, result.dtype]))
    got, exact = outputs(loaded), outputs(reference)
    assert seen == [layer.weight.dtype] * 2
    assert got.dtype == outputs(dense).dtype
    allowed = max(3 * relative_error(outputs(dense).float(), exact), 0.02)
    assert relative_error(got.float(), exact) < allowed


def test_trained_and_packed_again(packed: Any) -> None:
    student = copy.deepcopy(packed)
    y = outputs(student)
    assert make_trainable(student, {WO: student.get_submodule(WO).packed}) == [WO]
    assert relative_error(outputs(student), y) < 1e-4
    pack_model(student)
    assert isinstance(student.get_submodule(WO), TypedLinear)
    assert relative_error(outputs(student), y) < 1e-4


def test_adapters(packed: Any) -> None:
    peft = pytest.importorskip("peft")
    from littlebit2.integrations.peft import with_packed_layers

    y = outputs(packed)
    config = with_packed_layers(peft.LoraConfig(target_modules=["wo"]))
    adapted = peft.get_peft_model(copy.deepcopy(packed), config)
    assert relative_error(outputs(adapted), y) < 1e-6


class Asking(nn.Module):
    """Asks the first three for dtype, device or kind; reads the values of the others too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "third", "both", "values", "biased"):
            setattr(self, name, nn.Linear(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x.to(self.first.weight.dtype))
        y = self.second(y.to(self.second.weight.device))
        if isinstance(self.third.weight, torch.Tensor) and self.third.weight.dtype.is_floating_point:
            y = self.third(y)
        y = self.both(y.to(self.both.weight.dtype)) + self.both.weight.sum()
        y = functional.linear(y, self.values.weight)
        return self.biased(y.to(self.biased.bias.dtype))


def test_what_is_asked_is_told_from_what_is_read() -> None:
    model = Asking()
    assert modules_asked_for_dtype(model) == {"first", "second", "third"}
    reasons = dense_reasons(model)
    assert set(reasons) == {"both", "values", "biased"}
    assert all("reads its weight" in reason for reason in reasons.values())


def test_a_weight_that_is_only_asked(rng: torch.Generator) -> None:
    made = make_packed(32, 24, (8,), bias=True, generator=rng)
    layer = TypedLinear.from_packed(made, weight_dtype=torch.bfloat16)
    plain = LittleBitLinear.from_packed(made)
    x = torch.randn(3, 32, generator=rng)
    assert torch.equal(layer(x), plain(x))
    assert set(layer.state_dict()) == set(plain.state_dict())
    assert layer.weight.dtype == torch.bfloat16
    assert not list(layer.parameters())
    with pytest.raises(RuntimeError):
        functional.linear(x, layer.weight)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert isinstance(copied, TypedLinear)
        assert copied.weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.u1.dtype == torch.float32
    assert layer.to("meta").weight.device.type == "meta"
    beside = SalientLinear(TypedLinear.from_packed(made), torch.tensor([1]), torch.zeros(24, 1))
    assert beside.weight.dtype == torch.float32
    with pytest.raises(AttributeError, match="weight"):
        _ = SalientLinear(plain, torch.tensor([1]), torch.zeros(24, 1)).weight


def test_it_compiles(rng: torch.Generator) -> None:
    layer = TypedLinear.from_packed(make_packed(32, 24, (8,), generator=rng)).prepack_()

    def call(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype))

    x = torch.randn(3, 32, generator=rng).bfloat16()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), call(x))
