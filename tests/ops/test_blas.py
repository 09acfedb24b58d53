"""The backend ``blas``: layers unpacked for each call, and torch's matrix products; on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    explain,
    grouped_linear,
    littlebit_linear,
    load,
    prepack,
)
from littlebit2_kernels.dispatch import unavailable_reason
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.ops import calls, dense
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_packed, make_problem, relative_error, typical_norm

LAYERS = {
    "one path": ([40], {}),
    "two paths": ([24, 136], {"bias": True}),
    "three paths": ([8, 72, 200], {}),
    "shared first stage": ([16, 16], {"share_v": True, "bias": True}),
    "single stage": (None, {"bias": True}),
}


def factors_of(packed: PackedLinear) -> list[torch.Tensor]:
    """The layer's matrices by their definition, in float64."""
    firsts, lasts = [], []
    for path in packed.paths:
        v = unpack_signs_reference(path.v, path.in_features, torch.float64) * path.in_scale.double()
        if path.u is None or path.latent_scale is None:
            lasts.append(path.out_scale.double()[:, None] * v)
            continue
        u = unpack_signs_reference(path.u, path.rank, torch.float64) * path.latent_scale.double()
        firsts.append(v)
        lasts.append(path.out_scale.double()[:, None] * u)
    if not firsts:
        return [sum(lasts[1:], lasts[0])]
    return [torch.cat(firsts), torch.cat(lasts, 1)]


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    ranks, options = LAYERS[request.param]
    return make_problem(5, 100, 70, ranks, generator=rng, **options)


def two_single_stages(rng: torch.Generator) -> PackedLinear:
    paths = [make_packed(100, 70, None, generator=rng).paths[0] for _ in range(2)]
    return PackedLinear(tuple(paths))


# --- unpacking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unpack(problem: tuple[torch.Tensor, PackedLinear], dtype: torch.dtype) -> None:
    _, packed = problem
    for actual, exact in zip(calls.unpack(packed.operands, dtype), factors_of(packed), strict=True):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_paths_of_a_single_stage_are_one_matrix(rng: torch.Generator) -> None:
    packed = two_single_stages(rng)
    (actual,) = calls.unpack(packed.operands, torch.float32)
    torch.testing.assert_close(actual.double(), dense_weight(packed), rtol=1e-6, atol=1e-6)


def test_unpack_is_checked(rng: torch.Generator) -> None:
    load()
    v, u, in_scale, latent_scale, out_scale = make_packed(100, 70, [8, 16], generator=rng).operands
    unpack = torch.ops.littlebit2.unpack
    with pytest.raises(RuntimeError, match=r"dtype must be 0 \(float32\), 1 .* got 3"):
        unpack(v, u, in_scale, latent_scale, out_scale, 3)
    with pytest.raises(RuntimeError, match="in_scale must hold one tensor per path"):
        unpack(v, u, in_scale[:1], latent_scale, out_scale, 0)
    with pytest.raises(RuntimeError, match=r"latent_scale\[1\]"):
        unpack(v, u, in_scale, [latent_scale[0], latent_scale[0]], out_scale, 0)
    with pytest.raises(RuntimeError, match=r"v\[0\]"):
        unpack([v[0].float(), v[1]], u, in_scale, latent_scale, out_scale, 0)
    with pytest.raises(RuntimeError, match=r"dtype must be one of .* got 7"):
        unpack(*[[t.to("meta") for t in o] for o in (v, u, in_scale, latent_scale, out_scale)], 7)


