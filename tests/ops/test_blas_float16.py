"""The backend ``blas`` in float16: which layers fit, how they are computed, when their scales are read."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    explain,
    explanation,
    functional,
    linear,
    littlebit_linear,
    prompts,
    warming,
)
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.ops import balance, calls
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_packed, make_problem, relative_error, typical_norm
from tests.ops.test_blas import problem

__all__ = ["problem"]  # the fixture


# --- results -----------------------------------------------------------------------------------------------


def rescaled(packed: PackedLinear, *factors: tuple[float, float, float]) -> PackedLinear:
    """The layer with ``in_scale``, ``latent_scale`` and ``out_scale`` of each path times its factors."""
    return PackedLinear(
        tuple(
            PackedPath(
                path.v,
                path.in_scale * inner,
                path.out_scale * outer,
                path.u,
                None if path.latent_scale is None else path.latent_scale * latent,
            )
            for path, (inner, latent, outer) in zip(packed.paths, factors, strict=True)
        ),
        packed.bias,
    )


def error_of(x: torch.Tensor, packed: PackedLinear) -> float:
    y = littlebit_linear(x, packed, backend="blas")
    return relative_error(y, linear_reference(x, packed), typical_norm(x, packed))


@pytest.mark.parametrize("batch", range(4))
def test_what_fits_is_accurate(batch: int, rng: torch.Generator) -> None:
    """Any layer is refused, or as accurate in float16 as its three roundings."""

    def draw(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high, generator=rng))

    fitting = 0
    for _ in range(60):
        ranks = [None, [40], [24, 136], [16, 16]][batch]
        x, packed = make_problem(
            *(40, 100, 70, ranks),
            outliers=3 if draw(0, 1) < 0.5 else 0,
            scale_spread=draw(0, 2.5),
            generator=rng,
        )
        factors = [(2.0 ** draw(-30, 30), 2.0 ** draw(-8, 4), 2.0 ** draw(-8, 4)) for _ in packed.paths]
        if ranks is None:
            factors = [(latent, 0.0, out) for _, latent, out in factors]
        else:  # what in_scale has more, latent_scale has less
            factors = [(inner, latent / inner, out) for inner, latent, out in factors]
        layer = rescaled(packed, *factors)
        if not balance.fits_float16(layer.operands):
            with pytest.raises(ValueError, match=r"factors fit float16; got .* (channels|reaches)"):
                littlebit_linear(x.half(), layer, backend="blas")
            continue
        fitting += 1
        # So that float16 holds the results.
        largest = float(linear_reference(x, layer).abs().max())
        x = (x * min(1.0, 3e4 / largest)).half()
        if float(x.float().square().mean().sqrt()) > 1e-3:
            assert error_of(x, layer) <= 2.5 * TOLERANCE[torch.float16]
    assert fitting >= 20


@pytest.mark.parametrize("factor", [50.0, 1000.0])
@pytest.mark.parametrize("in_scale", [1.0, 2.0**-20, 2.0**20])
def test_outlier_channels(
    problem: tuple[torch.Tensor, PackedLinear], factor: float, in_scale: float, rng: torch.Generator
) -> None:
    _, packed = problem
    latent = 1.0 if packed.single_stage else 1 / in_scale
    out = 0.02 / in_scale if packed.single_stage else 0.02
    layer = rescaled(packed, *[(in_scale, latent, out)] * len(packed.paths))
    x = torch.randn(30, 100, generator=rng)
    x[:, [3, 50, 97]] *= factor
    assert error_of(x.half(), layer) <= 2.5 * TOLERANCE[torch.float16]


def test_tokens_as_long_as_promised(rng: torch.Generator) -> None:
    """Latents of tokens up to a length of 2.6e5 are finite, even where all of a token is in one of them."""
    packed = make_packed(256, 70, [16, 24], scale_spread=0.2, generator=rng)
    layer = rescaled(packed, (300.0, 1e-5, 0.01), (1e-6, 1e3, 0.01))
    for path in layer.paths:
        signs = unpack_signs_reference(path.v, 256, torch.float64)
        for row in (0, 7):
            token = signs[row] * path.in_scale.double()
            x = (token * 2.6e5 / token.norm()).half()[None]
            assert 2.55e5 < float(x.double().norm()) < 2.61e5
            assert bool(torch.isfinite(x).all())
            y = littlebit_linear(x, layer, backend="blas")
            truth = linear_reference(x, layer)
            assert float(truth.abs().max()) < 65504
            assert bool(torch.isfinite(y).all())
            assert relative_error(y, truth) <= 2.5 * TOLERANCE[torch.float16]


def test_results_beyond_float16_are_infinite(rng: torch.Generator) -> None:
    """As those of the other backends."""
    x, packed = make_problem(20, 100, 70, [40], dtype=torch.float16, generator=rng)
    x = x * 300
    y, truth = littlebit_linear(x, packed, backend="blas"), linear_reference(x, packed)
    assert not bool(torch.isnan(y).any())
    assert bool((truth.abs() > 66000).any())
    assert bool(y[truth.abs() > 66000].isinf().all())
    assert bool(y[truth.abs() < 65000].isfinite().all())


def test_short_tokens_lose_bits_by_and_by(rng: torch.Generator) -> None:
    """Latents are about as large as x, and as subnormal."""
    x, packed = make_problem(40, 100, 70, [24, 136], scale_spread=0.3, generator=rng)
    for root_mean_square, allowed in ((1e-3, 2.5 * 2**-11), (1e-4, 2**-8), (1e-5, 2**-4)):
        small = (x * root_mean_square).half()
        y = littlebit_linear(small, packed, backend="blas")
        assert relative_error(y, linear_reference(small, packed)) <= allowed


def test_moved_scales_are_the_same_function(rng: torch.Generator) -> None:
    x, packed = make_problem(9, 100, 70, [24, 136], generator=rng)
    operands = balance.balanced(packed.operands)
    _, _, in_scale, latent_scale, out_scale = operands
    for moved, path in zip(in_scale, packed.paths, strict=True):
        assert 2**-3 <= float(moved.double().norm()) < 2**-2
        assert not torch.equal(moved, path.in_scale)
    assert latent_scale is not None
    assert out_scale is packed.operands[4]
    assert torch.equal(calls.blas_linear(x, operands, None), calls.blas_linear(x, packed.operands, None))
    # Scales that are right as they are stay what they are.
    assert balance.balanced(operands) is operands


def test_shared_first_stages_move_together(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [16, 16], share_v=True, generator=rng)
    in_scale = balance.balanced(packed.operands)[2]
    assert torch.equal(in_scale[0], in_scale[1])


def test_layers_of_zeros_fit() -> None:
    for ranks in (None, [8, 16]):
        module = LittleBitLinear(100, 70, ranks, bias=False, backend="blas")
        assert not bool(module(torch.ones(2, 100, dtype=torch.float16)).any())


def test_channels_of_zeros_fit(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24, 136], generator=rng)
    for path in packed.paths:
        path.in_scale[:60] = 0
        path.out_scale[:50] = 0
        path.latent_scale[:10] = 0
    assert balance.fits_float16(packed.operands)
    packed.paths[0].latent_scale.zero_()
    assert balance.fits_float16(packed.operands)


def test_a_path_that_adds_nothing_does_not_matter(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24, 24], generator=rng)
    layer = rescaled(packed, (1.0, 1.0, 0.1), (1.0, 1e-9, 1.0))
    assert balance.fits_float16(layer.operands)
    assert error_of(torch.randn(50, 100, generator=rng).half(), layer) <= 2.5 * TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("ranks", "change", "problem"),
    [
        ([24], (1.0, 1e4, 1.0), r"out_scale \* latent_scale reaches .* in_scale is of a length below 1/4"),
        ([24], (1e3, 1e2, 1.0), r"out_scale \* latent_scale reaches"),
        (
            [24],
            (1.0, 1e-4, 1e-4),
            r"70 of 70 output channels have factors below 6.1e-05, its smallest",
        ),
        (
            [24],
            (1e36, 1e36, 1e-30),
            r"2\*\*1\d\d cannot move from in_scale\[0\] to latent_scale\[0\] in",
        ),
        ([24], (1e-36, 0.1, 1e37), r"2\*\*-1\d\d cannot move from"),
        (None, (3e2, 0.0, 3e2), r"out_scale \* in_scale reaches"),
        (None, (1e-3, 0.0, 1e-3), r"\d+ of 70 output channels"),
    ],
)
def test_layers_that_do_not_fit(
    ranks: list[int] | None, change: tuple[float, float, float], problem: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(5, 100, 70, ranks, scale_spread=0.2, dtype=torch.float16, generator=rng)
    layer = rescaled(packed, change)
    message = "x must be float32 or bfloat16 for backend='blas', or the layer one whose factors fit float16; "
    message += "got torch.float16, and " + problem
    assert not balance.fits_float16(layer.operands)
    for call in (
        lambda: littlebit_linear(x, layer, backend="blas"),
        lambda: LittleBitLinear.from_packed(layer, backend="blas")(x),
        lambda: explain(x, layer, backend="blas"),
        lambda: littlebit_linear(x.clone().requires_grad_(), layer, backend="blas"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert littlebit_linear(x.bfloat16(), layer, backend="blas").shape == (5, 70)


def test_one_channel_may_be_far_from_the_others(rng: torch.Generator) -> None:
    packed = make_packed(200, 300, [24], scale_spread=0.2, generator=rng)
    path = packed.paths[0]
    path.in_scale[5] *= 1e-7
    path.out_scale[8] *= 1e-7
    x = torch.randn(9, 200, generator=rng).half()
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]
    path.in_scale[9:12] *= 1e-7
    with pytest.raises(ValueError, match="4 of 200 input channels have factors below"):
        littlebit_linear(x, packed, backend="blas")


def test_scales_that_are_not_finite(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], dtype=torch.float16, generator=rng)
    packed.paths[0].latent_scale[3] = float("nan")
    with pytest.raises(ValueError, match=r"latent_scale\[0\] must be finite"):
        littlebit_linear(x, packed, backend="blas")


def test_float16_gradients_are_those_of_float32(
    problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator
) -> None:
    x, packed = problem
    if not packed.single_stage:  # factors that float16 does not hold, but for the balance
        packed = rescaled(packed, *[(2.0**20, 2.0**-20, 1.0)] * len(packed.paths))
    seed = (torch.randn(5, 70, generator=rng) * 1e-4).half()
    leaf = x.half().requires_grad_()
    littlebit_linear(leaf, packed, backend="blas").backward(seed)
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16
    assert relative_error(leaf.grad, seed.double() @ dense_weight(packed)) <= TOLERANCE[torch.float16]
    # What is differentiated twice is the layer again.

    def energy(x: torch.Tensor) -> torch.Tensor:
        return 1e-4 * littlebit_linear(x, packed, backend="blas").float().square().sum()

    point, direction = x.half()[:2]
    product = torch.autograd.functional.vhp(energy, point, direction)[1]
    weight = dense_weight(packed)
    expected = 2e-4 * direction.double() @ weight.T @ weight
    assert relative_error(product, expected) <= 4 * TOLERANCE[torch.float16]


# --- when scales are read --------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each layer whose scales are read."""
    seen: list[int] = []
    inner = balance._measure

    def record(*scales: Any) -> Any:
        seen.append(1)
        return inner(*scales)

    monkeypatch.setattr(balance, "_measure", record)
    return seen


