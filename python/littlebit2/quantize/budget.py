"""Bits per weight to ranks and back.

Budgets are *counted* bits, as in the papers (LittleBit, arXiv 2506.13771): one bit per sign and 16 per scale
entry (:attr:`littlebit2_kernels.format.LayerShape.counted_bits`). Terms: ``K`` in_features, ``N``
out_features, ``R`` rank, ``P`` paths; bpw is bits divided by ``K * N``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from littlebit2_kernels.format import MAX_DIM, RANK_MULTIPLE, LayerShape

__all__ = [
    "at_largest_rank",
    "check_positive",
    "check_rank",
    "check_usable",
    "largest_bpw",
    "largest_rank",
    "rank_for_bpw",
    "smallest_bpw",
    "tiny_rank",
]

#: Bits per weight of the dense layer.
DENSE_BPW = 16.0


def smallest_bpw(in_features: int, out_features: int, paths: int) -> float:
    """Return the counted bits per weight of ``paths`` paths of the smallest rank, 8."""
    _check_paths(paths)
    _check_features(in_features, out_features)
    bits = LayerShape(in_features, out_features, (RANK_MULTIPLE,)).counted_bits
    return paths * bits / (in_features * out_features)


def largest_rank(in_features: int, out_features: int) -> int:
    """Return the largest rank that bits per weight are turned into: ``min(K, N)`` rounded up to 8.

    A rank above ``min(K, N)`` buys no more singular directions.
    """
    _check_features(in_features, out_features)
    return _round_up(min(in_features, out_features))


def at_largest_rank(in_features: int, out_features: int, ranks: Sequence[int]) -> bool:
    """Return whether every path has the :func:`largest_rank`, so that more bits would change nothing."""
    return all(rank == largest_rank(in_features, out_features) for rank in ranks)


def largest_bpw(in_features: int, out_features: int, *, paths: int = 2, kv_factor: float = 1.0) -> float:
    """Return the bits per weight from which on :func:`rank_for_bpw` gives the :func:`largest_rank`.

    Args and errors: as :func:`rank_for_bpw`.
    """
    rank = largest_rank(in_features, out_features)
    _check_paths(paths)
    check_positive("kv_factor", kv_factor)
    both = in_features + out_features
    bits = rank / kv_factor * (both + LayerShape.COUNTED_SCALE_BITS) + LayerShape.COUNTED_SCALE_BITS * both
    return paths * bits / (in_features * out_features)


def check_usable(bpw: float, shapes: Iterable[tuple[int, int, float]], paths: int) -> None:
    """Raise ``ValueError`` if ``bpw`` is more than any of the layers can use, or than dense layers take.

    Single layers may be unable to use it all: those end at their :func:`largest_rank`. That all do is a slip.

    Args:
        bpw: target of counted bits per weight, over all paths.
        shapes: K, N and ``kv_factor`` of every layer.
        paths: P.
    """
    layers = list(shapes)
    dense = DENSE_BPW if any(smallest_bpw(k, n, paths) <= DENSE_BPW for k, n, _ in layers) else math.inf
    most = max(largest_bpw(k, n, paths=paths, kv_factor=factor) for k, n, factor in layers)
    if bpw > dense and most > dense:
        raise ValueError(f"bpw must be at most {dense:g}, what a dense float16 layer takes, got {bpw}")
    # Up to the next multiple of 8 a rank is rounded down in any case.
    if all(_is_cut(bpw, k, n, paths, factor) for k, n, factor in layers):
        more = "give more paths, " if paths == 1 else ""
        raise ValueError(
            f"bpw must be at most {most:.4g}, what {_paths(paths)} of the largest useful rank, min(K, N), "
            f"cost{'s' if paths == 1 else ''}{'' if len(layers) == 1 else ' in the layer that takes most'}, "
            f"got {bpw}; {more}explicit ranks, or leave dense what needs more"
        )


def rank_for_bpw(
    in_features: int, out_features: int, bpw: float, *, paths: int = 2, kv_factor: float = 1.0
) -> int:
    """Return the rank of each of ``paths`` equal paths for a counted budget of ``bpw``.

    The papers' rule for one and two paths, written for any number: ``(K N bpw - 16 P (K + N)) /
    (P (K + N + 16))``, times ``kv_factor``, truncated, floored to a multiple of 8, and at least 8.
    The last step may exceed the budget: below :func:`smallest_bpw` the counted bpw is that minimum.
    A rank above ``min(K, N)`` buys no more singular directions, so the result is at most the
    :func:`largest_rank`, which :func:`largest_bpw` buys.

    Args:
        in_features: K.
        out_features: N.
        bpw: target of counted bits per weight, over all paths.
        paths: P.
        kv_factor: factor on the rank, for key and value projections.

    Raises:
        ValueError: a dimension or ``paths`` is below 1; ``bpw`` or ``kv_factor`` is not finite and
            positive; or ``bpw`` does not even pay for the scale vectors of ``paths`` paths.
    """
    _check_features(in_features, out_features)
    _check_paths(paths)
    check_positive("bpw", bpw)
    check_positive("kv_factor", kv_factor)
    rank = _exact_rank(bpw, in_features, out_features, paths, kv_factor)
    if rank <= 0:
        entries = paths * (in_features + out_features)
        scales = LayerShape.COUNTED_SCALE_BITS * entries / (in_features * out_features)
        least = smallest_bpw(in_features, out_features, paths)
        fewer = "give fewer paths, explicit ranks," if paths > 1 else "give explicit ranks"
        raise ValueError(
            f"bpw must be above {scales:.4g}, what the scales of {_paths(paths)} cost for "
            f"in_features={in_features}, out_features={out_features} (rank {RANK_MULTIPLE} needs "
            f"{least:.4g}), got {bpw}; {fewer} or leave the layer dense"
        )
    rank = min(rank, float(largest_rank(in_features, out_features)))
    return max(int(rank) // RANK_MULTIPLE, 1) * RANK_MULTIPLE


def tiny_rank(rank: int) -> float:
    """Return the rank of the FP16 pair that costs as much as a binary pair of ``rank``, about ``rank / 16``.

    It need not be whole: the spectrum code counts a fraction of a direction by its fraction of energy.
    """
    return rank / LayerShape.COUNTED_SCALE_BITS


def check_rank(name: str, rank: int) -> None:
    """Raise ``ValueError`` unless ``rank`` is a positive multiple of 8 that the format can hold."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < RANK_MULTIPLE or rank % RANK_MULTIPLE:
        raise ValueError(f"{name} must be a positive multiple of {RANK_MULTIPLE}, got {rank!r}")
    if rank > MAX_DIM:
        raise ValueError(f"{name} must be at most {MAX_DIM}, got {rank}")


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite positive number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite positive number, got {value!r}")


def _exact_rank(bpw: float, in_features: int, out_features: int, paths: int, kv_factor: float) -> float:
    """The rank of each path before it is rounded; not positive where scales alone cost more than ``bpw``."""
    both = in_features + out_features
    signs = in_features * out_features * bpw - LayerShape.COUNTED_SCALE_BITS * paths * both
    return kv_factor * signs / (paths * (both + LayerShape.COUNTED_SCALE_BITS))


def _is_cut(bpw: float, in_features: int, out_features: int, paths: int, kv_factor: float) -> bool:
    rank = _exact_rank(bpw, in_features, out_features, paths, kv_factor)
    return rank >= largest_rank(in_features, out_features) + RANK_MULTIPLE


def _paths(count: int) -> str:
    return "one path" if count == 1 else f"{count} paths"


def _round_up(size: int) -> int:
    return -(-size // RANK_MULTIPLE) * RANK_MULTIPLE


def _check_features(in_features: int, out_features: int) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_paths(paths: int) -> None:
    if paths < 1:
        raise ValueError(f"paths must be at least 1, got {paths}")
