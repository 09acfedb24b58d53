"""How much memory the quantisation of a layer takes, from shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    factors, system = size * rank * (k + n), size * rank**2
    peaks = [4 * k * n]  # the source while it is copied
    if not (steps.method == "admm" and config.admm_start == "random"):
        if is_partial(n, k, rank, config.compute_dtype):
            peaks.append(2 * size * rank * min(k, n) + factors + 10 * system)
        else:
            peaks.append(24 * min(k, n) ** 2 + 3 * factors)
    if steps.method != "dual-svid":
        peaks.append(factors + 6 * system)
    if steps.refine_rounds:
        peaks.append(size * rank * max(k, n) + 4 * system)
    if steps.admm_iterations:
        peaks.append(factors + size * rank * max(k, n) + 3 * system)
    return size * k * n + max(peaks)