def test_scales_are_read_once(measured: list[int], rng: torch.Generator) -> None:
    x, packed = make_problem(2, 100, 70, [8, 16], dtype=torch.float16, generator=rng)
    module = LittleBitLinear.from_packed(packed, backend="blas")
    y = littlebit_linear(x, packed, backend="blas")
    with torch.inference_mode():
        assert torch.equal(littlebit_linear(x, packed, backend="blas"), y)
        assert torch.equal(littlebit_linear(x, module.packed, backend="blas"), y)
    assert torch.equal(module(x), y)
    assert len(measured) == 1
    littlebit_linear(x, packed.to("cpu"), backend="blas")  # the same tensors
    assert len(measured) == 1
    littlebit_linear(x, LittleBitLinear.from_packed(packed).prepack_().packed, backend="blas")
    assert len(measured) == 2


def test_scales_that_change_are_read_again(measured: list[int], rng: torch.Generator) -> None:
    x, packed = make_problem(20, 100, 70, [8, 16], dtype=torch.float16, generator=rng)
    littlebit_linear(x, packed, backend="blas")
    for scale in (packed.paths[1].in_scale, packed.paths[0].latent_scale, packed.paths[1].out_scale):
        before = len(measured)
        scale.mul_(2)
        assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]
        assert len(measured) == before + 1
    packed.paths[0].out_scale.fill_(1e9)
    with pytest.raises(ValueError, match=r"out_scale \* latent_scale reaches"):
        littlebit_linear(x, packed, backend="blas")
    module = LittleBitLinear(100, 70, [8, 16], bias=False, backend="blas")
    assert not bool(module(x).any())
    other = make_packed(100, 70, [8, 16], generator=rng)
    module.load_state_dict(LittleBitLinear.from_packed(other).state_dict())
    assert relative_error(module(x), linear_reference(x, other)) <= 2.5 * TOLERANCE[torch.float16]


