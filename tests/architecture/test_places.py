"""Modules that a model also keeps outside of its children are replaced there too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from littlebit2 import quantize_
from littlebit2.architecture.expansion import expanded
from littlebit2.architecture.places import Places
from littlebit2.quantize import QuantConfig
from littlebit2.train import make_trainable, pack_model
from littlebit2_kernels import LittleBitLinear

QUANT = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=1)


class Kept(nn.Module):
    """Calls its layers through a list, a dictionary and an attribute of its own, not through its children."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 48), nn.Linear(48, 32)]
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.steps = [layers[0], (layers[1],)]
        self.named = {"third": layers[2]}
        self.__dict__["last"] = layers[3]

    def forward(self, x: torch.Tensor) -> Any:
        first, (second,) = self.steps  # type: ignore[misc]
        return self.last(self.named["third"](second(first(x))))


def called(model: Kept) -> list[nn.Module]:
    return [model.steps[0], model.named["third"], model.last]


def test_every_reference_follows() -> None:
    model, new = Kept(), nn.Linear(32, 32)
    kept = model.steps
    places = Places(model)
    places.put("0", new)
    assert model.get_submodule("0") is model.steps[0] is new
    assert model.steps is kept
    assert model.steps[1] == (model.get_submodule("1"),)
    newest = nn.ReLU()
    places.put("1", newest)
    assert model.steps[1] == (newest,)
    places.put("0", newest)
    assert model.steps[0] is newest
    places.put("new", newest)
    assert model.get_submodule("new") is newest
    with pytest.raises(AttributeError):
        places.put("none.new", newest)


def test_quantize_in_place_and_train(rng: torch.Generator) -> None:
    model = Kept()
    x = torch.randn(2, 32, generator=rng)
    quantize_(model, QUANT, progress=False)
    layers = called(model)
    assert all(isinstance(layer, LittleBitLinear) for layer in layers)
    weights = [layer.dequantize() for layer in layers if isinstance(layer, LittleBitLinear)]
    biases = [layer.bias for layer in layers]
    inner = torch.relu(x @ weights[0].T + biases[0])
    expected = (inner @ weights[1].T + biases[1]) @ weights[2].T + biases[2]  # type: ignore[operator]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    y = model(x)
    make_trainable(model, {str(i): model.get_submodule(str(i)).packed for i in (0, 2, 3)})
    assert called(model) == [model.get_submodule(name) for name in ("0", "2", "3")]
    pack_model(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


class Conv1D(nn.Module):
    """As GPT-2's: the weight is ``[K, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 48))
        self.bias = nn.Parameter(torch.randn(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_transposed_layers_in_a_list(rng: torch.Generator) -> None:
    model = nn.Module()
    model.add_module("inner", Conv1D())
    model.calls = [model.inner]  # type: ignore[assignment]
    with expanded(model):
        assert model.calls == [model.inner]  # type: ignore[comparison-overlap]
        assert isinstance(model.inner, nn.Linear)
    assert isinstance(model.calls[0], Conv1D)  # type: ignore[index]
    quantize_(model, QUANT, progress=False)
    assert model.calls == [model.inner]  # type: ignore[comparison-overlap]
    assert isinstance(model.inner, LittleBitLinear)
