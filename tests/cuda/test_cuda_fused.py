"""On a GPU: layers with norm and residual, whole MLPs, and int8 rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from littlebit2_kernels import PackedLinear, RMSNorm, grouped_linear, mlp
from littlebit2_kernels.int8.rounding import quantize_rows
from littlebit2_kernels.ops import calls
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_packed, relative_error
from tests import problems
from tests.cuda import modes

K, WIDTH, N = 1100, 600, 257
TOKENS = (1, 3, 8, 16, 17, 40)


@pytest.fixture
def layers(rng: torch.Generator) -> dict[str, PackedLinear]:
    sizes = {"gate": (K, WIDTH), "up": (K, WIDTH), "both": (K, 2 * WIDTH), "down": (WIDTH, N)}
    return {
        name: problems.scaled_down(make_packed(k, n, [136, 72], bias=name != "up", generator=rng))
        for name, (k, n) in sizes.items()
    }


def normalized(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    x = x.double()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return x * scale * (norm.weight.double() + norm.offset)


@pytest.mark.parametrize("mode", ["exact", "int16", "float16"])
@pytest.mark.parametrize("dtype", tuple(TOLERANCE), ids=str)
def test_norm_and_residual(
    device: torch.device, layers: dict[str, PackedLinear], rng: torch.Generator, dtype: torch.dtype, mode: str
) -> None:
    norm = RMSNorm(torch.randn(K, generator=rng).bfloat16(), 1e-5, 1.0)
    on_device = RMSNorm(norm.weight.to(device), norm.eps, norm.offset)
    for tokens in TOKENS:
        x = torch.randn(tokens, K, generator=rng).to(dtype)
        residual = torch.randn(tokens, WIDTH, generator=rng).to(dtype)
        (y,) = grouped_linear(
            x.to(device),
            [layers["gate"].to(device)],
            activation=mode,
            norm=on_device,
            residual=residual.to(device),
        )
        expected = linear_reference(normalized(x, norm), layers["gate"]) + residual.double()
        assert relative_error(y.cpu(), expected) <= 2 * modes.allowed(dtype, mode, y.numel()), tokens


@pytest.mark.parametrize("dtype", tuple(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["gated", "halves", "plain"])
def test_mlp(
    device: torch.device, layers: dict[str, PackedLinear], rng: torch.Generator, dtype: torch.dtype, kind: str
) -> None:
    names = {"gated": ("gate", "up", "down"), "halves": ("both", "down"), "plain": ("up", "down")}[kind]
    norm = RMSNorm(torch.randn(K, generator=rng), 1e-5)
    on_device = [layers[name].to(device) for name in names]
    for tokens in TOKENS:
        x = torch.randn(tokens, K, generator=rng).to(dtype)
        residual = torch.randn(tokens, N, generator=rng).to(dtype)
        device_norm = RMSNorm(norm.weight.to(device), norm.eps)
        y = mlp(
            x.to(device),
            on_device,
            "silu",
            activation="exact",
            norm=device_norm,
            residual=residual.to(device),
        )
        first = [linear_reference(normalized(x, norm), layers[name]) for name in names[:-1]]
        if kind == "halves":
            first = list(first[0].chunk(2, dim=-1))
        hidden = functional.silu(first[0]) * (first[1] if len(first) == 2 else 1.0)
        expected = linear_reference(hidden, layers["down"]) + residual.double()
        allowed = 3 * TOLERANCE[dtype] + 6 * modes.allowed(dtype, "exact", y.numel())
        assert relative_error(y.cpu(), expected) <= allowed, tokens


def test_under_a_graph(device: torch.device, layers: dict[str, PackedLinear], rng: torch.Generator) -> None:
    on_device = [layers[name].to(device) for name in ("gate", "up", "down")]
    x = torch.randn(1, K, generator=rng).bfloat16().to(device)
    norm = RMSNorm(torch.ones(K, device=device), 1e-5)
    with torch.inference_mode():
        expected = mlp(x, on_device, "silu", norm=norm)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                y = mlp(x, on_device, "silu", norm=norm)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", tuple(TOLERANCE), ids=str)
def test_int8_rows(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    for k in (1024, 1030):
        weight, scale = quantize_rows(torch.randn(333, k, generator=rng))
        bias = torch.randn(333, generator=rng)
        for tokens in (1, 2, 4, 8, 16, 17):
            x = torch.randn(tokens, k, generator=rng).to(dtype)
            with torch.inference_mode():
                y = calls.int8_linear(*(tensor.to(device) for tensor in (x, weight, scale, bias)))
            expected = (x.double() @ weight.double().T) * scale.double() + bias.double()
            # More tokens take torch's products on rounded rows.
            allowed = (1 if tokens <= 16 else 3) * TOLERANCE[dtype] + 1e-5
            assert relative_error(y.cpu(), expected) <= allowed, tokens
