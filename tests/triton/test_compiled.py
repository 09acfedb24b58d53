"""The Triton backend on a GPU, under what only a GPU has: graphs, streams, Inductor, several devices."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear, explain, littlebit_linear, warmup
from littlebit2_kernels.dispatch import CUDA_TOKENS, unavailable_reason
from littlebit2_kernels.testing import make_problem
from tests.problems import scaled_down
from tests.triton import modes
from tests.triton.modes import MODES


@pytest.fixture
def device(requires_cuda: torch.device) -> torch.device:
    """A GPU. Where Triton cannot run on it, that is a failure, not a skip."""
    assert unavailable_reason("triton", "cuda") is None
    return requires_cuda


@pytest.fixture
def packed(device: torch.device, rng: torch.Generator) -> PackedLinear:
    _, packed = make_problem(1, 4096, 1000, [512, 136], bias=True, generator=rng)
    return scaled_down(packed).to(device)


def fresh(tokens: int, device: torch.device, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(tokens, 4096, generator=rng).half().to(device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "n", "rank"), [(4096, 11008, 512), (11008, 4096, 1024), (8192, 28672, 592)])
def test_shapes_of_models(
    device: torch.device, rng: torch.Generator, k: int, n: int, rank: int, mode: str
) -> None:
    for tokens in (1, 16, 130):
        x, packed = make_problem(tokens, k, n, [rank], dtype=torch.bfloat16, outliers=4, generator=rng)
        y = modes.run(x, packed, device, mode)
        assert modes.error_of(y, x, packed, mode) <= modes.allowed(x, packed, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_graph_capture_and_replay(packed: PackedLinear, rng: torch.Generator, tokens: int, mode: str) -> None:
    static = fresh(tokens, packed.device, rng)
    warmup(packed, torch.float16, (tokens,), backend="triton", activation=mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = littlebit_linear(static, packed, "triton", mode)
        z = littlebit_linear(static + y[:, :1], packed, "triton", mode)
    for _ in range(3):
        x = fresh(tokens, packed.device, rng)
        static.copy_(x)
        graph.replay()
        expected = littlebit_linear(x, packed, "triton", mode)
        assert torch.equal(y, expected)
        assert torch.equal(z, littlebit_linear(x + expected[:, :1], packed, "triton", mode))


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_compiled_is_eager(packed: PackedLinear, rng: torch.Generator, mode: str) -> None:
    torch._dynamo.reset()
    module = LittleBitLinear.from_packed(packed, backend="triton", activation=mode)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (6, 40, 2, 200, 9):
        x = fresh(tokens, packed.device, rng)
        assert torch.equal(compiled(x), module(x))


def test_compiled_gradient_is_eager(packed: PackedLinear, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    module = LittleBitLinear.from_packed(packed, backend="triton")
    x = fresh(40, packed.device, rng)
    gradients = []
    for call in (module, torch.compile(module, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).float().square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_reduce_overhead(packed: PackedLinear, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    module = LittleBitLinear.from_packed(packed, backend="triton")
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):
            x = fresh(1, packed.device, rng)
            assert torch.equal(compiled(x), module(x))


def test_side_streams(packed: PackedLinear, rng: torch.Generator) -> None:
    x = fresh(4, packed.device, rng)
    expected = littlebit_linear(x + 1, packed, "triton")
    torch.cuda.synchronize(packed.device)
    results = []
    for stream in [torch.cuda.Stream(packed.device) for _ in range(4)]:
        with torch.cuda.stream(stream):
            late = x.clone()
            torch.cuda._sleep(1_000_000)
            late += 1  # only a kernel on the same stream sees this
            results.append(littlebit_linear(late, packed, "triton"))
    torch.cuda.synchronize(packed.device)
    assert all(torch.equal(y, expected) for y in results)


def test_another_device(device: torch.device, packed: PackedLinear, rng: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    x = fresh(3, device, rng)
    y = littlebit_linear(x.to(other), packed.to(other), "triton")
    assert y.device == other
    assert torch.cuda.current_device() == device.index
    assert torch.equal(y.to(device), littlebit_linear(x, packed, "triton"))


def test_auto_does_what_explain_says(packed: PackedLinear, rng: torch.Generator) -> None:
    for tokens in (1, 16, 17, CUDA_TOKENS, CUDA_TOKENS + 1):
        x = fresh(tokens, packed.device, rng)
        plan = explain(x, packed)
        # Named, the mode of a Triton call may have another kernel for so many tokens, but not above its
        # switches; blas has none.
        named = str(plan.activation) if plan.backend == "cuda" else "auto"
        assert torch.equal(littlebit_linear(x, packed), littlebit_linear(x, packed, plan.backend, named))


def test_diagnostics(device: torch.device) -> None:
    from littlebit2_kernels import diagnostics

    report = diagnostics.collect()
    assert report["backends"]["triton"] == "available"
    assert all("triton: usable" in text for text in report["gpu"]["devices"])
