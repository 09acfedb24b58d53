"""Layers on one x in shared launches, on a GPU: ``grouped_linear``, fused modules, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear, fuse_linears, grouped_linear, littlebit_linear
from littlebit2_kernels.testing import TOLERANCE, make_packed
from tests import problems
from tests.cuda import modes
from tests.cuda.modes import MODES

GROUPS = {
    "qkv": [(70, [520, 16], True), (33, [40], False), (257, [8], True)],
    "gate-up": [(300, [136, 136], False), (300, [128, 144], False)],
    "single-stage": [(70, None, True), (33, None, False)],
    "more-paths-than-one-launch-has": [(40, [8] * 9, False), (40, [16] * 9, True)],
}


@pytest.fixture(params=GROUPS, ids=str)
def layers(request: pytest.FixtureRequest, rng: torch.Generator) -> list[PackedLinear]:
    return [
        problems.scaled_down(make_packed(1100, size, ranks, bias=bias, generator=rng))
        for size, ranks, bias in GROUPS[request.param]
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", tuple(TOLERANCE), ids=str)
def test_against_float64(
    device: torch.device, layers: list[PackedLinear], rng: torch.Generator, dtype: torch.dtype, mode: str
) -> None:
    on_device = [layer.to(device) for layer in layers]
    for tokens in (0, 1, 3, 8, 16, 17, 40):
        x = torch.randn(tokens, 1100, generator=rng).to(dtype)
        outputs = grouped_linear(x.to(device), on_device, activation=mode)
        for y, layer in zip(outputs, layers, strict=True):
            assert (y.shape, y.dtype) == ((tokens, layer.out_features), dtype)
            if tokens > 0:
                error = modes.error_of(y, x, layer, mode)
                assert error <= modes.allowed(dtype, mode, y.numel()), (tokens, layer.out_features)


@pytest.mark.parametrize("mode", MODES)
def test_a_token_does_not_depend_on_the_others(
    device: torch.device, layers: list[PackedLinear], rng: torch.Generator, mode: str
) -> None:
    on_device = [layer.to(device) for layer in layers]
    x = torch.randn(16, 1100, generator=rng).half().to(device)
    whole = grouped_linear(x, on_device, activation=mode)
    for first in (0, 5, 15):
        for y, all_tokens in zip(grouped_linear(x[first:], on_device, activation=mode), whole, strict=True):
            assert torch.equal(y, all_tokens[first:])


@pytest.mark.parametrize("mode", modes.GEMM_MODES)
def test_prompts_have_the_bits_of_layers_alone(
    device: torch.device, layers: list[PackedLinear], rng: torch.Generator, mode: str
) -> None:
    on_device = [layer.to(device) for layer in layers]
    for tokens in (17, 130, 600):
        x = torch.randn(tokens, 1100, generator=rng).half().to(device)
        together = grouped_linear(x, on_device, activation=mode)
        for y, layer in zip(together, on_device, strict=True):
            assert torch.equal(y, littlebit_linear(x, layer, activation=mode))


def test_fused_modules_under_a_graph(device: torch.device, rng: torch.Generator) -> None:
    packed = [make_packed(1024, size, [136, 72], bias=True, generator=rng) for size in (512, 256, 256)]
    modules = [LittleBitLinear.from_packed(problems.scaled_down(layer)).to(device) for layer in packed]
    group = fuse_linears(modules)
    x = torch.randn(1, 1024, generator=rng).bfloat16().to(device)
    with torch.inference_mode():
        alone = [littlebit_linear(x, module.packed) for module in modules]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                [module(x) for module in modules]
        torch.cuda.synchronize()
        assert group.together
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [module(x) for module in modules]
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        for y, single in zip(outputs, alone, strict=True):
            torch.testing.assert_close(
                y.float(), single.float(), rtol=2**-6, atol=2**-6 * float(single.abs().max())
            )
        x.mul_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for y, module in zip(outputs, modules, strict=True):
            single = littlebit_linear(x, module.packed)
            torch.testing.assert_close(
                y.float(), single.float(), rtol=2**-6, atol=2**-6 * float(single.abs().max())
            )
