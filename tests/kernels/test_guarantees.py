"""What results may not depend on, and how special values pass through."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from littlebit2_kernels import PackedLinear, PackedPath, littlebit_linear
from littlebit2_kernels._native import core
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import make_problem, relative_error


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_result_does_not_depend_on_the_batch(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(103, 1500, 130, [72, 16], bias=True, generator=rng)
    together = littlebit_linear(x, packed, "cpu")
    for tokens in (1, 2, 3, 5, 6, 7, 24, 50):
        assert torch.equal(littlebit_linear(x[:tokens], packed, "cpu"), together[:tokens]), f"{tokens} tokens"
    assert torch.equal(littlebit_linear(x[102:], packed, "cpu"), together[102:])


@pytest.mark.usefixtures("threads")
def test_result_does_not_depend_on_threads(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(9, 3000, 1500, [256, 64], generator=rng)
    x.requires_grad_()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = littlebit_linear(x, packed, "cpu")
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_sharing_a_first_stage_changes_no_bit(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(4, 200, 90, [40, 40], share_v=True, generator=rng)
    first, second = packed.paths
    copied = PackedPath(
        second.v.clone(), second.in_scale.clone(), second.out_scale, second.u, second.latent_scale
    )
    assert torch.equal(
        littlebit_linear(x, packed, "cpu"), littlebit_linear(x, PackedLinear((first, copied)), "cpu")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(isa: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    x, packed = make_problem(5, 300, 70, [32], dtype=dtype, generator=rng)
    path = packed.paths[0]
    assert path.latent_scale is not None
    factor = 2.0**60  # a power of two: the products stay exact
    scaled = PackedLinear(
        (
            PackedPath(
                path.v,
                path.in_scale / factor,
                path.out_scale / factor,
                path.u,
                path.latent_scale * factor * factor,
            ),
        )
    )
    assert torch.equal(littlebit_linear(x, scaled, "cpu"), littlebit_linear(x, packed, "cpu"))


def test_overflow_becomes_infinity_in_float16(isa: str) -> None:
    packed = PackedLinear(
        (
            PackedPath(
                v=torch.zeros(2, 1, dtype=torch.int32),
                in_scale=torch.ones(4),
                out_scale=torch.tensor([1.0, -1e6]),
            ),
        )
    )
    y = littlebit_linear(torch.ones(1, 4, dtype=torch.float16), packed, "cpu")
    assert y.tolist() == [[4.0, -float("inf")]]


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_stay_in_their_token(isa: str, special: float, rng: torch.Generator) -> None:
    x, packed = make_problem(7, 130, 40, [24], generator=rng)
    spoilt = x.clone()
    spoilt[3, 5] = special
    y, clean = littlebit_linear(spoilt, packed, "cpu"), littlebit_linear(x, packed, "cpu")
    assert not torch.isfinite(y[3]).any()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_and_rounded_exactly(isa: str, dtype: torch.dtype) -> None:
    """A layer that is the identity on one channel must give back all 2^16 bit patterns, NaN made quiet."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(-1, 1)
    packed = PackedLinear(
        (PackedPath(v=torch.zeros(1, 1, dtype=torch.int32), in_scale=torch.ones(1), out_scale=torch.ones(1)),)
    )
    y = littlebit_linear(values, packed, "cpu")
    quiet = 0x0200 if dtype == torch.float16 else 0x0040
    expected = torch.where(values.isnan(), values.view(torch.int16) | quiet, values.view(torch.int16))
    expected[values == 0] = 0  # -0.0 meets the +0.0 of the other lanes
    assert torch.equal(y.view(torch.int16), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_is_rounded_to_nearest_even(isa: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """float32 values of every magnitude, ties included, leave as PyTorch's own conversion makes them."""
    bits = torch.randint(-(2**31), 2**31, (40000,), generator=rng, dtype=torch.int64).to(torch.int32)
    ties = (bits & -8192) | torch.randint(0, 2, bits.shape, generator=rng, dtype=torch.int32) << 12
    wanted = torch.cat([bits, ties]).view(torch.float32)
    wanted = wanted[torch.isfinite(wanted)]
    ones = torch.zeros(wanted.numel(), 1, dtype=torch.int32)
    packed = PackedLinear((PackedPath(v=ones, in_scale=torch.ones(1), out_scale=wanted),))
    y = littlebit_linear(torch.ones(1, 1, dtype=dtype), packed, "cpu")
    assert torch.equal(y[0], wanted.to(dtype))


def test_pitched_words(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(3, 70, 50, [40], generator=rng)
    path = packed.paths[0]
    assert path.u is not None
    pitched = PackedLinear(
        (
            PackedPath(
                torch.nn.functional.pad(path.v, (0, 1), value=-1)[:, :3],
                path.in_scale,
                path.out_scale,
                torch.nn.functional.pad(path.u, (0, 2), value=-1)[:, :2],
                path.latent_scale,
            ),
        )
    )
    assert pitched.paths[0].v.stride() == (4, 1)
    assert torch.equal(littlebit_linear(x, pitched, "cpu"), littlebit_linear(x, packed, "cpu"))


def test_expanded_input(isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(1, 70, 50, [40], generator=rng)
    y = littlebit_linear(x.expand(5, 70), packed, "cpu")
    assert relative_error(y, linear_reference(x.expand(5, 70), packed)) <= 2e-6


def test_isa_that_cannot_be_served_is_an_error(every_isa: list[str]) -> None:
    with pytest.raises(
        ValueError, match="isa must be auto, scalar, avx2, avx512, avx512vnni, neon or amx, got sse9"
    ):
        core().set_cpu_isa("sse9")
    for name in {"avx2", "avx512", "avx512vnni", "neon", "amx"} - set(every_isa):
        with pytest.raises(RuntimeError, match=f"asks for the {name} kernels"):
            core().set_cpu_isa(name)


@pytest.mark.parametrize(("value", "expected"), [("scalar", "scalar"), ("avx9", "LB2_CPU_ISA must be auto")])
def test_isa_from_the_environment(value: str, expected: str) -> None:
    script = "from littlebit2_kernels._native import core; print(core().cpu_isa())"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LB2_CPU_ISA": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in result.stdout + result.stderr
    assert (result.returncode == 0) == (value == "scalar")
