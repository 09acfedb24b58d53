"""Whether a call of many tokens on a GPU is one for the backend ``blas``: a pure function of its sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ._native import core
from .gpu import GpuProperties, gpu_properties

__all__ = ["FACTOR_BYTES", "LEAST_TOKENS", "MARGIN", "unpacking_pays"]

#: Of a GPU that can be planned for (csrc/cuda/check.cpp).
_LEAST_CAPABILITY = 80

#: Fewest tokens that are unpacked for: of fewer, what a call takes the host is the larger part.
LEAST_TOKENS = 128
#: How many times the other's estimate the CUDA kernels' must be, so that noise does not decide.
MARGIN = 1.1
#: Most bytes of unpacked factors that ``auto`` makes; about as much as the kernels' workspace.
FACTOR_BYTES = 128 * 2**20


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

    By the planner's estimates of both (docs/cuda.md), which are counts, not measurements, with a margin. Of
    the Triton kernels, which could also run, there is no estimate.

    Args:
        tokens: M.
        dtype: of the activations.
        in_features: K.
        out_features: N.
        ranks: of the paths, ``None`` for a single stage.
        shares: for each path, the path whose first stage it uses.
        gpu: as for :func:`littlebit2_kernels.gpu.gpu_properties`.

    Returns:
        False for fewer than :data:`LEAST_TOKENS`, more than :data:`FACTOR_BYTES` of factors, GPUs that the
        kernels are not made for, and any dtype but bfloat16: float16 does not hold all that products of
        scales can be, and float32 is for exact sums.
    """
    if dtype != torch.bfloat16 or tokens < LEAST_TOKENS:
        return False
    own = None if ranks is None else tuple(ranks)
    properties = _properties(gpu) if isinstance(gpu, torch.device) else gpu_properties(gpu)
    return _pays(tokens, in_features, out_features, own, tuple(shares), properties)


@functools.cache
def _properties(device: torch.device) -> GpuProperties:
    return gpu_properties(device)


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
    elements = in_features * out_features if ranks is None else sum(ranks) * (in_features + out_features)
    if gpu.capability < _LEAST_CAPABILITY or elements * torch.bfloat16.itemsize > FACTOR_BYTES:
        return False
    rows = [out_features] * len(shares) if ranks is None else list(ranks)
    plan = core().plan_cuda(
        tokens, in_features, out_features, rows, ranks is None, list(shares), "bfloat16", 0, *gpu.for_cuda()
    )
    # A call without a GEMM (no shared memory for it) has no estimates.
    return bool(MARGIN * plan["unpack_cycles"] < plan["estimated_cycles"])
