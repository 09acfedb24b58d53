"""Whether a call of many tokens on a GPU is one for the backend ``blas``: a pure function of its sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ._native import core
from .gpu import GpuProperties, gpu_properties

__all__ = ["unpacking_pays"]


def unpacking_pays(
    tokens: int,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    ranks: Sequence[int] | None,
    shares: Sequence[int],
    gpu: GpuProperties | torch.device | str,
) -> bool:
    """Whether unpacking a layer and torch's matrix products should take less time than the CUDA kernels.

    By the planner's estimates of both (docs/cuda.md), which are counts, not measurements.

    Args:
        tokens: M, more than the 16 that have no estimates.
        dtype: of the activations.
        in_features: K.
        out_features: N.
        ranks: of the paths, ``None`` for a single stage.
        shares: for each path, the path whose first stage it uses.
        gpu: as for :func:`littlebit2_kernels.gpu.gpu_properties`.

    Returns:
        False for any dtype but bfloat16: float16 does not hold all products of scales, and float32 is for
        exact sums.
    """
    if dtype != torch.bfloat16:
        return False
    own = None if ranks is None else tuple(ranks)
    return _pays(tokens, in_features, out_features, own, tuple(shares), gpu_properties(gpu))


# Models have few shapes, and prompts as many lengths as there are requests.
@functools.lru_cache(maxsize=4096)
def _pays(
    tokens: int,
    in_features: int,
    out_features: int,
    ranks: tuple[int, ...] | None,
    shares: tuple[int, ...],
    gpu: GpuProperties,
) -> bool:
    rows = [out_features] * len(shares) if ranks is None else list(ranks)
    plan = core().plan_cuda(
        tokens, in_features, out_features, rows, ranks is None, list(shares), "bfloat16", 0, *gpu.for_cuda()
    )
    return bool(plan["unpack_cycles"] < plan["estimated_cycles"])
