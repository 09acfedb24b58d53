"""How much memory the quantisation of a layer takes, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .binary_path import CHUNK
from .partial_svd import is_partial

if TYPE_CHECKING:
    from .config import QuantConfig

__all__ = ["working_bytes"]


def working_bytes(in_features: int, out_features: int, config: QuantConfig) -> int:
    """Return about how many bytes a layer takes while it is quantised, its source included.

    docs/quantization.md compares this with measured peaks. The greatest of the steps counts, beside the
    working copy of the weight.

    Args:
        in_features: K.
        out_features: N.
        config: with ranks.
    """
    assert config.ranks is not None
    k, n, rank = in_features, out_features, max(config.ranks)
    size = config.compute_dtype.itemsize
    steps = config.steps_for(k, n, config.ranks)
    factors, system, chunks = size * rank * (k + n), size * rank**2, 5 * size * rank * CHUNK
    peaks = [2 * k * n]  # a 16-bit source while it is copied; a float32 one is worked on in place
    if steps.method != "admm" or config.admm_start != "random":
        if is_partial(n, k, rank, config.compute_dtype):
            peaks.append(max(2 * size * rank * min(k, n) + 4 * system, factors + 2 * system))
        else:
            peaks.append(24 * min(k, n) ** 2 + 3 * factors)
        if steps.method != "dual-svid":
            peaks.append(factors + 7 * system - size * k * n)  # the weight is let go meanwhile
    if steps.refine_rounds:
        peaks.append(4 * system + chunks)
    if steps.admm_iterations:
        peaks.append(factors + 3 * system + chunks)
    return size * k * n + max(peaks)
