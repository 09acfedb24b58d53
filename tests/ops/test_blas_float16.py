"""The backend ``blas`` in float16: how scales are normalized, and how accurate and how robust that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    dispatch,
    explain,
    functional,
    linear,
    littlebit_linear,
    warming,
)
from littlebit2_kernels.dispatch import BLAS_TOKENS, Call, Choice, choose, prefill_backend
from littlebit2_kernels.format import LayerShape, unpack_signs_reference
from littlebit2_kernels.ops import balance, calls
from littlebit2_kernels.planning import native
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


def fits(packed: PackedLinear) -> bool:
    """Whether float16 holds the dense factors: none too large, and next to no channel too small."""
    limits = torch.finfo(torch.float16)
    for factor in calls.unpack(balance.balanced(packed.operands), torch.float32):
        if not float(factor.abs().max()) <= limits.max:
            return False
        for dim in (0, 1):
            small = factor.double().square().mean(dim).sqrt() < limits.smallest_normal
            if float(small.double().mean()) > 0.01:
                return False
    return True


@pytest.mark.parametrize("batch", range(4))
def test_what_fits_is_accurate(batch: int, rng: torch.Generator) -> None:
    """A layer whose factors float16 holds is as accurate as its three roundings."""

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
        if not fits(layer):
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
    assert torch.equal(calls.dense_linear(x, operands, None), calls.dense_linear(x, packed.operands, None))
    # Scales that are right as they are stay what they are.
    again = balance.balanced(operands)
    for index in (2, 3):
        assert all(torch.equal(*pair) for pair in zip(again[index], operands[index], strict=True))


def test_shared_first_stages_move_together(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [16, 16], share_v=True, generator=rng)
    in_scale = balance.balanced(packed.operands)[2]
    assert torch.equal(in_scale[0], in_scale[1])


def test_layers_of_zeros() -> None:
    for ranks in (None, [8, 16]):
        module = LittleBitLinear(100, 70, ranks, bias=False, backend="blas")
        assert not bool(module(torch.ones(2, 100, dtype=torch.float16)).any())


def test_channels_of_zeros(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24, 136], generator=rng)
    for path in packed.paths:
        path.in_scale[:60] = 0
        path.out_scale[:50] = 0
        path.latent_scale[:10] = 0
    x = torch.randn(50, 100, generator=rng).half()
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]
    packed.paths[0].in_scale.zero_()
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]


def test_a_path_that_adds_nothing_does_not_matter(rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24, 24], generator=rng)
    layer = rescaled(packed, (1.0, 1.0, 0.1), (1.0, 1e-9, 1.0))
    assert error_of(torch.randn(50, 100, generator=rng).half(), layer) <= 2.5 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("inner", [2.0**-50, 1e-12, 1e12, 2.0**50])
def test_scales_of_any_size(inner: float, rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24], scale_spread=0.2, generator=rng)
    layer = rescaled(packed, (inner, 1 / inner, 0.1))
    x = torch.randn(9, 100, generator=rng).half()
    assert error_of(x, layer) <= 2.5 * TOLERANCE[torch.float16]


@pytest.mark.parametrize("ranks", [[24], None])
def test_factors_beyond_float16_overflow(ranks: list[int] | None, rng: torch.Generator) -> None:
    """As any float16 layer does: not an error, not a wrong number."""
    x, packed = make_problem(5, 100, 70, ranks, scale_spread=0.2, dtype=torch.float16, generator=rng)
    layer = rescaled(packed, (3e2, 1e4, 3e2))
    for y in (littlebit_linear(x, layer, "blas"), LittleBitLinear.from_packed(layer, backend="blas")(x)):
        assert not bool(torch.isfinite(y).any())
    assert bool(torch.isfinite(littlebit_linear(x.bfloat16(), layer, "blas")).all())


def test_one_channel_may_be_far_from_the_others(rng: torch.Generator) -> None:
    packed = make_packed(200, 300, [24], scale_spread=0.2, generator=rng)
    path = packed.paths[0]
    path.in_scale[5] *= 1e-7
    path.out_scale[8] *= 1e-7
    x = torch.randn(9, 200, generator=rng).half()
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]


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


# --- what a captured graph or a compiled call must not do ------------------------------------------------


class NoReading(TorchDispatchMode):
    """Fails where a value is read on the host, as a CUDA graph capture does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_readings() -> None:
    for read in (torch.Tensor.item, torch.nonzero, lambda x: bool((x > 0).any())):
        with NoReading(), pytest.raises(AssertionError, match="reads a value on the host"):
            read(torch.ones(1))


