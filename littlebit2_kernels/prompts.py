"""Which backend takes a call of many tokens on a GPU: by estimates, and by scales in float16."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ._native import core
from .gpu import GpuProperties, gpu_properties
from .ops.balance import fits_float16
from .ops.operands import Operands

__all__ = [
    "CUDA_TOKENS",
    "FACTOR_BYTES",
    "LEAST_TOKENS",
    "MARGIN",
    "prompt_backend",
    "unpack_cycles",
]

#: Of a GPU that can be planned for (csrc/cuda/plan/check.cpp).
_LEAST_CAPABILITY = 80

#: Fewest tokens that are unpacked for: of fewer, what a call takes the host is the larger part.
LEAST_TOKENS = 128
#: How many times the other's estimate the CUDA kernels' must be, so that noise does not decide.
MARGIN = 1.1
#: Most bytes of unpacked factors that ``auto`` makes; about as much as the kernels' workspace.
FACTOR_BYTES = 128 * 2**20
#: Cycles of the launch that balances the scales of a layer of two stages for float16: a start and a latency
#: (csrc/cuda/plan/estimate.cpp), its bytes being few.
BALANCE_CYCLES = 2800

#: Most tokens of a call that are never Triton's where the CUDA kernels can run: launches and latencies weigh
#: more than the rate of the tensor cores then, and those of the CUDA kernels are chained.
CUDA_TOKENS = 512
#: GPUs whose tensor cores ``mma.sync``, which the CUDA kernels use, does not bring to their rate; what Triton
#: compiles to (``wgmma``, ``tcgen05``) does. By counts of instructions, not yet measured.
_SLOW_MMA_SYNC = range(90, 120)

#: Dtypes with the full rate of a library's tensor cores.
_DTYPES = (torch.float16, torch.bfloat16)


def prompt_backend(
    tokens: int,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    ranks: Sequence[int] | None,
    shares: Sequence[int],
    gpu: GpuProperties | torch.device | str,
    operands: Operands | None = None,
) -> str:
    """Which backend should be the fastest for many tokens: ``"blas"``, ``"cuda"`` or ``"triton"``.

    By the planner's estimates of the CUDA kernels, and of unpacking and torch's matrix products
    (docs/cuda.md), which are counts, not measurements. Of the Triton kernels there is no estimate.

    Args:
        tokens: M.
        dtype: of the activations.
        in_features: K.
        out_features: N.
        ranks: of the paths, ``None`` for a single stage.
        shares: for each path, the path whose first stage it uses.
        gpu: as for :func:`littlebit2_kernels.gpu.gpu_properties`.
        operands: of the layer, looked at for float16 alone, and once (:mod:`littlebit2_kernels.ops.balance`);
            without them, it is taken to fit.

    Returns:
        ``"blas"`` for at least :data:`LEAST_TOKENS` of 16 bits where it is estimated to be faster by
        :data:`MARGIN`, the factors are at most :data:`FACTOR_BYTES` and, in float16, the layer fits (which
        cannot be found out while a CUDA graph is being captured); float32 is for exact sums. Else
        ``"triton"`` for more than :data:`CUDA_TOKENS` on Hopper and data-centre Blackwell, unless the
        estimate of the CUDA kernels is at most that of unpacking, and ``"cuda"``, as for GPUs that these
        kernels are not made for.
    """
    properties = _properties(gpu) if isinstance(gpu, torch.device) else gpu_properties(gpu)
    if tokens < LEAST_TOKENS or properties.capability < _LEAST_CAPABILITY:
        return "cuda"
    own = None if ranks is None else tuple(ranks)
    ours, unpacking = _estimates(tokens, dtype, in_features, out_features, own, tuple(shares), properties)
    elements = in_features * out_features if own is None else sum(own) * (in_features + out_features)
    # A call without a GEMM (no shared memory for it) has no estimates.
    pays = dtype in _DTYPES and elements * dtype.itemsize <= FACTOR_BYTES and MARGIN * unpacking < ours
    if pays and (dtype != torch.float16 or operands is None or fits_float16(operands)):
        return "blas"
    if tokens <= CUDA_TOKENS or properties.capability not in _SLOW_MMA_SYNC or 0 < ours <= unpacking:
        return "cuda"
    return "triton"


def unpack_cycles(plan: Mapping[str, Any], dtype: torch.dtype, single_stage: bool) -> int:
    """The estimate of ``backend="blas"`` beside a plan's ``estimated_cycles``; 0 where there is none."""
    cycles = int(plan["unpack_cycles"])
    return cycles + BALANCE_CYCLES if cycles and dtype == torch.float16 and not single_stage else cycles


@functools.cache
def _properties(device: torch.device) -> GpuProperties:
    return gpu_properties(device)


# Models have few shapes, and prompts as many lengths as there are requests.
@functools.lru_cache(maxsize=4096)
def _estimates(
    tokens: int,
    dtype: torch.dtype,
    in_features: int,
    out_features: int,
    ranks: tuple[int, ...] | None,
    shares: tuple[int, ...],
    gpu: GpuProperties,
) -> tuple[int, int]:
    """Cycles of the CUDA kernels, and of unpacking and a library's products; 0 where there is no estimate."""
    rows = [out_features] * len(shares) if ranks is None else list(ranks)
    name = str(dtype).removeprefix("torch.")
    plan = core().plan_cuda(
        *(tokens, in_features, out_features, rows, ranks is None, list(shares), name, 0), *gpu.for_cuda()
    )
    return plan["estimated_cycles"], unpack_cycles(plan, dtype, ranks is None)
