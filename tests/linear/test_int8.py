"""Dense int8 rows: rounding, the native kernel on every instruction set, modules."""

from __future__ import annotations

import copy

import pytest
import torch

from littlebit2_kernels import Int8Embedding, Int8Linear
from littlebit2_kernels._native import core
from littlebit2_kernels.int8.rounding import dequantize_rows, quantize_rows
from littlebit2_kernels.ops import calls, library
from littlebit2_kernels.ops.int8 import dequantized_linear

ISAS = core().cpu_isas()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
SHAPES = [(0, 32, 5), (1, 1, 1), (1, 4096, 129), (2, 1000, 257), (5, 77, 16), (7, 1029, 30), (33, 64, 15)]


def problem(rng: torch.Generator, m: int, k: int, n: int, dtype: torch.dtype):
    x = torch.randn(m, k, generator=rng).to(dtype)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    scale = torch.rand(n, generator=rng) / 100
    bias = torch.randn(n, generator=rng)
    return x, weight, scale, bias


def expected(x, weight, scale, bias):
    return (x.double() @ weight.double().T) * scale.double() + bias.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_against_float64_and_the_same_bits_everywhere(rng, m, k, n, dtype):
    library.load()
    x, weight, scale, bias = problem(rng, m, k, n, dtype)
    wanted = expected(x, weight, scale, bias)
    before = core().cpu_isa()
    results = []
    try:
        for isa in ISAS:
            core().set_cpu_isa(isa)
            results.append(torch.ops.littlebit2.int8_linear(x, weight, scale, bias))
    finally:
        core().set_cpu_isa("auto")
    assert core().cpu_isa() == before
    for y in results:
        assert y.dtype == dtype
        assert y.shape == (m, n)
        assert torch.equal(y, results[0])
        if m:
            assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(rng, dtype):
    library.load()
    x, weight, scale, _ = problem(rng, 19, 300, 70, dtype)
    batch = torch.ops.littlebit2.int8_linear(x, weight, scale)
    alone = torch.cat([torch.ops.littlebit2.int8_linear(row, weight, scale) for row in x.split(1)])
    assert torch.equal(batch, alone)


def test_strided_operands(rng):
    library.load()
    x, weight, scale, bias = problem(rng, 6, 50, 40, torch.float32)
    wide = torch.zeros(40, 64, dtype=torch.int8)
    wide[:, 3:53] = weight
    spread = torch.zeros(3, 2, 60)
    spread[..., 5:55] = x.view(3, 2, 50)
    y = torch.ops.littlebit2.int8_linear(spread[..., 5:55], wide[:, 3:53], scale, bias)
    assert torch.equal(y.view(6, 40), torch.ops.littlebit2.int8_linear(x, weight, scale, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, s, b: (x[:, :-1], w, s, b), r"x.size\(-1\) must equal 50"),
        (lambda x, w, s, b: (x, w.float(), s, b), "weight must be int8"),
        (lambda x, w, s, b: (x, w[0], s, b), "weight must be int8"),
        (lambda x, w, s, b: (x, w, s[:-1], b), r"scale must have shape \[40\]"),
        (lambda x, w, s, b: (x, w, s.double(), b), "scale must be float32"),
        (lambda x, w, s, b: (x, w, s, b[1:]), r"bias must have shape \[40\]"),
        (lambda x, w, s, b: (x.double(), w, s, b), "x must be float32, float16 or bfloat16"),
    ],
)
def test_refused(rng, change, message):
    library.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.int8_linear(*change(*problem(rng, 2, 50, 40, torch.float32)))


def test_operator_is_registered_whole(rng):
    library.load()
    x, weight, scale, bias = problem(rng, 3, 40, 24, torch.float32)
    torch.library.opcheck(
        torch.ops.littlebit2.int8_linear.default, (x.requires_grad_(), weight, scale, bias.requires_grad_())
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_many_tokens_are_dequantized(rng, tokens, dtype):
    x, weight, scale, bias = problem(rng, tokens, 96, 5000, dtype)
    wanted = expected(x, weight, scale, bias)
    for y in (calls.int8_linear(x, weight, scale, bias), dequantized_linear(x, weight, scale, bias)):
        assert y.shape == (tokens, 5000)
        assert y.dtype == dtype
        assert (y.double() - wanted).norm() <= 2 * TOLERANCE[dtype] * wanted.norm()


def test_gradients(rng):
    x, weight, scale, bias = problem(rng, 4, 30, 20, torch.float32)
    layer = Int8Linear.from_rows(weight, scale, bias)
    dense = torch.nn.Linear(30, 20)
    with torch.no_grad():
        dense.weight.copy_(layer.dequantize())
        dense.bias.copy_(bias)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    dense(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rounding(rng, dtype):
    weight = torch.randn(1500, 33, generator=rng).to(dtype)
    weight[7] = 0
    rounded, scale = quantize_rows(weight)
    assert rounded.dtype == torch.int8
    assert int(rounded.abs().max()) == 127
    assert scale[7] == 0
    back = dequantize_rows(rounded, scale)
    assert bool(((back - weight.float()).abs() <= scale[:, None] * 0.5001).all())


def test_rounding_refuses(rng):
    weight = torch.randn(1030, 4, generator=rng)
    weight[1026, 1] = float("inf")
    with pytest.raises(ValueError, match="row 1026"):
        quantize_rows(weight)
    with pytest.raises(TypeError, match="floating-point matrix"):
        quantize_rows(torch.ones(3, 3, dtype=torch.int32))


def test_modules_keep_their_scales_and_follow_dtypes(rng):
    weight = torch.randn(50, 16, generator=rng)
    rounded, scale = quantize_rows(weight)
    linear, embedding = Int8Linear.from_rows(rounded, scale), Int8Embedding.from_rows(rounded, scale)
    model = torch.nn.ModuleList([linear, embedding]).to(torch.bfloat16)
    assert linear.weight_scale.dtype == torch.float32
    assert embedding.dtype == torch.bfloat16
    ids = torch.tensor([[3, 49], [0, 7]])
    torch.testing.assert_close(embedding(ids), dequantize_rows(rounded, scale)[ids].bfloat16())
    assert embedding.float()(ids).dtype == torch.float32
    twin = copy.deepcopy(model)
    assert set(twin.state_dict()) == {f"{i}.{leaf}" for i in "01" for leaf in ("weight_int8", "weight_scale")}
    x = torch.randn(3, 16, generator=rng)
    assert torch.equal(twin[0](x), linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="x must be float32"):
        linear(x.double())
    with pytest.raises(ValueError, match="must equal K=16"):
        linear(x[:, 1:])


def test_compiled(rng):
    rounded, scale = quantize_rows(torch.randn(70, 24, generator=rng))
    model = torch.nn.Sequential(Int8Embedding.from_rows(rounded, scale), Int8Linear.from_rows(rounded, scale))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (2, 5, 90):
        ids = torch.randint(0, 70, (length,), generator=rng)
        torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-4, atol=1e-4)