def test_operands_that_only_look_like_a_single_stage() -> None:
    load()
    words = torch.zeros(32, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        torch.ops.littlebit2.unpack(
            [words[:0, :].new_zeros(0, 2)], [words], [torch.ones(64)], [torch.ones(0)], [torch.ones(32)], 0
        )
    with pytest.raises(RuntimeError, match="rank must be a multiple of 8, got 12"):
        torch.ops.littlebit2.unpack(
            [words.new_zeros(12, 2)],
            [words.new_zeros(32, 1)],
            [torch.ones(64)],
            [torch.ones(12)],
            [torch.ones(32)],
            0,
        )


def test_operator(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    _, packed = problem
    load()
    torch.library.opcheck(torch.ops.littlebit2.unpack, (*packed.operands, 2))
    x = torch.randn(3, 100, requires_grad=True)
    torch.library.opcheck(torch.ops.littlebit2.blas_linear, (x, *packed.operands, packed.bias))
    torch.library.opcheck(
        torch.ops.littlebit2.blas_linear, (x.detach().half().requires_grad_(), *packed.operands, packed.bias)
    )
    grad = torch.randn(3, 70, requires_grad=True)
    torch.library.opcheck(torch.ops.littlebit2.blas_linear_backward_x, (grad, *packed.operands))


# --- calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 200])
@pytest.mark.parametrize("outliers", [0, 3])
def test_results(
    problem: tuple[torch.Tensor, PackedLinear],
    dtype: torch.dtype,
    tokens: int,
    outliers: int,
    rng: torch.Generator,
) -> None:
    _, packed = problem
    x = torch.randn(tokens, 100, generator=rng)
    x[:, :outliers] *= 50
    x = x.to(dtype)
    y = littlebit_linear(x, packed, backend="blas")
    assert (y.dtype, y.shape) == (dtype, (tokens, 70))
    # Three roundings of the dtype beside that of the output: of both factors and of the latents.
    allowed = 2e-6 if dtype == torch.float32 else 2.5 * TOLERANCE[dtype]
    assert relative_error(y, linear_reference(x, packed), typical_norm(x, packed)) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extreme_scales(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, packed = make_problem(7, 96, 64, [16, 24], scale_spread=0.2, dtype=dtype, generator=rng)
    path = packed.paths[0]
    far = PackedPath(path.v, path.in_scale * 1e12, path.out_scale * 1e-9, path.u, path.latent_scale * 1e-8)
    layer = PackedLinear((far, packed.paths[1]))
    x = x * 1e-3
    y = littlebit_linear(x, layer, backend="blas")
    truth = linear_reference(x, layer)
    assert relative_error(y, truth) <= (2e-6 if dtype == torch.float32 else 2.5 * TOLERANCE[dtype])


def test_layouts_of_x(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    truth = linear_reference(x, packed)
    for view, expected in (
        (x.T.contiguous().T, truth),
        (torch.cat([x, x], 1)[:, :100], truth),
        (x[0], truth[0]),
        (x.view(1, 5, 1, 100), truth.view(1, 5, 1, 70)),
    ):
        assert relative_error(littlebit_linear(view, packed, backend="blas"), expected) <= 2e-6
    assert littlebit_linear(x.new_empty(2, 0, 100), packed, backend="blas").shape == (2, 0, 70)


def test_modules_and_prepacked_layers(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    y = littlebit_linear(x, packed, backend="blas")
    assert torch.equal(littlebit_linear(x, prepack(packed), backend="blas"), y)
    module = LittleBitLinear.from_packed(packed, backend="blas")
    assert torch.equal(module(x), y)
    assert torch.equal(module.prepack_()(x), y)
    assert torch.equal(grouped_linear(x, [packed, packed], backend="blas")[1], y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(littlebit_linear(x, packed, backend="blas"), y)  # as with the other backends
        assert module(x).dtype == torch.bfloat16


def test_refusals(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    for activation in ("exact", "int8", "float16"):
        with pytest.raises(ValueError, match=f"torch's sums only, got activation='{activation}'"):
            littlebit_linear(x, packed, backend="blas", activation=activation)
        with pytest.raises(ValueError, match="torch's sums only"):
            LittleBitLinear.from_packed(packed, backend="blas", activation=activation)
    with pytest.raises(ValueError, match=r"x.size\(-1\) must equal K=100"):
        littlebit_linear(x[:, :99], packed, backend="blas")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_meta_tensors_and_other_devices(dtype: torch.dtype) -> None:
    module = LittleBitLinear(100, 70, [8, 16], backend="blas", device="meta")
    x = torch.empty(3, 100, device="meta", dtype=dtype, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (3, 100)
    assert unavailable_reason("blas", "mps") == "it runs on CPU and CUDA tensors, not on mps"


def test_explained(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    plan = explain(x, packed, backend="blas")
    assert (plan.backend, plan.kernels, plan.tokens) == ("blas", "matrix products", 5)
    half = explain(x.half(), prepack(packed), backend="blas")
    assert half.workspace_bytes == plan.workspace_bytes // 2


# --- gradients, tracing ----------------------------------------------------------------------------------


def test_gradients(problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator) -> None:
    x, packed = problem
    seed = torch.randn(5, 70, generator=rng)
    x = x.requires_grad_()
    littlebit_linear(x, packed, backend="blas").backward(seed)
    assert x.grad is not None
    assert relative_error(x.grad, seed.double() @ dense_weight(packed)) <= 2e-6


def test_gradient_of_the_bias(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], bias=True, dtype=torch.bfloat16, generator=rng)
    bias = packed.bias.clone().requires_grad_()
    calls.dense_linear(x.view(1, 2, 40), packed.operands, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((30,), 2.0))


def test_second_derivatives(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], generator=rng)

    def squares(x: torch.Tensor) -> torch.Tensor:
        return littlebit_linear(x, packed, backend="blas").square().sum()

    weight = dense_weight(packed)
    hessian = torch.autograd.functional.hessian(squares, x[0])
    assert relative_error(hessian, 2 * weight.T @ weight) <= 4e-6
    # Forward mode, also of what wants a gradient in reverse.
    for primal in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            y = littlebit_linear(forward_ad.make_dual(primal, x), packed, backend="blas")
            tangent = forward_ad.unpack_dual(y).tangent
        assert relative_error(tangent.detach(), linear_reference(x, packed)) <= 2e-6


def test_frozen_scales(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], generator=rng)
    packed.paths[0].out_scale.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"out_scale\[0\] requires a gradient, but packed layers are frozen"
    ):
        littlebit_linear(x, packed, backend="blas")


def test_weights_changed_before_the_backward_call(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], generator=rng)
    y = littlebit_linear(x.requires_grad_(), packed, backend="blas")
    packed.paths[0].v.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_that_the_cuda_kernels_take(
    problem: tuple[torch.Tensor, PackedLinear], dtype: torch.dtype, rng: torch.Generator
) -> None:
    _, packed = problem
    grad = torch.randn(5, 70, generator=rng).to(dtype)
    actual = dense._backward_x(grad, *packed.operands)
    assert actual.dtype == dtype
    truth = grad.double() @ dense_weight(packed)
    allowed = {torch.float32: 2e-6, torch.float16: TOLERANCE[dtype], torch.bfloat16: 2.5 * TOLERANCE[dtype]}
    assert relative_error(actual, truth) <= allowed[dtype]


def test_gradients_are_checked(rng: torch.Generator) -> None:
    _, packed = make_problem(2, 40, 30, [8], generator=rng)
    load()
    for operator in (dense._backward_x, torch.ops.littlebit2.blas_linear_backward_x):
        with pytest.raises(RuntimeError, match=r"grad must be float32, float16 or bfloat16, got"):
            operator(torch.ones(2, 30).double(), *packed.operands)
        with pytest.raises(RuntimeError, match=r"grad.size\(-1\) must equal 30, got shape \[2, 31\]"):
            operator(torch.ones(2, 31), *packed.operands)


def test_compiled_calls_keep_no_factors(rng: torch.Generator) -> None:
    """What goes from the forward to the backward graph is packed: unpacked it would be a dense model."""
    x, packed = make_problem(6, 40, 30, [8, 16], generator=rng)
    kept: list[torch.Tensor] = []

    def backward(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        kept.extend(inputs)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda x: littlebit_linear(x, packed, backend="blas"),
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
        ),
    )
    compiled(x.clone().requires_grad_()).sum().backward()
    floats = [t for t in kept if t.is_floating_point() and t.dim() == 2]
    assert kept
    assert [tuple(t.shape) for t in floats if t.shape[-1] != 30] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, packed = make_problem(6, 40, 30, [8, 16], bias=True, dtype=dtype, generator=rng)
    module = LittleBitLinear.from_packed(packed, backend="blas")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    module(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
