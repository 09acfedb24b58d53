"""Bits per weight and ranks, both ways, and the ranks of real models."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from littlebit2.quantize import QuantConfig, rank_for_bpw
from littlebit2.quantize.budget import at_largest_rank, largest_bpw, largest_rank, smallest_bpw
from littlebit2.quantize.ranks import too_small
from littlebit2_kernels.format import LayerShape, PackedLinear, PackedPath
from littlebit2_kernels.testing import make_packed

#: K, N of the attention, key/value and MLP projections.
LLAMA2_7B = ((4096, 4096), (4096, 11008))
LLAMA2_13B = ((5120, 5120), (5120, 13824))
LLAMA2_70B = ((8192, 8192), (8192, 1024), (8192, 28672))
LLAMA3_8B = ((4096, 4096), (4096, 1024), (4096, 14336))


@pytest.mark.parametrize(
    ("shapes", "table"),
    [
        pytest.param(
            LLAMA2_7B,
            {1.0: (1000, 1472), 0.55: (544, 800), 0.3: (288, 424), 0.1: (80, 128)},
            id="Llama-2-7B",
        ),
        pytest.param(
            LLAMA2_13B,
            {1.0: (1256, 1848), 0.55: (680, 1008), 0.3: (360, 536), 0.1: (104, 168)},
            id="Llama-2-13B",
        ),
        pytest.param(
            LLAMA2_70B,
            {1.0: (2024, 432, 3168), 0.55: (1104, 232, 1728), 0.3: (592, 120, 936), 0.1: (184, 24, 296)},
            id="Llama-2-70B",
        ),
        pytest.param(
            LLAMA3_8B,
            {1.0: (1000, 392, 1568), 0.55: (544, 208, 856), 0.3: (288, 104, 456), 0.1: (80, 24, 136)},
            id="Llama-3-8B",
        ),
    ],
)
def test_ranks_of_published_models(
    shapes: tuple[tuple[int, int], ...], table: dict[float, tuple[int, ...]]
) -> None:
    for bpw, ranks in table.items():
        assert tuple(rank_for_bpw(k, n, bpw) for k, n in shapes) == ranks
        # The down projection swaps K and N and must get the rank of the up projection.
        assert rank_for_bpw(*reversed(shapes[-1]), bpw) == ranks[-1]


def test_formulas_of_one_and_two_paths() -> None:
    k, n, bpw = 1000, 600, 1.3
    one = (k * n * bpw - 16 * (k + n)) / (k + n + 16)
    two = (k * n * bpw - 32 * (k + n)) / (2 * (k + n + 16))
    assert rank_for_bpw(k, n, bpw, paths=1) == int(one) // 8 * 8
    assert rank_for_bpw(k, n, bpw, paths=2) == int(two) // 8 * 8
    assert LayerShape(k, n, (40,)).counted_bpw == (40 * (k + n + 16) + 16 * (k + n)) / (k * n)


@given(
    k=st.integers(1, 3000),
    n=st.integers(1, 3000),
    paths=st.integers(1, 4),
    bpw=st.floats(0.05, 4.0),
)
def test_rank_is_the_largest_within_budget(k: int, n: int, paths: int, bpw: float) -> None:
    assume(k * n * bpw > 16 * paths * (k + n))
    rank = rank_for_bpw(k, n, bpw, paths=paths)
    cap = math.ceil(min(k, n) / 8) * 8
    assert rank % 8 == 0
    assert 8 <= rank <= cap
    # Rounding of the target in floating point may cost one step, never a whole one in value.
    assert LayerShape(k, n, (rank,) * paths).counted_bpw <= bpw * (1 + 1e-12) or rank == 8
    if rank < cap:
        assert LayerShape(k, n, (rank + 8,) * paths).counted_bpw > bpw * (1 - 1e-12)


@given(k=st.integers(64, 2000), n=st.integers(64, 2000), rank=st.integers(1, 8), paths=st.integers(1, 3))
def test_bits_of_a_rank_buy_that_rank_again(k: int, n: int, rank: int, paths: int) -> None:
    bpw = LayerShape(k, n, (8 * rank,) * paths).counted_bpw
    assert rank_for_bpw(k, n, bpw * (1 + 1e-9), paths=paths) == 8 * rank


def test_kv_factor_multiplies_the_rank_before_rounding() -> None:
    raw = (4096 * 1024 * 1.0 - 32 * 5120) / (2 * 5136)
    assert rank_for_bpw(4096, 1024, 1.0, kv_factor=1.5) == int(1.5 * raw) // 8 * 8 == 584


def test_small_ranks_round_up_to_eight_and_large_ones_are_capped() -> None:
    assert rank_for_bpw(4096, 1024, 0.045) == 8
    assert LayerShape(4096, 1024, (8, 8)).counted_bpw == smallest_bpw(4096, 1024, 2) > 0.045
    assert rank_for_bpw(100, 5000, 50.0, paths=1) == 104


@given(
    k=st.integers(1, 3000), n=st.integers(1, 3000), paths=st.integers(1, 4), kv_factor=st.floats(0.25, 4.0)
)
def test_largest_bpw_buys_the_largest_rank_and_no_more_is_used(
    k: int, n: int, paths: int, kv_factor: float
) -> None:
    most = largest_bpw(k, n, paths=paths, kv_factor=kv_factor)
    cap = largest_rank(k, n)
    for factor in (1 + 1e-9, 1.5, 10.0):
        rank = rank_for_bpw(k, n, most * factor, paths=paths, kv_factor=kv_factor)
        assert at_largest_rank(k, n, [rank] * paths)
    if kv_factor == 1:
        assert most == pytest.approx(LayerShape(k, n, (cap,) * paths).counted_bpw)
    less = 0.99 * most
    assume(k * n * less > 16 * paths * (k + n))
    if cap >= 2000:
        assert rank_for_bpw(k, n, less, paths=paths, kv_factor=kv_factor) < cap


def test_bits_that_no_layer_can_use_are_an_error() -> None:
    square, flat = (1024, 1024, False), (1024, 8192, False)
    one = QuantConfig(bpw=1.9)
    one.check_usable([square, flat])  # the flat layer ends at its largest rank, the square one does not
    with pytest.raises(
        ValueError, match=r"bpw must be at most 1\.145, what one path .* costs, got 1\.9; give more paths"
    ):
        one.check_usable([flat])
    QuantConfig(bpw=1.9, paths=2).check_usable([flat])
    with pytest.raises(ValueError, match=r"at most 2\.047, .* in the layer that takes most, got 50"):
        QuantConfig(bpw=50).check_usable([square, flat])
    with pytest.raises(ValueError, match=r"at most 16, what a dense float16 layer takes, got 50"):
        QuantConfig(bpw=50, paths=16).check_usable([square, flat])
    # What is printed can be given.
    QuantConfig(bpw=2.047).check_usable([square])
    # A factor on the rank of key and value projections is no reason to refuse the model, or to let it pass.
    QuantConfig(bpw=1.9, kv_factor=2.0).check_usable([square, (1024, 1024, True)])
    with pytest.raises(ValueError, match=r"bpw must be at most 1\.039"):
        QuantConfig(bpw=1.9, kv_factor=2.0).check_usable([(1024, 1024, True)])
    QuantConfig(ranks=(4096,)).check_usable([square])
    QuantConfig(energy=0.9).check_usable([square])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bpw": 0.0}, "bpw must be a finite positive number, got 0.0"),
        ({"bpw": -1.0}, "bpw must be a finite positive number, got -1.0"),
        ({"bpw": math.nan}, "bpw must be a finite positive number, got nan"),
        ({"bpw": math.inf}, "bpw must be a finite positive number, got inf"),
        ({"bpw": True}, "bpw must be a finite positive number, got True"),
        ({"bpw": 1.0, "kv_factor": 0.0}, "kv_factor must be a finite positive number, got 0.0"),
        ({"bpw": 1.0, "paths": 0}, "paths must be at least 1, got 0"),
        (
            {"bpw": 0.5},
            r"bpw must be above 1, what the scales of 2 paths cost .*needs 1.56.*got 0.5; give fewer",
        ),
        (
            {"bpw": 0.3, "paths": 1},
            r"bpw must be above 0\.5, what the scales of one path cost .*; give explicit ranks or leave",
        ),
    ],
)
def test_bad_budgets_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_for_bpw(64, 64, **arguments)


def test_bad_shapes_and_ranks_are_named() -> None:
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        rank_for_bpw(0, 64, 1.0)
    with pytest.raises(ValueError, match="out_features must be at least 1, got 0"):
        rank_for_bpw(64, 0, 1.0)


@pytest.mark.parametrize(
    ("config", "shape", "reason"),
    [
        (QuantConfig(bpw=0.6), (64, 64), None),
        (
            QuantConfig(bpw=0.5),
            (64, 64),
            "layer 'a': bpw must be above 0.5, what the scales of one path",
        ),
        (QuantConfig(bpw=0.5, budget="spectral"), (64, 64), "layer 'a': bpw must be above 0.5"),
        (QuantConfig(ranks=(8,)), (16, 16), None),
        (
            QuantConfig(ranks=(8,)),
            (8, 8),
            r"layer 'a': ranks \[8\] would store 20 bits per weight of its",
        ),
        (QuantConfig(energy=0.9), (8, 8), r"layer 'a': ranks \[8\] would store 20 bits"),
    ],
)
def test_layers_are_too_small_where_packing_saves_nothing(
    config: QuantConfig, shape: tuple[int, int], reason: str | None
) -> None:
    found = too_small("a", *shape, config)
    assert (found is None) if reason is None else re.match(reason, str(found))


@pytest.mark.parametrize(("k", "n", "ranks"), [(64, 96, [32]), (33, 7, [8, 40]), (100, 50, [24, 24, 8])])
def test_planned_stored_bits_are_the_real_ones(
    k: int, n: int, ranks: list[int], rng: torch.Generator
) -> None:
    packed = make_packed(k, n, ranks, bias=True, generator=rng)
    planned = LayerShape(k, n, tuple(ranks))
    assert packed.shape == planned
    without_bias = PackedLinear(packed.paths)
    assert without_bias.shape.stored_bits == planned.stored_bits == 8 * without_bias.nbytes


def test_shared_first_stage_is_stored_once(rng: torch.Generator) -> None:
    packed = make_packed(64, 32, [16, 16], generator=rng)
    first, second = packed.paths
    shared = PackedPath(first.v, first.in_scale, second.out_scale, second.u, second.latent_scale)
    saved_bits = 8 * 4 * (first.v.numel() + first.in_scale.numel())
    assert PackedLinear((first, shared)).shape.stored_bits == packed.shape.stored_bits - saved_bits
