"""Rotation, cache and attention in one call: the bits of the calls apart, float64, compiled, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from littlebit2_kernels import attention, attention_step, rotary
from littlebit2_kernels._native import core
from littlebit2_kernels.ops import library

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 1e-2}
#: B, H, G, M, T, D, E, R
SHAPES = [
    (1, 4, 4, 1, 300, 64, 64, 64),
    (2, 8, 2, 1, 40, 128, 128, 128),
    (1, 7, 1, 3, 17, 80, 24, 32),
    (3, 6, 3, 9, 129, 96, 130, 24),
    (2, 4, 1, 1, 128, 256, 256, 256),
]


class Problem:
    """Tensors as a projection leaves them, and a cache that is a view of a larger buffer."""

    def __init__(self, rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        b, h, g, m, t, d, e, r = shape

        def rows(heads: int, size: int) -> torch.Tensor:
            return torch.randn(b, m, heads, size, generator=rng).to(dtype).transpose(1, 2)

        self.new = rows(h, d), rows(g, d), rows(g, e)
        angles = 6 * torch.rand(b, m, r // 2, generator=rng).repeat(1, 1, 2)
        self.angles = angles.cos().to(dtype), angles.sin().to(dtype)
        self.buffers = tuple(torch.randn(b, g, t + 9, size, generator=rng).to(dtype) for size in (d, e))
        self.keys = t

    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the cache, ``[B, G, T, D]`` and ``[B, G, T, E]``, with other rows around it."""
        keys, values = (buffer.clone() for buffer in self.buffers)
        return keys[:, :, 4 : self.keys + 4], values[:, :, : self.keys]

    def apart(self, place: int, interleaved: bool = False, **settings: Any) -> tuple[torch.Tensor, ...]:
        """The result and the cache of the calls one after another."""
        query, new_key, new_value = self.new
        tokens = query.shape[2]
        keys, values = self.cache()
        query, new_key = rotary(query, new_key, *self.angles, interleaved=interleaved)
        keys[:, :, place : place + tokens] = new_key
        values[:, :, place : place + tokens] = new_value
        return attention(query, keys, values, **settings), keys, values


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["plain", "causal", "padded", "biased", "neighbors", "static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_the_calls_apart_everywhere(
    rng: torch.Generator, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> None:
    problem = Problem(rng, shape, dtype)
    b, h, _, m, t = shape[:5]
    place, settings, more = t - m, {}, {}
    if kind == "causal":
        settings = {"causal": True, "window": 5, "softcap": 2.0}
    elif kind == "padded":
        mask = torch.rand(b, 1, 1, t, generator=rng) > 0.5
        mask[..., -1] = True
        settings = {"mask": mask}
    elif kind == "biased":
        settings = {"mask": torch.randn(1, h, m, t, generator=rng).to(dtype), "scale": 0.2}
    elif kind == "neighbors":
        more = {"interleaved": True}
    elif kind == "static":
        place = (t - m) // 2
        mask = torch.arange(t).expand(1, 1, m, t) <= place + torch.arange(m)[:, None]
        settings, more = {"mask": mask}, {"position": torch.tensor(place)}
    wanted = problem.apart(place, kind == "neighbors", **settings)
    before = torch.get_num_threads()
    try:
        for isa in core().cpu_isas():
            core().set_cpu_isa(isa)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                keys, values = problem.cache()
                y = attention_step(*problem.new, *problem.angles, keys, values, **settings, **more)
                assert y.transpose(1, 2).is_contiguous()
                for got, one in zip((y, keys, values), wanted, strict=True):
                    assert got.dtype == dtype
                    assert torch.equal(got, one)
    finally:
        core().set_cpu_isa("auto")
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem(rng, shape, dtype)
    m, size = shape[3], shape[7]

    def turned(x: torch.Tensor) -> torch.Tensor:
        cos, sin = (one.double()[:, None] for one in problem.angles)
        part = x.double()[..., :size]
        partner = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
        return torch.cat((part * cos + partner * sin, x.double()[..., size:]), -1)

    query, new_key, new_value = problem.new
    keys, values = (one.double() for one in problem.cache())
    keys[:, :, -m:], values[:, :, -m:] = turned(new_key), new_value.double()
    groups = shape[1] // shape[2]
    scores = turned(query) @ keys.repeat_interleave(groups, 1).transpose(2, 3) * shape[5] ** -0.5
    wanted = scores.softmax(-1) @ values.repeat_interleave(groups, 1)
    y = attention_step(*problem.new, *problem.angles, *problem.cache())
    assert (y.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_rows_around_the_new_ones_stay(rng: torch.Generator) -> None:
    problem = Problem(rng, (2, 4, 2, 3, 40, 16, 24, 8), torch.bfloat16)
    keys, values = (buffer.clone() for buffer in problem.buffers)
    views = keys[:, :, 4:44], values[:, :, :40]
    attention_step(*problem.new, *problem.angles, *views, position=torch.tensor([11]))
    for after, before, start in zip((keys, values), problem.buffers, (15, 11), strict=True):
        changed = (after != before).any(-1).any(1).any(0).nonzero().flatten().tolist()
        assert changed == [start, start + 1, start + 2]


def test_new_rows_that_are_not_contiguous(rng: torch.Generator) -> None:
    problem = Problem(rng, (1, 4, 2, 1, 20, 16, 16, 16), torch.float32)
    wanted = problem.apart(19)
    new = [one.transpose(2, 3).contiguous().transpose(2, 3).expand(1, -1, 1, 16) for one in problem.new]
    strided = [torch.stack((one, one), -1)[..., 0] for one in new]
    assert all(one.stride(3) == 2 for one in strided)
    y = attention_step(*strided, *problem.angles, *problem.cache())
    assert torch.equal(y, wanted[0])


def test_no_sequences(rng: torch.Generator) -> None:
    problem = Problem(rng, (0, 4, 2, 1, 20, 16, 16, 16), torch.float32)
    assert attention_step(*problem.new, *problem.angles, *problem.cache()).shape == (0, 4, 1, 16)


def test_operator_is_registered_whole(rng: torch.Generator) -> None:
    """Its schema says that it writes into the cache and into nothing else."""
    library.load()
    operator = torch.ops.littlebit2.attention_step.default
    written = [one.name for one in operator._schema.arguments if one.alias_info and one.alias_info.is_write]
    assert written == ["key", "value"]
    problem = Problem(rng, (2, 4, 2, 1, 9, 8, 8, 8), torch.float32)
    mask = torch.randn(1, 4, 1, 9, generator=rng)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*problem.new, *problem.angles, *problem.cache(), torch.tensor(5), mask, 0.3, 2.0)
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_compiled(rng: torch.Generator) -> None:
    problem = Problem(rng, (1, 4, 2, 1, 20, 8, 8, 8), torch.float32)
    wanted = problem.apart(19)
    keys, values = problem.cache()
    run = torch.compile(attention_step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = run(*problem.new, *problem.angles, keys, values)
    assert all(map(torch.equal, (y, keys, values), wanted))


def test_exported(rng: torch.Generator) -> None:
    problem = Problem(rng, (1, 4, 2, 1, 20, 8, 8, 8), torch.float32)
    mask = torch.arange(20).view(1, 1, 1, 20) < 13
    wanted = problem.apart(12, mask=mask)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = (torch.nn.Buffer(one.clone()) for one in problem.cache())

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            *new, place, hidden = given
            return attention_step(*new, self.keys, self.values, position=place, mask=hidden)

    given = (*problem.new, *problem.angles, torch.tensor(12), mask)
    with torch.no_grad():
        program = torch.export.export(Step(), given).module()
        y = program(*given)
    assert all(map(torch.equal, (y, program.keys, program.values), wanted))


def test_tensors_that_need_a_gradient_are_refused(rng: torch.Generator) -> None:
    problem = Problem(rng, (1, 4, 2, 1, 20, 8, 8, 8), torch.float32)
    query, *rest = problem.new
    given = (query.requires_grad_(), *rest, *problem.angles, *problem.cache())
    with pytest.raises(RuntimeError, match="attention_step has no gradient"):
        attention_step(*given)
    with torch.no_grad():
        assert torch.equal(attention_step(*given), problem.apart(19)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 8)}, "query must have four dimensions"),
        ({"query": torch.zeros(1, 4, 1, 8, dtype=torch.bool)}, "query must be float32, .* got Bool"),
        ({"query": torch.zeros(1, 3, 1, 8)}, "heads must be a multiple of kv_heads = 2, got 3"),
        ({"new_key": torch.zeros(1, 2, 2, 8)}, r"new_key must have shape \[1, kv_heads, 1, 8\]"),
        ({"new_value": torch.zeros(1, 1, 1, 8)}, r"new_value must have shape \[1, 2, 1, value_size\]"),
        ({"new_value": torch.zeros(1, 2, 1, 8).half()}, "new_value must be Float like query, got Half"),
        ({"key": torch.zeros(1, 2, 5, 9)}, r"key must have shape \[1, 2, keys, 8\]"),
        ({"key": torch.zeros(1, 2, 5, 8).half()}, "key must be Float like query, got Half"),
        (
            {"key": torch.zeros(1, 2, 8, 5).transpose(2, 3)},
            "key must have contiguous rows, got a stride of 5",
        ),
        ({"value": torch.zeros(1, 2, 6, 8)}, r"value must have shape \[1, 2, 5, 8\]"),
        ({"value": torch.zeros(1, 2, 5, 7)}, r"value must have shape \[1, 2, 5, 8\]"),
        ({"cos": torch.zeros(1, 2, 8)}, r"cos must have shape \[1 or 1, 1, rotary size\]"),
        ({"sin": torch.zeros(1, 1, 6)}, "sin must have 8 elements in a row like cos"),
        ({"cos": torch.zeros(1, 1, 7), "sin": torch.zeros(1, 1, 7)}, "rotary_size must be even, got 7"),
        ({"mask": torch.zeros(1, 1, 1, 4)}, r"mask must have shape \[1, 4, 1, 5\]"),
        ({"position": torch.tensor(5)}, "position must be between 0 and 4, got 5"),
        ({"position": torch.tensor(1.0)}, "position must be one int64 on the CPU, got Float"),
        ({"position": torch.tensor([1, 2])}, r"position must be one int64 on the CPU, got Long \[2\]"),
    ],
)
def test_refused_tensors(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "query": torch.zeros(1, 4, 1, 8),
        **{name: torch.zeros(1, 2, 1, 8) for name in ("new_key", "new_value")},
        **{name: torch.zeros(1, 1, 8) for name in ("cos", "sin")},
        **{name: torch.zeros(1, 2, 5, 8) for name in ("key", "value")},
        **change,
    }
    with pytest.raises(RuntimeError, match=re.compile(message)):
        attention_step(**arguments)


def test_refused_settings() -> None:
    query, rows, angles, cache = (torch.zeros(1, 2, *size) for size in ((1, 8), (1, 8), (8,), (5, 8)))
    given = (query, rows, rows, angles[:, :1], angles[:, :1], cache, cache.clone())
    with pytest.raises(ValueError, match=r"softcap must be positive, got 0.0"):
        attention_step(*given, softcap=0.0)
    with pytest.raises(ValueError, match="window must be at least 1, in a causal call"):
        attention_step(*given, window=3)
