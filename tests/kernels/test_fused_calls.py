"""``mlp``, and ``grouped_linear`` with a norm and a residual, against float64 and against their parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from littlebit2_kernels import PackedLinear, RMSNorm, grouped_linear, littlebit_linear, mlp, prepack
from littlebit2_kernels.testing import linear_reference, make_packed, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Error against float64, relative in the Frobenius norm: the rounding of the output, and in 16 bits that of
#: int16 sums in up to three layers one after another.
ALLOWED = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 6e-3}
FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def _layer(k: int, n: int, ranks: list[int] | None, rng: torch.Generator, bias: bool = False) -> PackedLinear:
    """A layer whose outputs are about as large as its inputs, as those of models are."""
    layer = make_packed(k, n, ranks, bias=bias, generator=rng)
    gain = math.sqrt(k * sum(ranks or [1]))
    paths = [dataclasses.replace(path, out_scale=path.out_scale / gain) for path in layer.paths]
    return PackedLinear(tuple(paths), layer.bias)


#: Layers of MLPs: K, hidden columns, N, ranks of each layer, biases.
MLPS = {
    "gated": (100, 300, 70, ([40], [40], [48]), False),
    "paths": (70, 130, 100, ([16, 24], [8, 8, 8], [24, 40]), True),
    "mixed": (33, 129, 17, (None, [16], None), True),
    "plain": (100, 257, 100, ([40], [56]), True),
    "wide": (1500, 900, 60, ([104], [200], [96]), False),
}
#: The same of one layer whose halves are gate and up.
HALVES = {
    "halves": (100, 300, 70, ([40], [48]), False),
    "aligned": (64, 256, 90, ([16, 24], [48]), True),
    "single-stage": (50, 77, 20, (None, [16]), True),
}


def _make(name: str, rng: torch.Generator) -> list[PackedLinear]:
    k, hidden, n, ranks, bias = (MLPS | HALVES)[name]
    first = 2 * hidden if name in HALVES else hidden
    layers = [_layer(k, first, rank, rng, bias) for rank in ranks[:-1]]
    return [*layers, _layer(hidden, n, ranks[-1], rng, bias)]


def _wide_norm(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    x = x.double()
    if norm is None:
        return x
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight.double() + norm.offset)


def _wide_mlp(x: torch.Tensor, layers: Sequence[PackedLinear], function: str) -> torch.Tensor:
    outputs = [linear_reference(x, layer) for layer in layers[:-1]]
    if len(layers) == 2 and layers[0].out_features != layers[1].in_features:
        outputs = list(outputs[0].chunk(2, -1))
    hidden = FUNCTIONS[function](outputs[0])
    return linear_reference(hidden * outputs[1] if len(outputs) == 2 else hidden, layers[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MLPS, *HALVES])
def test_mlp(name: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    layers = _make(name, rng)
    prepacked = [prepack(layer) for layer in layers]
    k, n = layers[0].in_features, layers[-1].out_features
    norm = RMSNorm(torch.randn(k, generator=rng).to(dtype), 1e-5, 1.0)
    for tokens, function in zip((0, 1, 2, 9, 64), (*FUNCTIONS, "silu"), strict=True):
        x = torch.randn(tokens, k, generator=rng).to(dtype)
        residual = torch.randn(tokens, n, generator=rng).to(dtype)
        for one_norm, added in ((None, None), (norm, residual)):
            y = mlp(x, prepacked, function, norm=one_norm, residual=added)
            truth = _wide_mlp(_wide_norm(x, one_norm), layers, function)
            truth = truth if added is None else truth + added.double()
            assert y.dtype == dtype
            assert y.shape == (tokens, n)
            assert relative_error(y, truth) <= ALLOWED[dtype]
            # Packed layers are composed: the same meaning.
            composed = mlp(x, layers, function, norm=one_norm, residual=added)
            assert relative_error(composed, truth) <= 4 * ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_with_norm_and_residual(dtype: torch.dtype, rng: torch.Generator) -> None:
    layers = [_layer(333, 70, [40], rng), _layer(333, 300, [16, 24], rng, True), _layer(333, 5, None, rng)]
    prepacked = [prepack(layer) for layer in layers]
    for tokens in (1, 3, 17):
        x = torch.randn(2, tokens, 333, generator=rng).to(dtype)
        weight = torch.randn(333, generator=rng)
        for weight_dtype in DTYPES:
            norm = RMSNorm(weight.to(weight_dtype), 1e-6)
            wide = _wide_norm(x, norm)
            for kind in (prepacked, layers):
                for y, layer in zip(grouped_linear(x, kind, norm=norm), layers, strict=True):
                    assert y.shape == (2, tokens, layer.out_features)
                    assert relative_error(y, linear_reference(wide, layer)) <= 3 * ALLOWED[dtype]
        residual = torch.randn(2, tokens, 300, generator=rng).to(dtype)
        (y,) = grouped_linear(x, prepacked[1:2], residual=residual)
        truth = linear_reference(x.double(), layers[1]) + residual.double()
        assert relative_error(y, truth) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_do_not_depend_on_their_batch(dtype: torch.dtype, rng: torch.Generator) -> None:
    layers = [prepack(layer) for layer in _make("gated", rng)]
    x = torch.randn(50, 100, generator=rng).to(dtype)
    norm = RMSNorm(torch.randn(100, generator=rng), 1e-5)
    y = mlp(x, layers, "silu", norm=norm)
    for token in (0, 7, 49):
        assert torch.equal(mlp(x[token], layers, "silu", norm=norm), y[token])
    grouped = grouped_linear(x, layers[:2], norm=norm)
    for layer, both in zip(layers[:2], grouped, strict=True):
        assert torch.equal(grouped_linear(x[3:4], [layer], norm=norm)[0], both[3:4])


def test_more_layers_than_one_call_takes(rng: torch.Generator) -> None:
    layers = [prepack(_layer(40, 9 + i, [8], rng)) for i in range(11)]
    x = torch.randn(3, 40, generator=rng)
    for y, layer in zip(grouped_linear(x, layers), layers, strict=True):
        assert torch.equal(y, littlebit_linear(x, layer))


@pytest.mark.parametrize("mode", ["exact", "int16", "int8", "sign"])
def test_modes_apply_to_every_layer(mode: str, rng: torch.Generator) -> None:
    layers = [prepack(layer) for layer in _make("gated", rng)]
    x = torch.randn(5, 100, generator=rng)
    gate, up = (littlebit_linear(x, layer, activation=mode) for layer in layers[:2])
    expected = littlebit_linear(functional.silu(gate) * up, layers[2], activation=mode)
    # Float32 is not rounded in between, so only silu may differ, by its last bit.
    assert relative_error(mlp(x, layers, "silu", activation=mode), expected) <= (
        5e-2 if mode == "sign" else 1e-3
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_far_out(function: str, rng: torch.Generator) -> None:
    # One column in and out, scales of one: the hidden value is what goes in.
    identity = [prepack(_unit(1, 1)), prepack(_unit(1, 1))]
    x = torch.cat([torch.linspace(-30, 30, 400), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])]).reshape(-1, 1)
    y = mlp(x, identity, function)
    wide = x.double()
    # Torch's own lose the small results of large negative values.
    truth = {
        "silu": wide * torch.sigmoid(wide),
        "gelu": wide / 2 * torch.special.erfc(-wide / math.sqrt(2)),
        "gelu_tanh": wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)),
        "relu": wide.clamp(min=0),
    }[function]
    # The error of exp's argument grows with it; below about 1e-30 nothing is promised.
    assert torch.all((y.double() - truth).abs() <= 2e-5 * truth.abs() + 1e-30)
    near = wide.abs() <= 3
    assert torch.all((y.double() - truth).abs()[near] <= 2e-6 * truth.abs()[near] + 1e-30)


def _unit(k: int, n: int) -> PackedLinear:
    layer = make_packed(k, n, None, generator=torch.Generator().manual_seed(1))
    path = layer.paths[0]
    ones = (torch.ones_like(path.in_scale), torch.ones_like(path.out_scale))
    return PackedLinear((type(path)(torch.zeros_like(path.v), *ones),), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, rng: torch.Generator) -> None:
    layers = [prepack(layer) for layer in _make("gated", rng)]
    norm = RMSNorm(torch.ones(100), 1e-5)
    x = torch.randn(3, 100, generator=rng).to(dtype)
    clean = mlp(x, layers, "silu", norm=norm)
    x[1, 50] = value
    y = mlp(x, layers, "silu", norm=norm)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_a_sum_of_squares_that_overflows_is_torchs(rng: torch.Generator) -> None:
    layer = _layer(64, 9, [8], rng)
    x = torch.full((1, 64), 1e30)
    norm = RMSNorm(torch.ones(64), 1e-5)
    (y,) = grouped_linear(x, [prepack(layer)], norm=norm)
    assert torch.equal(y, torch.zeros(1, 9))
    assert torch.equal(norm.apply(x), torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["packed", "prepacked"])
def test_gradients(kind: str, rng: torch.Generator) -> None:
    layers = _make("paths", rng)
    used = layers if kind == "packed" else [prepack(layer) for layer in layers]
    x = torch.randn(4, 70, generator=rng, requires_grad=True)
    weight = torch.randn(70, generator=rng, requires_grad=True)
    residual = torch.randn(4, 100, generator=rng, requires_grad=True)
    y = mlp(x, used, "gelu", norm=RMSNorm(weight, 1e-5), residual=residual)
    inputs = (x, weight, residual)
    grads = torch.autograd.grad(y.square().sum(), inputs)
    wide = [one.detach().double().requires_grad_() for one in inputs]
    h = wide[0] / torch.sqrt(wide[0].square().mean(-1, keepdim=True) + 1e-5) * wide[1]
    truth = _wide_mlp(h, layers, "gelu") + wide[2]
    for grad, expected in zip(grads, torch.autograd.grad(truth.square().sum(), wide), strict=True):
        assert relative_error(grad, expected) <= 2e-5
    with torch.no_grad():
        assert relative_error(mlp(x, used, "gelu", norm=RMSNorm(weight, 1e-5), residual=residual), y) <= 1e-5


def test_autocast_is_followed(rng: torch.Generator) -> None:
    layers = [prepack(layer) for layer in _make("gated", rng)]
    x = torch.randn(2, 100, generator=rng)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(x, layers, "silu")
    assert relative_error(y, mlp(x, layers, "silu")) <= 2e-2


def test_residual_may_be_a_view_with_strides(rng: torch.Generator) -> None:
    layers = [prepack(layer) for layer in _make("gated", rng)]
    x = torch.randn(4, 2, 100, generator=rng).transpose(0, 1)
    residual = torch.randn(2, 70, 4, generator=rng).transpose(1, 2)
    y = mlp(x, layers, "silu", residual=residual)
    assert torch.equal(y, mlp(x.contiguous(), layers, "silu", residual=residual.contiguous()))
