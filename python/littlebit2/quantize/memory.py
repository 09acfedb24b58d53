"""How much memory the quantization of a layer takes, from shapes alone."""

from __future__ import annotations

from .config import QuantConfig
from .solvers.binary_path import EXPANDED_ENTRIES, WHOLE_COLUMNS, chunk_columns
from .solvers.partial_svd import is_partial

__all__ = ["working_bytes"]


def working_bytes(in_features: int, out_features: int, config: QuantConfig) -> int:
    """Return about how many bytes a layer takes while it is quantized, its source included.

    docs/checkpoints.md has measured peaks. The greatest of the steps counts. A source of 16 bits takes less
    where it can stay as it is; that is not counted on.

    Args:
        in_features: K.
        out_features: N.
        config: with ranks.
    """
    assert config.ranks is not None
    k, n, rank = in_features, out_features, max(config.ranks)
    size = config.compute_dtype.itemsize
    steps = config.steps_for(k, n, config.ranks)
    weight, factors, system = size * k * n, size * rank * (k + n), size * rank**2
    expanded = rank * max(k, n) <= EXPANDED_ENTRIES
    longer = max(k, n)
    whole = expanded and longer <= WHOLE_COLUMNS
    chunk = size * rank * (longer if whole else min(chunk_columns(rank), longer))
    signs = factors if expanded else factors // (8 * size)
    peaks = [weight + 2 * k * n]  # a 16-bit source while it is copied; a float32 one is worked on in place
    if steps.decomposes:
        if is_partial(n, k, rank, config.compute_dtype):
            peaks.append(weight + max(2 * size * rank * min(k, n) + 4 * system, factors + 2 * system))
        else:
            peaks.append(weight + 24 * min(k, n) ** 2 + 3 * factors)
        if steps.method != "dual-svid":
            peaks.append(factors + 7 * system)  # the weight is let go meanwhile
    if steps.refine_rounds:
        peaks.append(weight + signs + 2 * system + 5 * chunk)
    if steps.admm_iterations:
        duals = factors if expanded or size > 4 else factors // 2
        peaks.append(weight + signs + duals + system + 6 * chunk)
    return max(peaks)
