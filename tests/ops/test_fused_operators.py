"""``fused_linear_prepacked`` and ``mlp_prepacked``: schema, fakes, compilation, wrong arguments."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import PrepackedLinear, RMSNorm, grouped_linear, mlp, prepack
from littlebit2_kernels.testing import make_packed


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


@pytest.fixture
def layers(rng: torch.Generator) -> list[PrepackedLinear]:
    sizes = ((64, 130, True), (64, 130, False), (130, 64, True))
    return [prepack(make_packed(k, n, [24], bias=bias, generator=rng)) for k, n, bias in sizes]


class Block(torch.nn.Module):
    def __init__(self, layers: list[PrepackedLinear], weight: torch.Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = RMSNorm(self.weight, 1e-5, 1.0)  # type: ignore[arg-type]
        gate, up = grouped_linear(x, self.layers[:2], norm=norm)
        (y,) = grouped_linear(gate * up, self.layers[2:], residual=x)
        return mlp(y, self.layers, "silu", norm=norm, residual=y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(layers: list[PrepackedLinear], dtype: torch.dtype, rng: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=rng).to(dtype)
    tensors, bias = [layer.layer for layer in layers], [layer.bias for layer in layers]
    weight, residual = torch.randn(64, generator=rng), torch.randn(3, 64, generator=rng).to(dtype)
    ops = torch.ops.littlebit2
    torch.library.opcheck(
        ops.fused_linear_prepacked, (x, tensors[:2], bias[:2], [130, 130], weight, 1e-5, 0.0, None)
    )
    torch.library.opcheck(ops.mlp_prepacked, (x, tensors, bias, 64, 0, weight, 1e-5, 1.0, residual, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(layers: list[PrepackedLinear], dtype: torch.dtype, rng: torch.Generator) -> None:
    block = Block(layers, torch.randn(64, generator=rng).to(dtype))
    x = torch.randn(1, 3, 64, generator=rng).to(dtype)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), block(x))


def test_export(layers: list[PrepackedLinear], rng: torch.Generator) -> None:
    block = Block(layers, torch.randn(64, generator=rng))
    x = torch.randn(3, 64, generator=rng)
    with torch.no_grad():
        program = torch.export.export(block, (x,))
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert "littlebit2.mlp_prepacked.default" in called
        assert torch.equal(program.module()(x), block(x))


def test_compiled_gradient(layers: list[PrepackedLinear], rng: torch.Generator) -> None:
    block = Block(layers, torch.randn(64, generator=rng))
    x = torch.randn(2, 64, generator=rng, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_operators_refuse_gradients(layers: list[PrepackedLinear], rng: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=rng, requires_grad=True)
    with pytest.raises(RuntimeError, match="mlp_prepacked is not differentiable"):
        torch.ops.littlebit2.mlp_prepacked(
            x, [layer.layer for layer in layers], [None] * 3, 64, 0, None, 0.0, 0.0, None
        )


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "function": ({"function": "tanh"}, ValueError, "function must be one of silu, gelu"),
    "one layer": (
        {"layers": slice(2, 3)},
        ValueError,
        "layers must hold (gate, up, down) or (up, down), got 1",
    ),
    "order": ({"layers": slice(None, None, -1)}, ValueError, "layers[1] must have N=64"),
    "two ups": (
        {"layers": slice(0, 2)},
        ValueError,
        "layers[0] must have N=64, K of the last layer, or twice",
    ),
    "K": ({"x": torch.zeros(2, 65)}, ValueError, "x.size(-1) must equal K=64, got shape [2, 65]"),
    "dtype": ({"x": torch.zeros(2, 64, dtype=torch.float64)}, TypeError, "x must be float32"),
    "norm": ({"norm": torch.ones(64)}, TypeError, "norm must be a littlebit2_kernels.RMSNorm or None"),
    "norm size": (
        {"norm": RMSNorm(torch.ones(65), 0.0)},
        ValueError,
        "norm.weight must have shape [K=64], got [65]",
    ),
    "residual": ({"residual": 1}, TypeError, "residual must be a torch.Tensor or None, got int"),
    "residual shape": (
        {"residual": torch.zeros(1, 64)},
        ValueError,
        "residual must have the shape of the output, [2, 64]",
    ),
    "residual dtype": (
        {"residual": torch.zeros(2, 64).half()},
        TypeError,
        "residual must have the dtype of x",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend must be one of"),
    "activation": ({"activation": "int4"}, ValueError, "activation must be one of"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(layers: list[PrepackedLinear], name: str) -> None:
    changed, error, message = BAD_CALLS[name]
    arguments = {"x": torch.zeros(2, 64), "function": "silu", "layers": slice(None), **changed}
    arguments["layers"] = layers[arguments["layers"]]
    with pytest.raises(error, match=re.escape(message)):
        mlp(**arguments)


def test_bad_layers(layers: list[PrepackedLinear], rng: torch.Generator) -> None:
    packed = make_packed(64, 130, [8], generator=rng)
    x = torch.zeros(2, 64)
    with pytest.raises(TypeError, match="layers must be all PackedLinear or all PrepackedLinear"):
        mlp(x, [packed, *layers[1:]], "silu")  # type: ignore[list-item]
    other = prepack(make_packed(32, 130, [8], generator=rng))
    with pytest.raises(ValueError, match=re.escape("layers[1] must have K=64 like layers[0], got 32")):
        mlp(x, [layers[0], other, layers[2]], "silu")
    with pytest.raises(ValueError, match="residual must be None unless layers holds one layer, got 2"):
        grouped_linear(x, layers[:2], residual=torch.zeros(2, 130))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2), 1e-5), ValueError, "weight must be a dense tensor of shape [K]"),
        (([1.0], 1e-5), TypeError, "weight must be a torch.Tensor, got list"),
        ((torch.ones(2, dtype=torch.float64), 1e-5), TypeError, "weight must be float32"),
        ((torch.ones(2), -1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
        ((torch.ones(2), 0.0, float("inf")), ValueError, "offset must be finite, got inf"),
    ],
)
def test_bad_norms(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RMSNorm(*arguments)


#: Changes to the arguments of the operator, by their place.
BAD_OPERATOR_CALLS: dict[str, tuple[dict[int, Any], str]] = {
    "no layer": ({1: []}, "layers must hold (gate, up, down) or (up, down), got 0 layers"),
    "bias": ({2: [None]}, "bias must hold one tensor or None per layer (3), got 1"),
    "bias size": ({2: [torch.ones(3), None, None]}, "bias[0] must have shape [130]"),
    "out_features": ({3: 65}, "out_features must be 64 as the last layer says, got 65"),
    "function": ({4: 4}, "function must be between 0 and 3, got 4"),
    "norm": ({5: torch.ones(63)}, "norm must have shape [64], got [63]"),
    "norm dtype": ({5: torch.ones(64, dtype=torch.int32)}, "norm must be float32, float16 or bfloat16"),
    "eps": ({5: torch.ones(64), 6: -1.0}, "norm->eps must be finite and >= 0, got -1"),
    "residual": ({8: torch.ones(64)}, "residual must have the shape of the output"),
    "residual dtype": ({8: torch.ones(2, 64).half()}, "residual must have the dtype of x"),
    "activation": ({9: 5}, "activation must be between 0 and 4, or 6, got 5"),
    "x": ({0: torch.zeros(2, 65)}, "x.size(-1) must equal 64, got shape [2, 65]"),
}


@pytest.mark.parametrize("name", BAD_OPERATOR_CALLS)
def test_bad_operator_calls(layers: list[PrepackedLinear], name: str) -> None:
    changed, message = BAD_OPERATOR_CALLS[name]
    tensors = [layer.layer for layer in layers]
    arguments = [torch.zeros(2, 64), tensors, [None] * 3, 64, 0, None, 0.0, 0.0, None, 0]
    for place, value in changed.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.littlebit2.mlp_prepacked(*arguments)
