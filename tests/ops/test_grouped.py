"""``grouped_linear``: several layers on one x give what each gives on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import PackedLinear, grouped_linear, littlebit_linear, prepack
from littlebit2_kernels.testing import make_packed, make_problem
from tests.problems import GROUPS, random_problem


@pytest.fixture(params=GROUPS, ids=str)
def layers(request: pytest.FixtureRequest, rng: torch.Generator) -> list[PackedLinear]:
    return [make_packed(100, generator=rng, **options) for options in GROUPS[request.param]]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


def _arguments(layers: list[PackedLinear]) -> tuple[Any, ...]:
    lists = [
        None if layers[0].operands[i] is None else [t for layer in layers for t in layer.operands[i] or ()]
        for i in range(5)
    ]
    return (*lists, [layer.bias for layer in layers], [len(layer.paths) for layer in layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_equals_the_layers_one_by_one(
    layers: list[PackedLinear], dtype: torch.dtype, tokens: int, rng: torch.Generator
) -> None:
    x = torch.randn(tokens, 100, generator=rng).to(dtype)
    for kind in (layers, [prepack(layer) for layer in layers]):
        together = grouped_linear(x, kind)
        assert len(together) == len(layers)
        for y, layer in zip(together, kind, strict=True):
            assert y.dtype == dtype
            assert torch.equal(y, littlebit_linear(x, layer))


def test_random_groups(rng: torch.Generator) -> None:
    for _ in range(40):
        x, first = random_problem(rng)
        ranks = None if first.single_stage else [8, 16]
        layers = [first, make_packed(first.in_features, 45, ranks, bias=True, generator=rng)]
        for y, layer in zip(grouped_linear(x, layers), layers, strict=True):
            assert torch.equal(y, littlebit_linear(x, layer))


def test_leading_dimensions_and_strides(layers: list[PackedLinear], rng: torch.Generator) -> None:
    x = torch.randn(2, 100, 3, generator=rng).transpose(1, 2)
    for y, layer in zip(grouped_linear(x, layers), layers, strict=True):
        assert y.shape == (2, 3, layer.out_features)
        assert torch.equal(y, littlebit_linear(x, layer))


def test_opcheck(layers: list[PackedLinear], rng: torch.Generator) -> None:
    x = torch.randn(5, 100, generator=rng).requires_grad_()
    torch.library.opcheck(torch.ops.littlebit2.grouped_linear.default, (x, *_arguments(layers)))
    torch.library.opcheck(torch.ops.littlebit2.grouped_linear.default, (x, *_arguments(layers), 1))
    prepacked = [prepack(layer) for layer in layers]
    arguments = (
        [layer.layer for layer in prepacked],
        [layer.bias for layer in prepacked],
        [layer.out_features for layer in prepacked],
    )
    torch.library.opcheck(torch.ops.littlebit2.grouped_linear_prepacked.default, (x, *arguments))


def test_gradients(layers: list[PackedLinear], rng: torch.Generator) -> None:
    for kind in (layers, [prepack(layer) for layer in layers]):
        x = torch.randn(4, 100, generator=rng).requires_grad_()
        weights = [torch.randn(4, layer.out_features, generator=rng) for layer in layers]
        outputs = grouped_linear(x, kind, activation="exact")
        expected = [littlebit_linear(x, layer, activation="exact") for layer in kind]
        # The last layer's output may go unused.
        for used in range(1, len(layers) + 1):
            got, wanted = (
                torch.autograd.grad(
                    [(y * w).sum() for y, w in zip(ys[:used], weights, strict=False)], x, retain_graph=True
                )[0]
                for ys in (outputs, expected)
            )
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_gradient_of_a_bias_and_forward_mode(rng: torch.Generator) -> None:
    layers = [make_packed(64, 10, [8], bias=bias, generator=rng) for bias in (True, False)]
    bias = layers[0].bias.clone().requires_grad_()
    layers[0] = PackedLinear(layers[0].paths, bias)
    x = torch.randn(3, 64, generator=rng)
    grouped_linear(x, layers)[0].sum().backward()
    assert torch.equal(bias.grad, torch.full((10,), 3.0))
    with pytest.raises(RuntimeError, match=r"bias\[0\] requires a gradient"):
        torch.ops.littlebit2.grouped_linear(x.clone().requires_grad_(), *_arguments(layers))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        for y, layer in zip(grouped_linear(dual, layers), layers, strict=True):
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
            plain = PackedLinear(layer.paths, None)
            assert torch.equal(tangent, littlebit_linear(torch.ones_like(x), plain, activation="exact"))


def test_compile_fullgraph_dynamic(layers: list[PackedLinear], rng: torch.Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: grouped_linear(x * 2, layers), fullgraph=True, dynamic=True)
    x = torch.randn(6, 100, generator=rng)
    for tokens in (6, 3, 2):
        for y, layer in zip(compiled(x[:tokens]), layers, strict=True):
            assert torch.equal(y, littlebit_linear(x[:tokens] * 2, layer))


def test_reference_backend_and_mixed_stages(rng: torch.Generator) -> None:
    layers = [make_packed(64, 10, [8], generator=rng), make_packed(64, 12, None, generator=rng)]
    x, _ = make_problem(2, 64, 8, [8], generator=rng)
    for backend in ("auto", "reference"):
        for y, layer in zip(grouped_linear(x, layers, backend), layers, strict=True):
            assert torch.equal(y, littlebit_linear(x, layer, backend))


def test_bad_layers(rng: torch.Generator) -> None:
    layer = make_packed(64, 10, [8], generator=rng)
    x = torch.randn(2, 64, generator=rng)
    with pytest.raises(ValueError, match="layers must hold at least one layer, got none"):
        grouped_linear(x, [])
    with pytest.raises(
        TypeError, match="all PackedLinear or all PrepackedLinear, got PackedLinear, Prepacked"
    ):
        grouped_linear(x, [layer, prepack(layer)])
    with pytest.raises(TypeError, match="got int"):
        grouped_linear(x, [3])
    with pytest.raises(ValueError, match=r"x.size\(-1\) must equal K=96"):
        grouped_linear(x, [make_packed(96, 10, [8], generator=rng), layer])
    with pytest.raises(ValueError, match="needs a prepacked layer"):
        grouped_linear(x, [layer], activation="int8")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (7, [], "paths must hold the number of paths of each layer, got none"),
        (7, [2, 2], r"bias must hold one tensor or None per layer \(2\), got 3"),
        (7, [1, 2, 0], r"paths\[2\] must be between 1 and 1 with 4 tensors in v, got 0"),
        (7, [1, 3, 1], r"paths\[2\] must be between 1 and 0 with 4 tensors in v, got 1"),
        (7, [1, 1, 1], "paths must add up to the 4 tensors of v, got 3"),
        (6, [None, torch.zeros(4), None], r"bias\[1\] must have shape \[33\] or \[1, 33\], got \[4\]"),
        (8, 2, "needs a prepacked layer"),
        (8, 9, "activation must be between 0 and 5, got 9"),
    ],
)
def test_bad_arguments_of_the_operator(rng: torch.Generator, position: int, value: Any, message: str) -> None:
    layers = [make_packed(100, generator=rng, **options) for options in GROUPS["qkv"]]
    arguments: list[Any] = [torch.randn(2, 100, generator=rng), *_arguments(layers), 0]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.grouped_linear(*arguments)


def test_names_of_tensors_count_over_all_layers(rng: torch.Generator) -> None:
    layers = [make_packed(100, generator=rng, **options) for options in GROUPS["qkv"]]
    arguments = list(_arguments(layers))
    arguments[4] = [*arguments[4]]
    arguments[4][2] = arguments[4][2][:-1].clone()
    with pytest.raises(RuntimeError, match=r"out_scale\[2\] must have shape \[33\] or \[1, 33\], got \[32\]"):
        torch.ops.littlebit2.grouped_linear(torch.randn(2, 100, generator=rng), *arguments)
