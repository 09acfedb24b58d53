"""What ``auto`` chooses on the CPU for many tokens, and that its choices compute the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    explain,
    grouped_linear,
    littlebit_linear,
    prepack,
)
from littlebit2_kernels.dispatch import BLAS_BYTES, CPU_TOKENS, Call, choose, choose_for, costs_on_cpu
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.planning import explanation
from littlebit2_kernels.planning.cpu import CpuMachine, cpu_costs, product_dtype
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import make_packed, make_problem, relative_error

CPU = torch.device("cpu")
AVX512 = CpuMachine("avx512vnni", "avx512", bfloat16=False, cache_bytes=2**21)
AVX2 = CpuMachine("avx2", "avx2", bfloat16=False, cache_bytes=2**20)
#: AMX for torch, but not for our kernels: another instruction set was asked for.
AMX_PRODUCTS = CpuMachine("avx512vnni", "amx", bfloat16=True, cache_bytes=2**21)
AMX = CpuMachine("amx", "amx", bfloat16=True, cache_bytes=2**21)
LARGE = LayerShape(4096, 11008, (1488, 1488))
TINY = LayerShape(4096, 4096, (16,))


def faster(shape: LayerShape, tokens: int, dtype: torch.dtype, machine: CpuMachine) -> str:
    costs = cpu_costs(shape, tokens, dtype, machine, prepacked=True)
    return "blas" if costs.blas < costs.own else "own"


@pytest.mark.parametrize(
    ("shape", "tokens", "dtype", "machine", "expected"),
    [
        (LARGE, 1024, torch.float32, AVX512, "own"),
        (LARGE, 1024, torch.bfloat16, AVX512, "own"),
        (LARGE, 1024, torch.float32, AVX2, "own"),
        (LARGE, 1024, torch.bfloat16, AVX2, "own"),
        (LARGE, 64, torch.bfloat16, AMX_PRODUCTS, "own"),
        (LARGE, 2048, torch.bfloat16, AMX_PRODUCTS, "blas"),
        (LARGE, 2048, torch.bfloat16, AMX, "own"),
        (TINY, 512, torch.float32, AVX512, "blas"),
        (TINY, 64, torch.float32, AVX512, "own"),
        (TINY, 512, torch.float16, AVX512, "own"),
    ],
)
def test_the_model(
    shape: LayerShape, tokens: int, dtype: torch.dtype, machine: CpuMachine, expected: str
) -> None:
    """What was measured, or for AMX known from other measurements; a tie is no case."""
    assert faster(shape, tokens, dtype, machine) == expected


@pytest.mark.parametrize("machine", [AVX512, AVX2, AMX, AMX_PRODUCTS], ids=str)
def test_prepacking_in_the_call_pays(machine: CpuMachine) -> None:
    costs = cpu_costs(LARGE, CPU_TOKENS, torch.float32, machine, prepacked=False)
    assert costs.prepacked is not None
    assert costs.prepacked < min(costs.own, costs.blas)


def test_only_auto_compares() -> None:
    call = Call(TINY, 4096, torch.float32, CPU, prepacked=True)
    assert costs_on_cpu(call) is not None
    for change in (
        {"tokens": CPU_TOKENS - 1},
        {"backend": "cpu"},
        {"activation": "exact"},
        {"compiling": True},
        {"tokens": 2**40},
        {"device": torch.device("meta")},
    ):
        other = call._replace(**change)
        assert costs_on_cpu(other) is None
        assert (choose(other).backend, choose(other).prepack) == ("cpu", False)


def test_factors_that_are_too_large_are_not_made() -> None:
    slow = CpuMachine("scalar", "avx512", bfloat16=False, cache_bytes=2**20)
    for shape, backend in ((TINY, "blas"), (LayerShape(32768, 32768, (1024,)), "cpu")):
        call = Call(shape, 4096, torch.float32, CPU, prepacked=True)
        costs = costs_on_cpu(call, slow)
        assert costs is not None
        assert costs.blas < costs.own
        assert (shape.factor_elements * 4 <= BLAS_BYTES) == (backend == "blas")
        assert choose(call).backend == backend


def chosen(x: torch.Tensor, packed: PackedLinear) -> tuple[str, bool]:
    choice = choose_for(x, packed.shape, "auto", "auto", prepacked=False)
    return choice.backend, choice.prepack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepacking_in_the_call(dtype: torch.dtype, rng: torch.Generator) -> None:
    x, packed = make_problem(CPU_TOKENS, 300, 200, [64, 64], generator=rng)
    x = x.to(dtype)
    assert chosen(x, packed) == ("cpu", True)
    y = littlebit_linear(x, packed)
    assert torch.equal(y, littlebit_linear(x, prepack(packed), activation="exact"))
    assert torch.equal(littlebit_linear(x[:-1], packed), littlebit_linear(x[:-1], packed, "cpu"))
    outputs = grouped_linear(x, [packed, packed])
    assert all(torch.equal(output, y) for output in outputs)


def test_gradients_of_a_call_that_prepacks(rng: torch.Generator) -> None:
    x, packed = make_problem(CPU_TOKENS, 300, 200, [64, 64], bias=True, generator=rng)
    x.requires_grad_()
    assert packed.bias is not None
    bias = packed.bias.clone().requires_grad_()
    trained = PackedLinear(packed.paths, bias)
    assert chosen(x, packed) == ("cpu", True)
    grad = torch.randn(CPU_TOKENS, 200, generator=rng)
    (grad_x, grad_bias) = torch.autograd.grad(littlebit_linear(x, trained), (x, bias), grad)
    (expected,) = torch.autograd.grad(littlebit_linear(x, packed, "reference"), x, grad)
    assert relative_error(grad_x, expected) <= 1e-5
    assert relative_error(grad_bias, grad.sum(0)) <= 1e-5


@pytest.mark.parametrize("prepacked", [False, True])
def test_dequantizing(prepacked: bool, rng: torch.Generator) -> None:
    packed = make_packed(2048, 2048, [8], generator=rng)
    layer = prepack(packed) if prepacked else packed
    module = LittleBitLinear.from_packed(packed)
    if prepacked:
        module.prepack_()
    x = torch.randn(1024, 2048, generator=rng)
    plan = explain(x, layer)
    assert (plan.backend, plan.kernels) == ("blas", "matrix products")
    assert plan.machine is not None
    assert plan.unpack_cycles is not None
    assert plan.estimated_cycles is not None
    assert plan.unpack_cycles < plan.estimated_cycles
    y = littlebit_linear(x, layer)
    assert torch.equal(y, littlebit_linear(x, layer, "blas"))
    assert torch.equal(y, module(x))
    assert relative_error(y, linear_reference(x, packed)) <= 1e-5


def test_explained_estimates(rng: torch.Generator) -> None:
    x, packed = make_problem(CPU_TOKENS, 300, 200, [64, 64], generator=rng)
    plan = explain(x, packed)
    assert (plan.kernels, plan.activation) == ("lookup", "exact")
    assert "prepacking the layer in the call" in plan.reason
    assert plan.estimated_cycles is not None
    assert plan.machine is not None
    few = explain(x[:-1], packed)
    assert (few.kernels, few.estimated_cycles, few.unpack_cycles, few.machine) == (
        "portable",
        None,
        None,
        None,
    )
    half = explain(x.half(), prepack(packed))
    assert half.estimated_cycles is not None
    assert half.unpack_cycles is None


def test_the_dtype_of_products() -> None:
    assert product_dtype(torch.float32) == torch.float32
    assert product_dtype(torch.float16) == torch.float16
    assert product_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)


def test_scales_that_require_a_gradient_are_refused_at_any_number_of_tokens(rng: torch.Generator) -> None:
    x, packed = make_problem(80, 96, 64, [48], generator=rng)
    packed.paths[0].in_scale.requires_grad_()
    for tokens in (10, 80):
        with pytest.raises(
            RuntimeError, match=r"in_scale\[0\] requires a gradient, but packed layers are froz"
        ):
            littlebit_linear(x[:tokens], packed)


def test_many_tokens_are_traced_without_prepacking(rng: torch.Generator) -> None:
    x, packed = make_problem(80, 96, 64, [48], generator=rng)
    traced = make_fx(
        lambda rows: littlebit_linear(rows, packed), tracing_mode="fake", _allow_non_fake_inputs=True
    )(x)
    assert "prepack" not in traced.code
    assert torch.equal(traced(x), littlebit_linear(x, packed, backend="cpu"))


def test_the_least_tokens_of_tiles_are_those_of_the_kernels() -> None:
    header = Path(__file__).parents[2] / "csrc/cpu/prepacked/tiles/kernels.h"
    found = re.search(r"kLeastTileTokens = (\d+);", header.read_text("utf-8"))
    assert found is not None
    assert int(found[1]) == explanation._TILE_TOKENS