def test_changes_that_torch_does_not_count(measured: list[int], rng: torch.Generator) -> None:
    """They are computed with, by the powers of two of before."""
    x, packed = make_problem(20, 100, 70, [8, 16], dtype=torch.float16, generator=rng)
    littlebit_linear(x, packed, backend="blas")
    packed.paths[0].in_scale.data.mul_(3)
    packed.paths[1].latent_scale.data.mul_(-0.7)
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]
    assert len(measured) == 1
    with torch.inference_mode():
        own = packed.to("cpu")
        copies = PackedLinear(
            tuple(
                PackedPath(p.v, p.in_scale.clone(), p.out_scale.clone(), p.u, p.latent_scale.clone())
                for p in own.paths
            )
        )
        assert copies.paths[0].in_scale.is_inference()
        for _ in range(2):
            assert error_of(x, copies) <= 2.5 * TOLERANCE[torch.float16]
    assert len(measured) == 2


def test_layers_are_forgotten(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    monkeypatch.setattr(balance, "_known", {})
    monkeypatch.setattr(balance, "_sweep_at", 64)
    kept = [make_packed(40, 30, [8], generator=rng) for _ in range(5)]
    for layer in kept:
        assert balance.fits_float16(layer.operands)
    for _ in range(300):
        assert balance.fits_float16(make_packed(40, 30, [8], generator=rng).operands)
        gc.collect(0)
    assert len(balance._known) <= 70
    monkeypatch.setattr(balance, "_measure", None)
    for layer in kept:
        assert balance.fits_float16(layer.operands)


def test_memory_that_is_used_again_is_another_layer(rng: torch.Generator) -> None:
    """At the same addresses, by the same counts of changes, but not the scales that were read."""
    x = torch.randn(5, 40, generator=rng).half()
    room = torch.empty(200)

    def layer_on(room: torch.Tensor, source: PackedLinear) -> PackedLinear:
        path = source.paths[0]
        pieces, at = [], 0
        for scale in (path.in_scale, path.out_scale, path.latent_scale):
            own = torch.empty(0).set_(room.untyped_storage(), at, scale.shape)
            pieces.append(own)
            at += scale.numel()
        for piece, scale in zip(pieces, (path.in_scale, path.out_scale, path.latent_scale), strict=True):
            piece.data.copy_(scale)
        return PackedLinear((PackedPath(path.v, pieces[0], pieces[1], path.u, pieces[2]),))

    source = make_packed(40, 30, [8], generator=rng)
    first = layer_on(room, source)
    assert error_of(x, first) <= 2.5 * TOLERANCE[torch.float16]
    # The same memory as another storage.
    again = torch.from_numpy(room.numpy())
    assert again.data_ptr() == room.data_ptr()
    second = layer_on(again, rescaled(source, (1.0, 1e9, 1.0)))
    with pytest.raises(ValueError, match="reaches"):
        littlebit_linear(x, second, backend="blas")


def test_threads(rng: torch.Generator) -> None:
    x = torch.randn(4, 40, generator=rng).half()
    layers = [make_packed(40, 30, [8, 8], generator=rng) for _ in range(100)]
    expected = [littlebit_linear(x, layer.to("cpu"), backend="blas") for layer in layers]
    copies = [rescaled(layer, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) for layer in layers]
    wrong: list[int] = []

    def run() -> None:
        for index, layer in enumerate(copies):
            if not torch.equal(littlebit_linear(x, layer, backend="blas"), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_while_a_graph_is_captured(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    x, packed = make_problem(2, 40, 30, [8], dtype=torch.float16, generator=rng)
    _, known = make_problem(2, 40, 30, [8], generator=rng)
    littlebit_linear(x, known, backend="blas")
    monkeypatch.setattr(balance, "_is_capturing", lambda device: True)
    assert balance.fits_float16(known.operands)
    assert not balance.fits_float16(packed.operands)
    littlebit_linear(x, known, backend="blas")
    with pytest.raises(RuntimeError, match=r"a CUDA graph cannot capture: call .*warmup\(layer"):
        littlebit_linear(x, packed, backend="blas")
    assert len(measured) == 1


# --- what auto takes -------------------------------------------------------------------------------------


def test_float16_pays_where_bfloat16_does() -> None:
    """But for the launch that balances the scales, which a call of some size has room for."""
    sizes = (4096, 11008, (128, 128), (0, 1), "H200")
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    for tokens in (prompts.LEAST_TOKENS - 1, 512, 2048, 8192):
        pays = prompts.prompt_backend(tokens, bfloat, *sizes) == "blas"
        assert (prompts.prompt_backend(tokens, half, *sizes) == "blas") == pays == (tokens >= 2048)
    assert prompts.prompt_backend(2048, single, *sizes) != "blas"
    plan = {"unpack_cycles": 10_000}
    assert prompts.unpack_cycles(plan, bfloat, False) == prompts.unpack_cycles(plan, half, True) == 10_000
    assert prompts.unpack_cycles(plan, half, False) == 10_000 + prompts.BALANCE_CYCLES
    assert prompts.unpack_cycles({"unpack_cycles": 0}, half, False) == 0


def test_auto_looks_at_the_scales(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    x, packed = make_problem(prompts.LEAST_TOKENS, 100, 70, [24], dtype=torch.float16, generator=rng)
    unfit = rescaled(packed, (1.0, 1e4, 1.0))
    asked: list[bool] = []

    def choose(backend: str, device: str, tokens: int, activation: str, best: Callable[[], str]) -> str:
        if backend != "auto":
            return backend
        asked.append(best() == "blas")
        return "blas" if asked[-1] else "reference"

    monkeypatch.setattr(prompts, "_properties", lambda device: GPUS["H200"])
    monkeypatch.setattr(prompts, "_estimates", lambda *sizes: (2, 1))
    for module in (functional, linear):
        monkeypatch.setattr(module, "choose_backend", choose)
    for _ in range(2):
        for layer, fits in ((packed, True), (unfit, False)):
            expected = littlebit_linear(x, layer, "blas" if fits else "reference")
            for y in (littlebit_linear(x, layer), LittleBitLinear.from_packed(layer)(x)):
                assert torch.equal(y, expected)
    assert asked == [True, True, False, False] * 2
    assert len(measured) == 2
    # Of fewer tokens, and in other dtypes, nobody looks.
    for other in (x[1:], x.bfloat16()):
        littlebit_linear(other, make_packed(100, 70, [24], generator=rng))
    assert len(measured) == 2
    # Not while a graph is captured, but what was found before holds.
    monkeypatch.setattr(balance, "_is_capturing", lambda device: True)
    littlebit_linear(x, packed)
    littlebit_linear(x, make_packed(100, 70, [24], generator=rng))
    assert asked[-2:] == [True, False]


def test_auto_is_explained(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24], generator=rng)
    monkeypatch.setattr(prompts, "_properties", lambda device: GPUS["H200"])
    monkeypatch.setattr(prompts, "_estimates", lambda *sizes: (2, 1))
    monkeypatch.setattr(explanation, "gpu_properties", lambda gpu: GPUS["H200"])
    monkeypatch.setattr(explanation, "choose_backend", lambda *rest: rest[-1]())
    taken = explain((600, 100), packed, dtype=torch.float16)
    assert (taken.backend, taken.kernels) == ("blas", "matrix products")
    refused = explain((600, 100), rescaled(packed, (1.0, 1e4, 1.0)), dtype=torch.float16)
    assert refused.backend == "triton"  # as more tokens than CUDA_TOKENS on Hopper
    assert "unpacking would be faster by its estimate, but does not fit float16: out_scale" in refused.reason
    assert "does not fit" not in explain((100, 100), packed, dtype=torch.float16).reason
    half, bfloat = (
        explain((600, 100), packed, "cuda", dtype=dtype, gpu="H200")
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert half.unpack_cycles is not None
    assert bfloat.unpack_cycles is not None
    assert half.unpack_cycles == bfloat.unpack_cycles + prompts.BALANCE_CYCLES


def test_warming_reads_the_scales(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    monkeypatch.setattr(warming, "no_cuda_reason", lambda: None)
    packed = make_packed(100, 70, [24], generator=rng)
    unfit = rescaled(packed, (1.0, 1e4, 1.0))
    gpu, half = torch.device("cuda"), torch.float16

    def may_unpack(*how: Any, layer: PackedLinear = packed) -> bool:
        return warming._may_unpack(*how, lambda: layer.operands)

    assert may_unpack("auto", "auto", gpu, torch.bfloat16)
    for how in (
        ("auto", "exact", gpu, half),
        ("cuda", "auto", gpu, half),
        ("auto", "auto", gpu, torch.float32),
    ):
        assert not may_unpack(*how)
    assert measured == []
    assert may_unpack("auto", "auto", gpu, half)
    assert len(measured) == 1
    assert not may_unpack("auto", "auto", gpu, half, layer=unfit)
    assert not may_unpack("blas", "auto", gpu, half)  # which is what it runs anyway
    assert len(measured) == 2
