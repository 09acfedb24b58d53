"""Bits of a layer as the papers count them, for every structure that the format holds."""

from __future__ import annotations

from .specs import LayerSpec

__all__ = ["counted_bits"]

#: Bits that the papers count for one entry of a scale vector.
_SCALE_BITS = 16


def counted_bits(spec: LayerSpec) -> int:
    """Return one bit per sign and 16 per scale entry; a first stage that is shared counts once.

    For independent two-stage paths this is the papers' ``R (K + N + 16) + 16 (K + N)`` per path.
    """
    bits = 0
    ranks = spec.ranks if spec.ranks is not None else (spec.out_features,) * len(spec.shares)
    for path, rank in enumerate(ranks):
        if spec.shares[path] == path:
            bits += rank * spec.in_features + _SCALE_BITS * spec.in_features
        if spec.ranks is not None:
            bits += spec.out_features * rank + _SCALE_BITS * rank
        bits += _SCALE_BITS * spec.out_features
    return bits
