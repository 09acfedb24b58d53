"""``LayerShape``: sizes and structure of a layer, and the bits that follow from them."""

from __future__ import annotations

from typing import Any

import pytest

from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.testing import make_packed


def test_defaults() -> None:
    two = LayerShape(64, 96, [8, 16])  # type: ignore[arg-type]  # any sequence is held as a tuple
    assert (two.ranks, two.shares, two.num_paths, two.single_stage) == ((8, 16), (0, 1), 2, False)
    one = LayerShape(64, 96, None)
    assert (one.rows, one.shares, one.num_paths, one.single_stage) == ((96,), (0,), 1, True)
    assert LayerShape(64, 96, None, (0, 1)).rows == (96, 96)


def test_papers_count() -> None:
    k, n = 100, 70
    shape = LayerShape(k, n, (24, 8))
    assert shape.counted_bits == sum(rank * (k + n + 16) + 16 * (k + n) for rank in (24, 8))
    assert shape.counted_bpw == shape.counted_bits / (k * n)
    shared = LayerShape(k, n, (24, 24), (0, 0))
    assert shared.counted_bits == 2 * (24 * (k + n + 16) + 16 * (k + n)) - 24 * k - 16 * k


@pytest.mark.parametrize("ranks", [None, (8,), (24, 40), (16, 16)])
@pytest.mark.parametrize("share_v", [False, True])
def test_shape_of_a_packed_layer(ranks: tuple[int, ...] | None, share_v: bool) -> None:
    share_v = share_v and ranks == (16, 16)
    packed = make_packed(100, 70, ranks, bias=True, share_v=share_v)
    shape = packed.shape
    assert shape == LayerShape(100, 70, ranks, (0, 0) if share_v else ())
    assert shape.stored_bits == 8 * (packed.nbytes - 4 * 70)
    assert hash(shape) == hash(packed.shape)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8, (8,)), ValueError, "in_features must be between 1"),
        ((8, True, (8,)), TypeError, "out_features must be an integer"),
        ((8, 8, (12,)), ValueError, r"ranks\[0\] must be .* multiple of 8, got 12"),
        ((8, 8, 8), TypeError, "ranks must be a sequence of integers or None, got int"),
        ((8, 8, "8"), TypeError, "ranks must be a sequence of integers or None, got str"),
        ((8, 8, ()), ValueError, "between 1 and 16 paths, got 0"),
        ((8, 8, (8,) * 17), ValueError, "between 1 and 16 paths, got 17"),
        ((8, 8, (8, 8), (0,)), ValueError, r"shares must name one path per rank \(2\), got 1"),
        ((8, 8, (8, 8), (1, 1)), ValueError, r"shares\[0\] must name path 0 itself"),
        ((8, 8, (8, 16), (0, 0)), ValueError, r"shares\[1\] must name .* rank 16, got 0"),
        ((8, 8, (8, 8, 8), (0, 0, 1)), ValueError, r"shares\[2\] must name"),
        ((8, 8, (8, 8), (0, 0.0)), TypeError, r"shares\[1\] must be an integer"),
        ((8, 8, (8, 8), 3), TypeError, "shares must be a sequence of integers, got int"),
    ],
)
def test_bad_shapes(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LayerShape(*arguments)
