"""Attention of few queries: against float64, the same bits everywhere, gradients, compiled, bad input."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels import attention
from littlebit2_kernels._native import core
from littlebit2_kernels.ops import library
from littlebit2_kernels.ops.attention import attention_by_torch

ISAS = core().cpu_isas()
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
#: B, H, G, M, T, D, E
SHAPES = [
    (1, 4, 4, 1, 300, 64, 64),
    (2, 8, 2, 1, 129, 128, 128),
    (1, 7, 1, 3, 17, 80, 24),
    (3, 6, 3, 9, 128, 7, 130),
]


def problem(rng: torch.Generator, shape, dtype: torch.dtype):
    b, h, g, m, t, d, e = shape
    # As a projection leaves queries, and keys and values in a buffer with room to spare.
    query = torch.randn(b, m, h, d, generator=rng).to(dtype).transpose(1, 2)
    key = torch.randn(b, g, t + 9, d, generator=rng).to(dtype)[:, :, 4 : t + 4]
    value = torch.randn(b, g, t + 5, e, generator=rng).to(dtype)[:, :, :t]
    return query, key, value


def expected(query, key, value, *, mask=None, scale=None, softcap=None, causal=False, window=None):
    query, key, value = (one.double() for one in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        m, t = scores.shape[2:]
        last = torch.arange(m)[:, None] + t - m
        hidden = (torch.arange(t) > last) | (torch.arange(t) <= last - (window or t + m))
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value.repeat_interleave(groups, 1)


def settings_of(rng: torch.Generator, kind: str, query: torch.Tensor, keys: int):
    """Keyword arguments of a call, and whether some queries see nothing."""
    b, h, m, _ = query.shape
    if kind == "plain":
        return {}
    if kind == "causal":
        return {"causal": True, "scale": 0.3}
    if kind == "window":
        return {"causal": True, "window": 5, "softcap": 2.0}
    if kind == "padded":
        mask = torch.rand(b, 1, 1, keys, generator=rng) > 0.5
        mask[0] = False
        return {"mask": mask}
    added = torch.randn(1, h, m, keys, generator=rng).to(query.dtype)
    return {"mask": added, "softcap": 3.0}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "padded", "biased"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64_and_the_same_bits_everywhere(rng, shape, kind, dtype):
    query, key, value = problem(rng, shape, dtype)
    settings = settings_of(rng, kind, query, key.shape[2])
    wanted = expected(query, key, value, **settings)
    results = []
    try:
        for isa in ISAS:
            core().set_cpu_isa(isa)
            results.append(attention(query, key, value, **settings))
    finally:
        core().set_cpu_isa("auto")
    for y in results:
        assert y.dtype == dtype
        assert y.shape == wanted.shape
        assert torch.equal(y, results[0])
        assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    if kind == "padded":
        assert not results[0][0].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_query_has_the_same_bits_alone_in_a_batch_and_on_two_threads(rng, dtype):
    query, key, value = problem(rng, (3, 8, 2, 8, 700, 64, 64), dtype)
    mask = torch.rand(3, 1, 8, 700, generator=rng) > 0.3
    mask[1, :, :5, :400] = False
    together = attention(query, key, value, mask=mask)
    alone = torch.cat(
        [
            torch.cat(
                [
                    attention(
                        query[b : b + 1, :, m : m + 1],
                        key[b : b + 1],
                        value[b : b + 1],
                        mask=mask[b : b + 1, :, m : m + 1],
                    )
                    for m in range(8)
                ],
                2,
            )
            for b in range(3)
        ]
    )
    assert torch.equal(together, alone)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(attention(query, key, value, mask=mask), together)
    finally:
        torch.set_num_threads(before)


def test_hidden_keys_are_not_read(rng):
    query, key, value = problem(rng, (1, 4, 2, 1, 300, 64, 64), torch.float32)
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 140:150] = True
    wanted = attention(query, key, value, mask=mask)
    key[:, :, 160:] = value[:, :, 160:] = torch.nan
    key[:, :, :128] = value[:, :, :128] = torch.nan
    assert torch.equal(attention(query, key, value, mask=mask), wanted)


def test_not_a_number_is_not_lost(rng):
    query, key, value = problem(rng, (1, 2, 2, 1, 200, 16, 16), torch.float32)
    key[0, 0] = torch.nan
    y = attention(query, key, value)
    assert y[0, 0].isnan().all()
    assert y[0, 1].isfinite().all()


def test_rows_that_are_not_contiguous_are_copied(rng):
    query, key, value = problem(rng, (2, 4, 2, 1, 40, 16, 16), torch.float32)
    wanted = attention(query, key, value)
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert turned.stride(3) != 1
    mask = torch.zeros(40, 2, 1, 1).permute(1, 2, 3, 0)
    assert torch.equal(attention(query, turned, value, mask=mask), wanted)


def test_operator_is_registered_whole(rng):
    library.load()
    query, key, value = problem(rng, (2, 4, 2, 2, 9, 8, 8), torch.float32)
    inputs = [one.detach().requires_grad_() for one in (query, key, value)]
    mask = torch.randn(1, 4, 2, 9, generator=rng)
    torch.library.opcheck(torch.ops.littlebit2.attention.default, (*inputs, mask, 0.3, 2.0, True, 4))


def test_gradients(rng):
    query, key, value = problem(rng, (1, 4, 2, 3, 6, 4, 5), torch.float32)
    inputs = [one.detach().clone().requires_grad_() for one in (query, key, value)]
    mask = torch.randn(1, 4, 3, 6, generator=rng).requires_grad_()
    grad = torch.randn(1, 4, 3, 5, generator=rng)
    settings = {"mask": mask, "softcap": 2.0, "causal": True}
    got = torch.autograd.grad(attention(*inputs, **settings), (*inputs, mask), grad)
    wanted = torch.autograd.grad(expected(*inputs, **settings), (*inputs, mask), grad.double())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_forward_mode(rng):
    query, key, value = problem(rng, (1, 2, 2, 1, 6, 4, 4), torch.float32)
    tangent = torch.randn(query.shape, generator=rng)
    _, got = torch.func.jvp(lambda q: attention(q, key, value), (query,), (tangent,))
    step = 1e-5
    wanted = (expected(query + step * tangent, key, value) - expected(query - step * tangent, key, value)) / (
        2 * step
    )
    torch.testing.assert_close(got.double(), wanted, atol=2e-2, rtol=2e-2)


def test_compiled(rng):
    query, key, value = problem(rng, (1, 4, 2, 1, 20, 8, 8), torch.float32)
    run = torch.compile(lambda q, k, v: attention(q, k, v, softcap=2.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(query, key, value), attention(query, key, value, softcap=2.0))


def test_the_composition_is_the_same(rng):
    query, key, value = problem(rng, (2, 4, 2, 3, 11, 8, 6), torch.float32)
    mask = torch.rand(2, 1, 3, 11, generator=rng) > 0.4
    y = attention_by_torch(query, key, value, mask, 0.5, 2.0, True, 6).transpose(1, 2)
    torch.testing.assert_close(
        y, attention(query, key, value, mask=mask, scale=0.5, softcap=2.0, causal=True, window=6)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 8)}, "query must have four dimensions"),
        (
            {"query": torch.zeros(1, 4, 1, 8, dtype=torch.float64)},
            "query must be float32, float16 or bfloat16",
        ),
        ({"key": torch.zeros(1, 2, 5, 8, dtype=torch.float16)}, "key must be Float like query, got Half"),
        ({"key": torch.zeros(1, 2, 5, 9)}, r"key must have shape \[1, kv_heads, keys, 8\]"),
        ({"value": torch.zeros(1, 2, 6, 8)}, r"value must have shape \[1, 2, 5, value_size\]"),
        ({"query": torch.zeros(1, 3, 1, 8)}, "heads must be a multiple of kv_heads = 2, got 3"),
        ({"mask": torch.zeros(1, 1, 1, 4)}, r"mask must have shape \[1, 4, 1, 5\]"),
        ({"mask": torch.zeros(1, 1, 1, 5, dtype=torch.int64)}, "mask must be .*, got Long"),
        ({"key": torch.zeros(1, 2, 0, 8), "value": torch.zeros(1, 2, 0, 8)}, "keys must be between 1"),
    ],
)
def test_refused_tensors(change, message):
    tensors = {"query": torch.zeros(1, 4, 1, 8), "key": torch.zeros(1, 2, 5, 8)}
    arguments = {**tensors, "value": torch.zeros(1, 2, 5, 8), **change}
    with pytest.raises(RuntimeError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"window": 3}, "window must be at least 1, in a causal call"),
        ({"window": 0, "causal": True}, "window must be at least 1"),
    ],
)
def test_refused_settings(settings, message):
    x = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, **settings)


def test_heads_without_elements_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"query must have elements in its last dimension, got \[1, 1, 1, 0\]"
    ):
        attention(torch.zeros(1, 1, 1, 0), torch.zeros(1, 1, 2, 0), torch.zeros(1, 1, 2, 4))