def test_no_value_is_read_on_the_host(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    expected = littlebit_linear(x.half(), packed, backend="blas")
    with NoReading():
        moved = balance.balanced(packed.operands)
        y = littlebit_linear(x.half(), packed, backend="blas")
    assert torch.equal(y, expected)
    assert moved[2][0].device == packed.device


def test_scales_have_no_history(rng: torch.Generator) -> None:
    """A call computes with the scales as they are, also where torch does not count a change of them."""
    x, packed = make_problem(20, 100, 70, [8, 16], dtype=torch.float16, generator=rng)
    littlebit_linear(x, packed, backend="blas")
    packed.paths[0].in_scale.data.mul_(2.0**20)
    packed.paths[0].latent_scale.data.mul_(-(2.0**-20))
    packed.paths[1].out_scale.mul_(3)
    assert error_of(x, packed) <= 2.5 * TOLERANCE[torch.float16]


def test_compiled(rng: torch.Generator) -> None:
    x, packed = make_problem(6, 100, 70, [24, 136], dtype=torch.float16, bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed, backend="blas")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


# --- what auto takes -------------------------------------------------------------------------------------


def test_float16_pays_a_little_later_than_bfloat16() -> None:
    """The launches that normalize the scales are counted."""
    shape, single_stage = LayerShape(4096, 11008, (128, 128)), LayerShape(4096, 11008, None)
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    for tokens in (BLAS_TOKENS - 1, 512, 4096, 8192):
        pays = prefill_backend(shape, tokens, bfloat, "H200") == "blas"
        assert (prefill_backend(shape, tokens, half, "H200") == "blas") == pays == (tokens >= 4096)
    assert prefill_backend(shape, 4096, single, "H200") != "blas"
    plan = {"unpack_cycles": 10_000}
    assert native.unpack_cycles(plan, bfloat, shape) == native.unpack_cycles(plan, half, single_stage)
    assert native.unpack_cycles(plan, half, shape) == 10_000 + 8 * native.BALANCE_CYCLES
    assert native.unpack_cycles({"unpack_cycles": 0}, half, shape) == 0


class CountLaunches(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU: all but views."""

    launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not (func.is_view or "view" in str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("paths", [1, 2, 3])
def test_launches_are_those_counted(paths: int, rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24] * paths, generator=rng)
    with CountLaunches() as count:
        balance.balanced(packed.operands)
    assert count.launches == balance.balance_launches(paths)


def test_functions_and_modules_do_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    x, packed = make_problem(BLAS_TOKENS, 100, 70, [24], dtype=torch.float16, generator=rng)
    seen: list[str] = []

    def of_a_gpu(
        x: torch.Tensor, shape: LayerShape, backend: str, activation: str, prepacked: bool
    ) -> Choice:
        choice = choose(Call(shape, len(x), x.dtype, x.device, backend, activation, gpu="H200"))
        seen.append(choice.backend)
        return choice if choice.backend == "blas" else choice._replace(backend="reference")

    monkeypatch.setattr(dispatch, "_estimates", lambda *call: (2, 1))
    for module in (functional, linear):
        monkeypatch.setattr(module, "choose_for", of_a_gpu)
    layer = LittleBitLinear.from_packed(packed)
    expected = calls.dense_linear(x, packed.operands, None)
    assert torch.equal(littlebit_linear(x, packed), expected)
    assert torch.equal(layer(x), expected)
    assert seen == ["blas"] * 2
    few = x[1:]
    assert torch.equal(littlebit_linear(few, packed), layer(few))
    assert seen[2:] == ["cuda"] * 2


def test_auto_is_explained(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    packed = make_packed(100, 70, [24], generator=rng)
    half, bfloat = (
        explain((600, 100), packed, "cuda", dtype=dtype, gpu="H200")
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert half.unpack_cycles is not None
    assert bfloat.unpack_cycles is not None
    assert half.unpack_cycles == bfloat.unpack_cycles + 7 * native.BALANCE_CYCLES
    monkeypatch.setattr(dispatch, "_estimates", lambda *call: (2, 1))
    taken = explain((600, 100), packed, dtype=torch.float16, gpu="H200")
    assert (taken.backend, taken.kernels) == ("blas", "matrix products")
    assert "torch.matmul is estimated to be faster" in taken.reason
    # More tokens than CUDA_TOKENS, on Hopper.
    monkeypatch.setattr(dispatch, "_estimates", lambda *call: (2, 1.99))
    refused = explain((600, 100), packed, dtype=torch.float16, gpu="H200")
    assert refused.backend == "triton"
    assert "mma.sync" in refused.reason


def test_warming_dequantizes_where_auto_may(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    shape, gpu, half = LayerShape(100, 70, (24,)), torch.device("cuda"), torch.float16
    call = Call(shape, 1, half, gpu)
    assert not dispatch.may_choose_blas(call._replace(device=torch.device("cpu")))
    monkeypatch.setattr(dispatch, "no_cuda_reason", lambda: "no GPU")
    assert not dispatch.may_choose_blas(call)
    monkeypatch.setattr(dispatch, "no_cuda_reason", lambda: None)
    assert dispatch.may_choose_blas(call)
    assert dispatch.may_choose_blas(call._replace(dtype=torch.bfloat16))
    for other in (
        {"activation": "exact"},
        {"backend": "cuda"},
        {"backend": "blas"},
        {"dtype": torch.float32},
    ):
        assert not dispatch.may_choose_blas(call._replace(**other))
    ran: list[tuple[int, str]] = []
    packed = make_packed(100, 70, [24], generator=rng)

    def record(x: torch.Tensor, packed: object, backend: str = "auto", activation: str = "auto") -> None:
        ran.append((x.shape[0], backend))

    monkeypatch.setattr(warming, "may_choose_blas", lambda call: call.backend == "auto")
    monkeypatch.setattr(warming, "littlebit_linear", record)
    assert warming.warmup(packed, half, [1, 7]) == 3
    assert ran == [(1, "auto"), (7, "auto"), (7, "blas")]
    assert warming.warmup(packed, half, [1, 7], backend="cpu") == 2
