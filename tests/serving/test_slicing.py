"""Parts of packed layers are exact at any bounds, on the same signs and scales."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from littlebit2_kernels import PackedLinear, select_rows, slice_columns, slice_rows
from littlebit2_kernels.reference import dense_weight
from littlebit2_kernels.testing import make_packed

K, N = 150, 70
KINDS: dict[str, dict[str, Any]] = {
    "one-path": {"ranks": [40], "bias": True},
    "two-paths": {"ranks": [8, 40]},
    "shared-v": {"ranks": [16, 16], "share_v": True, "bias": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=KINDS)
def packed(request: pytest.FixtureRequest, rng: torch.Generator) -> PackedLinear:
    # Scales of +-1 make integers of the dense weight, which torch adds up without rounding in any order.
    return make_packed(K, N, generator=rng, scale_spread=0.0, **KINDS[request.param])


def _bounds(size: int, rng: torch.Generator) -> list[tuple[int, int]]:
    # At and around words, the whole, one entry, and anywhere.
    fixed = [(0, size), (0, 1), (size - 1, size), (32, 64), (31, 33), (1, size), (33, size), (0, 32)]
    drawn = torch.randint(0, size, (12, 2), generator=rng).sort(-1).values.tolist()
    return [*fixed, *((start, stop + 1) for start, stop in drawn)]


def test_rows(packed: PackedLinear, rng: torch.Generator) -> None:
    dense = dense_weight(packed)
    for start, stop in _bounds(N, rng):
        part = slice_rows(packed, start, stop)
        assert torch.equal(dense_weight(part), dense[start:stop])
        assert part.ranks == packed.ranks
        assert part.shares == packed.shares
        if packed.bias is not None:
            assert part.bias is not None
            assert torch.equal(part.bias, packed.bias[start:stop])


def test_rows_have_memory_of_their_own(packed: PackedLinear) -> None:
    part = slice_rows(packed, 0, N // 2)
    for ours, theirs in zip(part.paths, packed.paths, strict=True):
        assert ours.out_scale.untyped_storage().data_ptr() != theirs.out_scale.untyped_storage().data_ptr()
        assert (ours.v is theirs.v) is (packed.ranks is not None)


def test_several_ranges_of_rows(packed: PackedLinear) -> None:
    dense = dense_weight(packed)
    ranges = [(40, 50), (0, 7), (69, 70), (3, 41)]
    expected = torch.cat([dense[start:stop] for start, stop in ranges])
    assert torch.equal(dense_weight(select_rows(packed, ranges)), expected)


def test_columns(packed: PackedLinear, rng: torch.Generator) -> None:
    dense = dense_weight(packed)
    for start, stop in _bounds(K, rng):
        part = slice_columns(packed, start, stop)
        assert torch.equal(dense_weight(part), dense[:, start:stop])
        assert part.shares == packed.shares
        assert part.bias is None
    kept = slice_columns(packed, 3, 40, keep_bias=True)
    assert kept.bias is packed.bias


@pytest.mark.parametrize("pieces", [2, 3, 7])
def test_columns_add_up(packed: PackedLinear, pieces: int) -> None:
    bounds = [round(i * K / pieces) for i in range(pieces + 1)]
    parts = [slice_columns(packed, *pair) for pair in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat([dense_weight(part) for part in parts], dim=1), dense_weight(packed))


def test_refuses(packed: PackedLinear) -> None:
    for function, size in ((slice_rows, "N=70"), (slice_columns, "K=150")):
        for start, stop in ((-1, 3), (3, 3), (5, 4), (0, 151)):
            with pytest.raises(ValueError, match=f"0 <= start < stop <= {size}, got {start} and {stop}"):
                function(packed, start, stop)
        with pytest.raises(TypeError, match=r"stop must be an integer, got 2\.0"):
            function(packed, 0, 2.0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="packed must be a PackedLinear, got str"):
            function("packed", 0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranges must hold at least one"):
        select_rows(packed, [])
