"""The backend ``blas`` in float16 on a GPU: results, captured graphs, no waiting for the device."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    dispatch,
    littlebit_linear,
    warmup,
)
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_packed, make_problem, relative_error
from tests import problems
from tests.cuda import modes

HALF = torch.float16
#: Of factors, latents and outputs, and of a library's partial sums.
ALLOWED = 2.5 * TOLERANCE[HALF]

LAYERS = {
    "one-path": {"ranks": [136]},
    "two-paths": {"ranks": [520, 72], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


def rescaled(packed: PackedLinear, factor: float) -> PackedLinear:
    """The same function by scales that are far from float16's, where there is one to take from the other."""
    if packed.single_stage:
        return packed
    return PackedLinear(
        tuple(
            PackedPath(p.v, p.in_scale * factor, p.out_scale, p.u, p.latent_scale / factor)  # type: ignore[operator]
            for p in packed.paths
        ),
        packed.bias,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [0, 1, 17, 128, 700])
@pytest.mark.parametrize("factor", [1.0, 2.0**-30, 2.0**30])
def test_results(device: torch.device, rng: torch.Generator, layer: str, tokens: int, factor: float) -> None:
    options = dict(LAYERS[layer])
    x, packed = make_problem(
        *(tokens, 1100, 333, options.pop("ranks")), dtype=HALF, outliers=3, generator=rng, **options
    )
    packed = rescaled(problems.scaled_down(packed), factor)
    y = littlebit_linear(x.to(device), packed.to(device), backend="blas")
    assert (y.shape, y.dtype) == ((tokens, 333), HALF)
    assert modes.error_of(y, x, packed, "exact") <= ALLOWED


def test_tokens_as_long_as_promised(device: torch.device, rng: torch.Generator) -> None:
    packed = make_packed(256, 70, [16, 24], scale_spread=0.2, generator=rng)
    path = packed.paths[0]
    packed = PackedLinear(
        (PackedPath(path.v, path.in_scale, path.out_scale * 1e-3, path.u, path.latent_scale),)
    )
    token = unpack_signs_reference(path.v, 256, torch.float64)[3] * path.in_scale.double()
    x = (token * 2.6e5 / token.norm()).half().expand(200, 256)
    assert bool(torch.isfinite(x).all())
    truth = linear_reference(x, packed)
    assert float(truth.abs().max()) < 65504
    y = littlebit_linear(x.to(device), packed.to(device), backend="blas").cpu()
    assert relative_error(y, truth) <= ALLOWED


def test_factors_beyond_float16_overflow(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(200, 1024, 512, [80], dtype=HALF, generator=rng)
    packed.paths[0].latent_scale.mul_(1e8)
    x, layer = x.to(device), packed.to(device)
    assert not bool(torch.isfinite(littlebit_linear(x, layer, backend="blas")).any())


def test_auto_unpacks(device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = make_problem(200, 1024, 512, [80, 80], dtype=HALF, generator=rng)
    x, layer = x.to(device), problems.scaled_down(packed).to(device)
    monkeypatch.setattr(dispatch, "_estimates", lambda *sizes: (2, 1))
    expected = littlebit_linear(x, layer, backend="blas")
    assert not torch.equal(expected, littlebit_linear(x, layer, backend="cuda"))
    assert torch.equal(littlebit_linear(x, layer), expected)
    assert torch.equal(LittleBitLinear.from_packed(layer)(x), expected)


@pytest.mark.parametrize("backend", ["auto", "blas"])
def test_calls_do_not_wait(device: torch.device, rng: torch.Generator, backend: str) -> None:
    x, packed = make_problem(700, 1024, 512, [80, 80], dtype=HALF, generator=rng)
    x = x.to(device)
    module = LittleBitLinear.from_packed(problems.scaled_down(packed).to(device), backend=backend)
    first = module(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def test_captured(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(200, 1024, 512, [80, 40], dtype=HALF, generator=rng)
    static, layer = x.to(device), problems.scaled_down(packed).to(device)
    warmup(layer, HALF, [200])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = littlebit_linear(static, layer, backend="blas")
    static.mul_(2)
    graph.replay()
    assert torch.equal(y, littlebit_linear(static, layer, backend="blas"))
    # A graph follows changes of the scales: what is kept of them are powers of two.
    layer.paths[0].in_scale.mul_(0.7)
    layer.paths[1].latent_scale.mul_(-1.3)
    graph.replay()
    assert modes.error_of(y, static, layer, "exact") <= ALLOWED


def test_capture_of_a_first_call(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(200, 1024, 512, [80], dtype=HALF, generator=rng)
    static, layer = x.to(device), problems.scaled_down(packed).to(device)
    warmup(problems.scaled_down(packed).to(device), HALF, [200])  # libraries, but not this layer
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = littlebit_linear(static, layer, backend="blas")
    graph.replay()
    assert torch.equal(y, littlebit_linear(static, layer, backend="blas"))


def test_models_are_warmed_up_once_per_shape(device: torch.device, rng: torch.Generator) -> None:
    layers = [make_packed(1024, 512, [80], generator=rng).to(device) for _ in range(3)]
    model = torch.nn.Sequential(*(LittleBitLinear.from_packed(layer) for layer in layers))
    assert warmup(model, HALF, [1, 200]) == 3  # and one by blas


def test_gradients(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(150, 600, 70, [40, 16], dtype=HALF, generator=rng)
    seed = (torch.randn(150, 70, generator=rng) * 1e-3).half()
    expected = seed.double() @ dense_weight(packed)
    for backend in ("blas", "cuda"):
        leaf = x.to(device).requires_grad_()
        littlebit_linear(leaf, packed.to(device), backend=backend).backward(seed.to(device))
        assert leaf.grad is not None
        assert leaf.grad.dtype == HALF
        assert relative_error(leaf.grad.cpu(), expected) <= TOLERANCE[HALF]


def test_compiled(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(150, 600, 70, [40, 16], dtype=HALF, bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed.to(device), backend="blas")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.to(device)), module(x.to(device)))
