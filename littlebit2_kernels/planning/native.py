"""Plans of the native planners; the only place that spells out a :class:`LayerShape` for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._native import core
from ..format import LayerShape
from ..gpu import GpuProperties
from ..ops.balance import balance_launches

__all__ = ["BALANCE_CYCLES", "plan_cpu", "plan_cuda", "plan_grouped_cuda", "unpack_cycles"]

#: Cycles of each launch that normalizes scales for float16: a start and a latency, as in
#: csrc/cuda/plan/estimate.cpp; its bytes are few.
BALANCE_CYCLES = 2800


def plan_cuda(
    shape: LayerShape, tokens: int, dtype: torch.dtype, activation: int, gpu: GpuProperties
) -> dict[str, Any]:
    """Plan a call of the CUDA kernels on a GPU of these properties; needs no GPU.

    Args:
        shape: of the layer.
        tokens: M.
        dtype: of the activations.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.
        gpu: what to plan for.

    Raises:
        RuntimeError: the kernels do not run on such a GPU.
        NativeLibraryError: the compiled module is missing.
    """
    return plan_grouped_cuda([shape], tokens, dtype, activation, gpu)


def plan_grouped_cuda(
    shapes: Sequence[LayerShape], tokens: int, dtype: torch.dtype, activation: int, gpu: GpuProperties
) -> dict[str, Any]:
    """Plan one call of several layers on one input; as :func:`plan_cuda`."""
    if gpu.maker != "nvidia":
        raise RuntimeError(f"the CUDA kernels run on NVIDIA's GPUs, got one of {gpu.maker!r}")
    layers = [(s.out_features, list(s.rows), s.single_stage, list(s.shares)) for s in shapes]
    name = str(dtype).removeprefix("torch.")
    return core().plan_grouped_cuda(tokens, shapes[0].in_features, layers, name, activation, *gpu.for_cuda())


def plan_cpu(shape: LayerShape, tokens: int) -> dict[str, Any]:
    """Plan a call of the CPU kernels on the packed words."""
    sizes = (shape.in_features, shape.out_features, list(shape.rows))
    return core().plan_cpu(tokens, *sizes, shape.single_stage, list(shape.shares))


def unpack_cycles(plan: Mapping[str, Any], dtype: torch.dtype, shape: LayerShape) -> int:
    """The estimate of ``backend="blas"`` beside a plan's ``estimated_cycles``; 0 where there is none."""
    cycles = int(plan["unpack_cycles"])
    if cycles and dtype == torch.float16 and not shape.single_stage:
        cycles += BALANCE_CYCLES * balance_launches(shape.num_paths)
    return cycles
