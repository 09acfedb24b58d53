"""The rotation of queries and keys: against float64 and transformers, gradients, compiled, bad input."""

from __future__ import annotations

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as by_neighbors
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as partly
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as by_halves

from littlebit2_kernels import rotary
from littlebit2_kernels._native import core
from littlebit2_kernels.ops import library

TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def problem(rng: torch.Generator, dtype: torch.dtype, *, b=2, h=6, g=2, m=5, d=24, r=24, rows=None):
    # As a projection leaves them.
    query = torch.randn(b, m, h, d, generator=rng).to(dtype).transpose(1, 2)
    key = torch.randn(b, m, g, d, generator=rng).to(dtype).transpose(1, 2)
    angles = torch.rand(rows or b, m, r // 2, generator=rng) * 6
    return query, key, angles


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [24, 10, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_against_float64_and_the_same_bits_everywhere(rng, interleaved, size, dtype):
    query, key, angles = problem(rng, dtype, r=size, rows=1)
    whole = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = whole.cos().to(dtype), whole.sin().to(dtype)
    results = []
    try:
        for isa in core().cpu_isas():
            core().set_cpu_isa(isa)
            results.append(rotary(query, key, cos, sin, interleaved=interleaved))
    finally:
        core().set_cpu_isa("auto")
    for x, *got in zip((query, key), *results, strict=True):
        a, b = (
            (slice(0, size, 2), slice(1, size, 2))
            if interleaved
            else (
                slice(0, size // 2),
                slice(size // 2, size),
            )
        )
        wanted = x.double()
        c, s = cos.double()[:, None], sin.double()[:, None]
        first, second = wanted[..., a].clone(), wanted[..., b].clone()
        wanted = wanted.clone()
        wanted[..., a] = first * c[..., a] - second * s[..., a]
        wanted[..., b] = second * c[..., b] + first * s[..., b]
        for y in got:
            assert y.dtype == dtype
            assert y.transpose(1, 2).is_contiguous()
            assert torch.equal(y, got[0])
            assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.mark.parametrize(("function", "interleaved"), [(by_halves, False), (by_neighbors, True)])
def test_the_layouts_of_transformers(rng, function, interleaved):
    query, key, angles = problem(rng, torch.float32)
    whole = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    for got, wanted in zip(
        rotary(query, key, whole.cos(), whole.sin(), interleaved=interleaved),
        function(query, key, whole.cos(), whole.sin()),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_a_part_of_a_row(rng):
    query, key, angles = problem(rng, torch.float32, r=16)
    # That function repeats the first half of the angles itself.
    whole = torch.cat([angles, angles], -1)
    wanted = partly(query, key, whole.cos(), whole.sin())
    used = angles.repeat_interleave(2, -1)
    for got, one in zip(rotary(query, key, used.cos(), used.sin(), interleaved=True), wanted, strict=True):
        torch.testing.assert_close(got, one, atol=1e-6, rtol=1e-6)


def test_two_threads(rng):
    query, key, angles = problem(rng, torch.float32, m=300)
    whole = torch.cat([angles, angles], -1)
    alone = rotary(query, key, whole.cos(), whole.sin())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = rotary(query, key, whole.cos(), whole.sin())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_operator_is_registered_whole(rng):
    library.load()
    query, key, angles = problem(rng, torch.float32, d=8, r=6)
    inputs = [one.detach().requires_grad_() for one in (query, key)]
    whole = torch.cat([angles, angles], -1)
    torch.library.opcheck(
        torch.ops.littlebit2.rotary.default, (*inputs, whole.cos().requires_grad_(), whole.sin(), True)
    )


def test_gradients(rng):
    query, key, angles = problem(rng, torch.float32)
    whole = torch.cat([angles, angles], -1)
    inputs = [one.detach().requires_grad_() for one in (query, key)]
    for index in (0, 1):
        grad = torch.randn(inputs[index].shape, generator=rng)
        got = torch.autograd.grad(rotary(*inputs, whole.cos(), whole.sin())[index], inputs[index], grad)
        wanted = torch.autograd.grad(by_halves(*inputs, whole.cos(), whole.sin())[index], inputs[index], grad)
        torch.testing.assert_close(got[0], wanted[0], atol=1e-6, rtol=1e-6)


def test_forward_mode(rng):
    query, key, angles = problem(rng, torch.float32)
    whole = torch.cat([angles, angles], -1)
    # The rotation is linear.
    _, tangent = torch.func.jvp(lambda q: rotary(q, key, whole.cos(), whole.sin())[0], (query,), (query,))
    torch.testing.assert_close(tangent, rotary(query, key, whole.cos(), whole.sin())[0])


def test_compiled(rng):
    query, key, angles = problem(rng, torch.float32)
    whole = torch.cat([angles, angles], -1)
    run = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    wanted = rotary(query, key, whole.cos(), whole.sin())
    got = run(query, key, whole.cos(), whole.sin())
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 6, 8)}, "query must have four dimensions"),
        ({"key": torch.zeros(2, 2, 5, 8, dtype=torch.float16)}, "key must be Float like query, got Half"),
        ({"key": torch.zeros(2, 2, 4, 8)}, r"key must have shape \[2, kv_heads, 5, 8\]"),
        ({"cos": torch.zeros(3, 5, 8)}, r"cos must have shape \[1 or 2, 5, rotary size\]"),
        ({"sin": torch.zeros(2, 5, 6)}, "sin must have 8 elements in a row like cos"),
        ({"sin": torch.zeros(2, 5, 8, dtype=torch.float16)}, "sin must be Float like cos, got Half"),
        ({"cos": torch.zeros(2, 5, 10), "sin": torch.zeros(2, 5, 10)}, "rotary_size must be between 2 and 8"),
        ({"cos": torch.zeros(2, 5, 7), "sin": torch.zeros(2, 5, 7)}, "rotary_size must be even, got 7"),
    ],
)
def test_refused(change, message):
    arguments = {"query": torch.zeros(2, 6, 5, 8), "key": torch.zeros(2, 2, 5, 8)}
    arguments |= {"cos": torch.zeros(2, 5, 8), "sin": torch.zeros(2, 5, 8), **change}
    with pytest.raises(RuntimeError, match=message):
        rotary(**arguments)
