"""Random problems on prepacked layers: accuracy, and the arithmetic contract to the bit, on every ISA."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from littlebit2_kernels import PackedLinear, littlebit_linear, prepack
from littlebit2_kernels._native import core
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import (
    TOLERANCE,
    make_problem,
    max_allowed_error,
    relative_error,
    typical_norm,
)
from tests.harness.sweeps import cases
from tests.kernels.lookup_emulation import emulate, segments_of
from tests.problems import PREPACKED, describe, random_problem, with_equal_in_scales

MODES = ("exact", "int16", "int8", "sign")

#: Relative errors that the modes may have on inputs without outliers.
INT16_ERROR = 5e-4
INT8_ERROR = 3e-2
INT8X2_ERROR = 1e-4


def error_of(y: torch.Tensor, x: torch.Tensor, packed: PackedLinear) -> float:
    return relative_error(y, linear_reference(x, packed), typical_norm(x, packed))


@cases(40, sample=20)
def test_exact_is_as_exact_as_torch(case: int, isa: str, rng: torch.Generator) -> None:
    x, packed = random_problem(rng, PREPACKED)
    y = littlebit_linear(x, prepack(packed), backend="cpu", activation="exact")
    truth = linear_reference(x, packed)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], packed.out_features)
    assert y.is_contiguous()
    error = relative_error(y, truth, typical_norm(x, packed))
    assert error <= max_allowed_error(x, packed, truth), describe(x, packed)


@cases(20, sample=10)
def test_exact_on_the_problems_of_the_portable_kernels(case: int, isa: str, rng: torch.Generator) -> None:
    x, packed = random_problem(rng)
    y = littlebit_linear(x, prepack(packed), activation="exact")
    truth = linear_reference(x, packed)
    error = relative_error(y, truth, typical_norm(x, packed))
    assert error <= max_allowed_error(x, packed, truth), describe(x, packed)


@cases(30, sample=15)
def test_int16_is_as_exact_as_promised(case: int, isa: str, rng: torch.Generator) -> None:
    x, packed = random_problem(rng, dataclasses.replace(PREPACKED, outliers=(0,)))
    error = error_of(littlebit_linear(x, prepack(packed), activation="int16"), x, packed)
    assert error <= INT16_ERROR + TOLERANCE[x.dtype], describe(x, packed)


@cases(30, sample=15)
def test_int8x2_is_as_exact_as_promised(case: int, every_isa: list[str], rng: torch.Generator) -> None:
    if "amx" not in every_isa:
        pytest.skip("this CPU has no AMX (the C++ tests have its tiles on arrays)")
    core().set_cpu_isa("amx")
    x, packed = random_problem(rng, dataclasses.replace(PREPACKED, outliers=(0,)))
    layer = prepack(packed)
    y = littlebit_linear(x, layer, activation="int8x2")
    assert error_of(y, x, packed) <= INT8X2_ERROR + TOLERANCE[x.dtype], describe(x, packed)
    many = x.dtype != torch.float32 and x.numel() >= 16 * packed.in_features
    if many:
        assert torch.equal(littlebit_linear(x, layer, backend="cpu"), y)


def test_int8x2_needs_amx(every_isa: list[str]) -> None:
    x, packed = make_problem(20, 70, 50, [40])
    for isa in every_isa:
        if isa == "amx":
            continue
        core().set_cpu_isa(isa)
        with pytest.raises(RuntimeError, match=f"INT8X2 needs the amx kernels, got the {isa} kernels"):
            littlebit_linear(x, prepack(packed), activation="int8x2")


@cases(25, sample=12)
def test_int16_with_outliers_is_no_worse_than_torch_in_bfloat16(
    case: int, isa: str, rng: torch.Generator
) -> None:
    x, packed = random_problem(
        rng, dataclasses.replace(PREPACKED, outliers=(1, 5, 20), tokens=(8, 33), dtypes=(torch.bfloat16,))
    )
    error = error_of(littlebit_linear(x, prepack(packed), activation="int16"), x, packed)
    torch_error = error_of(linear_reference(x, packed, torch.bfloat16), x, packed)
    assert error <= max(torch_error, TOLERANCE[torch.bfloat16]), describe(x, packed)


@pytest.mark.parametrize("outliers", [0, 8])
@pytest.mark.parametrize("ranks", [None, [128], [256, 128]], ids=str)
def test_int8_error_is_what_it_is_documented_to_be(
    ranks: list[int] | None, outliers: int, isa: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(16, 1500, 700, ranks, outliers=outliers, generator=rng)
    error = error_of(littlebit_linear(x, prepack(packed), activation="int8"), x, packed)
    assert error <= (INT8_ERROR if not outliers else 0.2)
    # It is no better than 8 bits can be: "int8" is not another name of a finer mode.
    assert error >= 1e-3


def test_sign_is_a_binarized_layer(isa: str, rng: torch.Generator) -> None:
    """The formula in float64, with no regard to the order of sums."""
    x, packed = make_problem(16, 1500, 700, [256], bias=True, generator=rng)
    path = packed.paths[0]
    assert path.u is not None
    assert path.latent_scale is not None
    v = unpack_signs_reference(path.v, path.in_features, torch.float64)
    u = unpack_signs_reference(path.u, path.rank, torch.float64)

    def binarize(z: torch.Tensor) -> torch.Tensor:
        return torch.where(z < 0, -1.0, 1.0).double()

    z = x.double() * path.in_scale
    latent = binarize(z) @ v.T * path.latent_scale  # integers, so that zeros are zeros
    magnitude = z.abs().mean(-1, keepdim=True) * latent.abs().mean(-1, keepdim=True)
    y = binarize(latent) @ u.T * magnitude * path.out_scale + packed.bias
    assert relative_error(littlebit_linear(x, prepack(packed), activation="sign"), y) <= 2e-6


@pytest.mark.parametrize("mode", MODES)
@cases(20, sample=10)
def test_every_isa_keeps_the_contract_to_the_bit(
    case: int, mode: str, every_isa: list[str], rng: torch.Generator
) -> None:
    x, packed = random_problem(rng, PREPACKED)
    expected, prepacked = emulate(x, packed, mode), prepack(packed)
    for name in every_isa:
        core().set_cpu_isa(name)
        y = littlebit_linear(x, prepacked, activation=mode)
        assert torch.equal(y, expected), f"{name}: {describe(x, packed)}"


@pytest.mark.parametrize("cols", PREPACKED.cols)
@pytest.mark.parametrize("single_stage", [False, True])
def test_every_number_of_columns(
    cols: int, single_stage: bool, every_isa: list[str], rng: torch.Generator
) -> None:
    rank = None if single_stage else [min(-(-cols // 8) * 8, 1448)]
    x, packed = make_problem(3, cols, 33, rank, generator=rng)
    prepacked = prepack(packed)
    for mode in MODES:
        expected = emulate(x, packed, mode)
        for name in every_isa:
            core().set_cpu_isa(name)
            assert torch.equal(littlebit_linear(x, prepacked, activation=mode), expected), f"{mode}, {name}"


@pytest.mark.parametrize("rows", PREPACKED.rows)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_every_number_of_rows_and_tokens(
    rows: int, tokens: int, every_isa: list[str], rng: torch.Generator
) -> None:
    x, packed = make_problem(tokens, 40, rows, [8 * (-(-rows // 8))], generator=rng)
    prepacked = prepack(packed)
    for mode in MODES:
        expected = emulate(x, packed, mode)
        for name in every_isa:
            core().set_cpu_isa(name)
            assert torch.equal(littlebit_linear(x, prepacked, activation=mode), expected), f"{mode}, {name}"


@pytest.mark.parametrize("share_last", [False, True])
@pytest.mark.parametrize("ranks", [[8, 8, 8], [40, 40, 40], [128, 128, 128], [160, 160, 160]], ids=str)
def test_stacked_first_stages(
    ranks: list[int], share_last: bool, every_isa: list[str], rng: torch.Generator
) -> None:
    """Paths with equal in_scale are one matrix, the V of each at a multiple of 32 rows."""
    x, packed = make_problem(5, 800, 130, ranks, generator=rng)
    stacked, plain = with_equal_in_scales(packed, share_last=share_last), prepack(packed)
    prepacked = prepack(stacked)
    assert prepacked.nbytes < plain.nbytes, "in_scale must be stored once"
    for mode in MODES:
        expected = emulate(x, stacked, mode)
        for name in every_isa:
            core().set_cpu_isa(name)
            assert torch.equal(littlebit_linear(x, prepacked, activation=mode), expected), f"{mode}, {name}"


def test_the_emulation_cuts_columns_as_documented() -> None:
    assert segments_of(720) == [[slice(0, 720)]]
    # Two chunks of equal even numbers of words, each its own segment.
    assert segments_of(721) == [[slice(0, 390)], [slice(390, 721)]]
    five = segments_of(5 * 720)
    assert [len(segment) for segment in five] == [2, 2, 2, 2]
    assert all(c.stop - c.start <= 720 for segment in five for c in segment)


def test_auto_is_exact_for_float32_and_int16_for_the_others(rng: torch.Generator) -> None:
    x, packed = make_problem(4, 500, 300, [64], generator=rng)
    prepacked = prepack(packed)
    assert torch.equal(littlebit_linear(x, prepacked), littlebit_linear(x, prepacked, activation="exact"))
    for half in (x.half(), x.bfloat16()):
        y = littlebit_linear(half, prepacked)
        assert torch.equal(y, littlebit_linear(half, prepacked, activation="int16"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [None, [512, 1448]], ids=str)
def test_large_layers(ranks: list[int] | None, mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(9, 3700, 2001, ranks, generator=rng)
    y = littlebit_linear(x, prepack(packed), activation=mode)
    if mode != "sign":
        assert error_of(y, x, packed) <= {"exact": 2e-6, "int16": INT16_ERROR, "int8": INT8_ERROR}[mode]
    rows = torch.randint(2001, (40,), generator=rng)
    few = PackedLinear(
        tuple(
            type(p)(
                p.v[rows] if ranks is None else p.v,
                p.in_scale,
                p.out_scale[rows],
                None if p.u is None else p.u[rows],
                p.latent_scale,
            )
            for p in packed.paths
        )
    )
    assert torch.equal(y[:2, rows], emulate(x[:2], few, mode))


@pytest.mark.parametrize("mode", MODES)
def test_many_tokens(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(1003, 96, 80, [24, 16], bias=True, generator=rng)
    assert torch.equal(littlebit_linear(x, prepack(packed), activation=mode), emulate(x, packed, mode))
