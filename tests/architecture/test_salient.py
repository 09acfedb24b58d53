"""``SalientLinear``: a packed layer and dense columns beside it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import littlebit2
from littlebit2.architecture.salient import SalientLinear
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.testing import TOLERANCE, make_packed

K, N = 40, 24


@pytest.fixture
def layer(rng: torch.Generator) -> SalientLinear:
    packed = LittleBitLinear.from_packed(make_packed(K, N, (16,), bias=True, generator=rng))
    index = torch.randperm(K, generator=rng)[:5]
    return SalientLinear(packed, index, torch.randn(N, 5, generator=rng))


def expected(layer: SalientLinear, x: torch.Tensor) -> torch.Tensor:
    """In float64, column by column."""
    weight = layer.linear.dequantize(torch.float64)
    for place, column in enumerate(layer.salient_idx.tolist()):
        weight[:, column] += layer.salient_weight[:, place].double()
    bias = layer.bias
    assert bias is not None
    return x.double() @ weight.T + bias


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,), (0,), (2, 0), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(
    layer: SalientLinear, rng: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, K, generator=rng).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (*shape, N)
    if y.numel():
        wanted = expected(layer, x)
        assert float((y.double() - wanted).abs().max() / wanted.abs().max()) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dequantize(layer: SalientLinear, dtype: torch.dtype) -> None:
    weight = layer.dequantize(dtype)
    assert weight.dtype == dtype
    eye = torch.eye(K, dtype=torch.float64)
    bias = layer.bias
    assert bias is not None
    torch.testing.assert_close(weight.double(), (expected(layer, eye) - bias).T, rtol=0.01, atol=1e-2)
    if dtype == torch.float64:
        torch.testing.assert_close(weight, (expected(layer, eye) - bias).T)


def test_state_and_copies(layer: SalientLinear, rng: torch.Generator) -> None:
    x = torch.randn(3, K, generator=rng)
    y = layer(x)
    state = layer.state_dict()
    assert {"salient_idx", "salient_weight", "linear.V_packed", "linear.bias"} <= set(state)
    other = SalientLinear(LittleBitLinear(K, N, (16,), True), torch.arange(5), torch.zeros(N, 5))
    other.load_state_dict(state)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for copied in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(x), y)
        assert torch.equal(copied.dequantize(), layer.dequantize())
    half = copy.deepcopy(layer).half()
    assert half.salient_weight.dtype == torch.float16
    assert half.linear.u1.dtype == torch.float32
    assert half.nbytes == layer.nbytes - 2 * layer.salient_weight.numel()
    assert "salient=5" in repr(layer)


def test_gradient_of_the_input(layer: SalientLinear, rng: torch.Generator) -> None:
    x = torch.randn(3, K, generator=rng, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(got, layer.dequantize().sum(0).expand(3, K), rtol=1e-4, atol=1e-4)


def test_compiled_and_under_autocast(layer: SalientLinear, rng: torch.Generator) -> None:
    x = torch.randn(3, K, generator=rng)
    y = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.2)


def test_such_a_layer_is_fused_with_no_other(layer: SalientLinear, rng: torch.Generator) -> None:
    model = nn.Module()
    model.q_proj = layer
    for name in ("k_proj", "v_proj"):
        packed = make_packed(K, N, (16,), generator=rng)
        setattr(model, name, LittleBitLinear.from_packed(packed))
    (group,) = littlebit2.fuse_projections(model, on_cpu=True).groups
    assert group.members == (model.k_proj, model.v_proj)


@pytest.mark.parametrize(
    ("index", "weight", "error", "message"),
    [
        (torch.tensor([1, 1]), torch.zeros(N, 2), ValueError, "salient_idx must hold different columns"),
        (torch.tensor([1, K]), torch.zeros(N, 2), ValueError, f"from 0 to {K - 1}"),
        (torch.tensor([1, 2]), torch.zeros(N, 3), ValueError, rf"salient_weight must have shape \[{N}, 2\]"),
        (torch.tensor([1.0]), torch.zeros(N, 1), TypeError, "salient_idx must be int32 or int64"),
        (torch.tensor([1]), torch.zeros(N, 1, dtype=torch.int8), TypeError, "salient_weight must be float32"),
    ],
)
def test_malformed(index: Any, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SalientLinear(LittleBitLinear(K, N, (16,)), index, weight)
    with pytest.raises(TypeError, match="linear must be a LittleBitLinear, got Linear"):
        SalientLinear(nn.Linear(K, N), torch.tensor([1]), torch.zeros(N, 1))  # type: ignore[arg-type]


def test_no_columns_change_nothing(layer: SalientLinear, rng: torch.Generator) -> None:
    bare = SalientLinear(layer.linear, torch.empty(0, dtype=torch.int32), torch.empty(N, 0))
    x = torch.randn(3, K, generator=rng)
    assert torch.equal(bare(x), layer.linear(x))
    assert torch.equal(bare.dequantize(), layer.linear.dequantize())
