"""Norm, residual and MLPs in the launches of CUDA, without a GPU: fakes, and which calls go there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from littlebit2_kernels import PackedLinear, RMSNorm, load, prepack
from littlebit2_kernels.dispatch import Choice
from littlebit2_kernels.functional import run_fused, run_mlp
from littlebit2_kernels.testing import make_packed

CUDA = Choice("cuda", "auto", "")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    load()


def on_meta(*layers: PackedLinear) -> list[PackedLinear]:
    return [layer.to("meta") for layer in layers]


def fused(
    x: torch.Tensor, layers: list[PackedLinear], norm: RMSNorm | None, residual: torch.Tensor | None
) -> Any:
    tensors, bias = [layer.operands for layer in layers], [layer.bias for layer in layers]
    return run_fused(x, tensors, bias, [layer.shape for layer in layers], CUDA, norm, residual)


def whole_mlp(x: torch.Tensor, layers: list[PackedLinear], choice: Choice = CUDA) -> Any:
    tensors, bias = [layer.operands for layer in layers], [layer.bias for layer in layers]
    return run_mlp(x, tensors, bias, [layer.shape for layer in layers], 0, choice, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 9)], ids=str)
def test_shapes_and_dtypes(rng: torch.Generator, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    q, k = (make_packed(64, n, [8, 16], bias=n == 40, generator=rng) for n in (40, 24))
    x = torch.empty(*tokens, 64, dtype=dtype, device="meta")
    norm = RMSNorm(torch.ones(64, device="meta", dtype=torch.bfloat16), 1e-5, 1.0)
    outputs = fused(x, on_meta(q, k), norm, None)
    assert [(y.shape, y.dtype) for y in outputs] == [((*tokens, n), dtype) for n in (40, 24)]
    (y,) = fused(x, on_meta(q), None, torch.empty(*tokens, 40, dtype=dtype, device="meta"))
    assert (y.shape, y.dtype) == ((*tokens, 40), dtype)
    down = make_packed(40, 56, [8], generator=rng)
    y = whole_mlp(x, on_meta(q, make_packed(64, 40, [8], generator=rng), down))
    assert (y.shape, y.dtype) == ((*tokens, 56), dtype)


def test_calls_that_one_call_does_not_take(rng: torch.Generator) -> None:
    x = torch.empty(1, 64, device="meta")
    many = [make_packed(64, 32, [8] * 9, generator=rng) for _ in range(2)]
    single = make_packed(64, 32, None, generator=rng)
    down = make_packed(32, 64, [8], generator=rng)
    assert fused(x, on_meta(*many), None, None) is None  # 18 paths
    assert fused(x, on_meta(many[0], single), None, None) is None
    assert whole_mlp(x, on_meta(*many, down)) is None
    assert whole_mlp(x, on_meta(single, down)) is None
    # As many in each of the two calls as there may be.
    nine = make_packed(32, 64, [8] * 9, generator=rng)
    assert whole_mlp(x, on_meta(many[0], nine)).shape == (1, 64)
    for backend in ("triton", "blas", "reference"):
        assert whole_mlp(x, on_meta(many[0], nine), Choice(backend, "auto", "")) is None
    packed = prepack(single)
    assert run_fused(x, [packed.layer], [None], [packed.shape], CUDA, None, None) is None


def test_operators_refuse_gradients(rng: torch.Generator) -> None:
    up, down = (make_packed(64, 64, [8], generator=rng).to("meta") for _ in range(2))
    x = torch.empty(1, 64, device="meta", requires_grad=True)
    lists = [[t for layer in (up, down) for t in layer.operands[i]] for i in range(5)]
    around = (None, 0.0, 0.0, None)
    with pytest.raises(RuntimeError, match="littlebit2::mlp is not differentiable"):
        torch.ops.littlebit2.mlp(x, *lists, [None, None], [1, 1], 0, *around)
    with pytest.raises(RuntimeError, match="littlebit2::fused_linear is not differentiable"):
        torch.ops.littlebit2.fused_linear(x, *up.operands, [None], [1], *around)


def test_fakes_check_their_arguments(rng: torch.Generator) -> None:
    up, down = (make_packed(64, 64, [8], generator=rng).to("meta") for _ in range(2))
    with pytest.raises(RuntimeError, match=r"x\.size\(-1\) must equal 64"):
        whole_mlp(torch.empty(1, 63, device="meta"), [up, down])
    weight = torch.ones(64)  # elsewhere
    with pytest.raises(RuntimeError, match="must be on one device"):
        fused(torch.empty(1, 64, device="meta"), [up], RMSNorm(weight, 0.0), None)
