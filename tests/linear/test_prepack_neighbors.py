"""``LittleBitLinear``'s change of layout beside what else users do with modules and their buffers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from littlebit2_kernels import LittleBitLinear, PackedLinear, PackedPath, littlebit_linear, prepack
from littlebit2_kernels.testing import make_packed, make_problem


class Counting(LittleBitLinear):
    """A subclass with a buffer of its own."""


def test_buffers_of_others_survive(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], bias=True, generator=rng)
    module = Counting.from_packed(packed)
    module.register_buffer("count", torch.ones(3))
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    keys = list(module.state_dict())
    module(x)
    assert "prepacked" in dict(module.named_buffers())
    assert torch.equal(module.count, torch.ones(3))
    assert sorted(module.state_dict()) == sorted(keys)
    module.unpack_()
    assert {"count", "scratch"} <= dict(module.named_buffers()).keys()
    assert sorted(module.state_dict()) == sorted(keys)
    module.prepack_()
    assert torch.equal(pickle.loads(pickle.dumps(module)).count, torch.ones(3))


def test_the_order_of_a_state_dict_stays(rng: torch.Generator) -> None:
    module = LittleBitLinear.from_packed(make_packed(40, 30, [16, 8], bias=True, generator=rng))
    before = list(module.state_dict())
    assert list(module.prepack_().state_dict()) == before


def test_shallow_copies_keep_their_layout(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed)
    other = copy.copy(module)
    module(x)
    other(x)
    module.unpack_()
    assert "prepacked" not in other.state_dict()
    assert torch.equal(module(x), other(x))


def test_equal_scales_of_separate_paths_stay_separate(rng: torch.Generator) -> None:
    """One V with two in_scale tensors of equal values is two first stages to Python: so it comes back."""
    packed = make_packed(40, 30, [16, 16], generator=rng)
    first, second = packed.paths
    twin = PackedPath(first.v, first.in_scale.clone(), second.out_scale, second.u, second.latent_scale)
    layer = PackedLinear((first, twin))
    assert layer.shares == (0, 1)
    assert prepack(layer).unpack().shares == (0, 1)
    module = LittleBitLinear.from_packed(layer)
    keys = module.state_dict().keys()
    x = torch.randn(3, 40, generator=rng)
    expected = module(x)
    assert module.state_dict().keys() == keys
    module.unpack_()
    assert torch.equal(module(x), expected)


def test_a_scale_with_a_gradient_is_refused(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed)
    module.u1.requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient, but packed layers are frozen"):
        module(x)
    with pytest.raises(ValueError, match="a scale of packed requires a gradient"):
        module.prepack_()
    leaf = torch.ones(1, 30, requires_grad=True)
    other = LittleBitLinear.from_packed(make_packed(40, 30, [16], generator=rng))
    with pytest.raises(RuntimeError, match="packed layers are frozen"):
        torch.func.functional_call(other, {"u1": leaf}, x)


def test_sharing_memory_keeps_the_layout(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed).prepack_()
    module.share_memory()
    assert dict(module.named_buffers())["prepacked"].is_shared()
    assert torch.equal(module(x), littlebit_linear(x, prepack(packed)))


def test_to_empty_brings_the_buffers_back(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed).prepack_()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    assert torch.equal(module(x), littlebit_linear(x, prepack(packed)))


def test_tracing_leaves_a_new_layer_alone(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    expected = littlebit_linear(x, packed)
    for trace in (
        lambda module: make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x)(x),
        lambda module: make_fx(module)(x)(x),
    ):
        module = LittleBitLinear.from_packed(packed)
        assert torch.equal(trace(module), expected)
        assert "u1" in dict(module.named_buffers())
    module = LittleBitLinear.from_packed(packed)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x)).shape == (2, 30)


def test_modes_that_need_the_layout_say_so(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed, activation="int8", auto_prepack=False)
    with pytest.raises(ValueError, match=r"activation='int8' needs a prepacked layer .* call prepack_\(\)"):
        module(x)
    assert module.prepack_()(x).shape == (2, 30)
    meta = LittleBitLinear(40, 30, [16], activation="int8", device="meta")
    assert meta(x.to("meta")).shape == (2, 30)
    module.activation = ["int8"]  # type: ignore[assignment]
    with pytest.raises((TypeError, ValueError), match="activation"):
        module(x)


def test_prepacked_layers_pickle_as_packed_ones(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16, 16], share_v=True, bias=True, generator=rng)
    prepacked = prepack(packed)
    data = pickle.dumps(prepacked)
    assert b"LB2CPU" not in data
    assert torch.equal(littlebit_linear(x, pickle.loads(data)), littlebit_linear(x, prepacked))


def test_averaging_two_copies_that_do_not_prepack(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    model = nn.Sequential(LittleBitLinear.from_packed(packed, auto_prepack=False))
    average = torch.optim.swa_utils.AveragedModel(model)
    model(x)
    average.update_parameters(model)
    assert torch.equal(average(x), model(x))
