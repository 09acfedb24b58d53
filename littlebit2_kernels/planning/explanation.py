"""What a call will do, without doing it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._native import NativeLibraryError, core
from ..dispatch import ACTIVATIONS, BackendUnavailableError, Call, choose, costs_on_cpu
from ..format import MAX_DIM, LayerShape, PackedLinear
from ..functional import check_x
from ..gpu import GpuProperties, gpu_properties
from ..ops.operands import ACTIVATION_DTYPES
from ..prepacked import PrepackedLinear, prepack
from ..triton.backend import TritonLaunch, plan_triton
from .cpu import CpuMachine, cpu_machine, product_dtype
from .native import plan_cpu, plan_cuda, unpack_cycles

__all__ = ["Explanation", "Launch", "explain"]

#: Fewest tokens that int8 uses tiles for (csrc/cpu/prepacked/tiles/kernels.h).
_TILE_TOKENS = 16


@dataclass(frozen=True)
class Launch:
    """One launch of a CUDA kernel.

    Attributes:
        kind: ``"convert"`` turns the activations of many tokens into what the tensor cores take, once for all
            blocks; ``"decode"`` multiplies signs by activations; ``"gemm"`` does so for more than 16 tokens;
            ``"fused"`` runs both stages.
        stage: 0, or 1 for U of a two-stage layer.
        grid: (row tiles, column splits, token tiles). A row tile has ``16 * row_warps`` rows, in a GEMM
            ``row_tile``; with clusters, the second number counts the blocks of a cluster.
        threads: threads per block.
        token_tile: tokens per block.
        row_warps: warps per decode block that have rows of their own; 0 in other kernels, as the next two.
        split_warps: warps that share rows and split their columns.
        chunk_slices: slices of 512 columns whose activations are in shared memory at once.
        shared_bytes: shared memory per block.
        chained: whether it may start before the previous kernel has ended (programmatic dependent launch).
        estimated_cycles: clock cycles by the planner's estimate, for one token, or above 16 tokens for all of
            a round; not a measurement.
        row_tile: rows per GEMM block; 0 in other kernels.
    """

    kind: str
    stage: int
    grid: tuple[int, int, int]
    threads: int
    token_tile: int
    row_warps: int
    split_warps: int
    chunk_slices: int
    shared_bytes: int
    chained: bool
    estimated_cycles: int
    row_tile: int

    def __str__(self) -> str:
        fields = {**vars(self), "grid": " x ".join(map(str, self.grid))}
        return ", ".join(f"{name} {value}" for name, value in fields.items())


@dataclass(frozen=True)
class Explanation:
    """What a call of :func:`littlebit2_kernels.littlebit_linear` does; ``str()`` prints it.

    Attributes:
        backend: the backend that runs.
        reason: why it was chosen.
        tokens: M.
        macs: sign-accumulate operations, all stages and paths.
        packed_bytes: bytes of the layer that one pass reads.
        kernels: on the CPU ``"lookup"`` or ``"tiles"`` (prepacked layers), or ``"portable"`` (packed words);
            on CUDA ``"bit planes"`` (1-bit tensor cores), ``"sign halves"`` (float16 tensor cores),
            ``"gemm"`` or ``"fused"`` (both stages in one launch); with Triton ``"gemv"``, ``"fused"`` (both
            stages of a GEMV), ``"gemm"`` or ``"xnor"``; with ``blas`` ``"matrix products"``; else ``None``.
        activation: how activations enter the sums, ``"auto"`` resolved; ``None`` for ``blas`` and
            ``reference``.
        isa: CPU instruction set, or ``None`` for other backends.
        threads: threads that get work (prepacked layers), or that torch offers the call.
        token_block: tokens that one pass over the packed words serves.
        workspace_bytes: scratch memory of the forward call; for ``blas`` the dense factors.
        first_stages: first stages computed (paths that share one count once).
        estimated_cycles: for more than 16 tokens on CUDA, clock cycles by the planner's estimate; not a
            measurement. On the CPU, for the tokens from which ``auto`` compares estimates, cycles of a core.
        unpack_cycles: the same for ``backend="blas"``; ``None`` for float32 on CUDA and float16 on the CPU.
        gpu: the GPU that the call is planned for, or ``None``.
        machine: what the estimates know of the CPU, or ``None``.
        launches: what is launched, in order (on CUDA, for the first ``token_block`` tokens); empty for other
            backends than CUDA and Triton.
    """

    backend: str
    reason: str
    tokens: int
    macs: int
    packed_bytes: int
    kernels: str | None = None
    activation: str | None = None
    isa: str | None = None
    threads: int | None = None
    token_block: int | None = None
    workspace_bytes: int | None = None
    first_stages: int | None = None
    estimated_cycles: int | None = None
    unpack_cycles: int | None = None
    gpu: GpuProperties | None = None
    machine: CpuMachine | None = None
    launches: tuple[Launch | TritonLaunch, ...] = ()

    def __str__(self) -> str:
        single = {name: value for name, value in vars(self).items() if name != "launches"}
        rows = [(name, value) for name, value in single.items() if value is not None]
        rows += [(f"launch {index}", launch) for index, launch in enumerate(self.launches, 1)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def explain(
    x: torch.Tensor | Sequence[int],
    packed: PackedLinear | PrepackedLinear,
    backend: str = "auto",
    activation: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    gpu: GpuProperties | str | None = None,
) -> Explanation:
    """Say what ``littlebit_linear(x, packed, backend, activation)`` would do, without doing it.

    Args:
        x: the activations ``[..., K]``, or just their shape.
        packed: the layer, packed or prepacked.
        backend: as for :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.
        dtype: dtype of ``x`` where only its shape is given; float32 by default.
        gpu: plan for this GPU, which need not exist here: its properties, or a name of
            :data:`littlebit2_kernels.gpu.GPUS` such as ``"H200"``. Every backend is taken to be installed
            there; ``backend`` must be ``"auto"``, ``"cuda"``, ``"triton"`` or ``"blas"``.

    Raises:
        TypeError: ``x`` is a tensor of an unsupported dtype, or ``packed`` not a layer.
        ValueError: the last dimension is not K, a dimension is out of range, devices differ, or the name of
            the backend, of the activation or of the GPU is unknown or not served.
        BackendUnavailableError: the backend cannot run, or not on such a GPU.
    """
    if not isinstance(packed, PackedLinear | PrepackedLinear):
        raise TypeError(f"packed must be a PackedLinear or a PrepackedLinear, got {type(packed).__name__}")
    shape = packed.shape
    tokens = _tokens(x, shape, packed.device)
    call_dtype = _dtype_of(x, dtype)
    prepacked = isinstance(packed, PrepackedLinear)
    call = Call(shape, tokens, call_dtype, packed.device, backend, activation, prepacked=prepacked, gpu=gpu)
    choice = choose(call)
    common: dict[str, Any] = {
        "backend": choice.backend,
        "reason": choice.reason,
        "tokens": tokens,
        "macs": tokens * shape.macs,
        "packed_bytes": packed.nbytes,
    }
    costs = costs_on_cpu(call) if gpu is None else None
    if costs is not None:
        own = costs.prepacked if choice.prepack else costs.own
        common |= {
            "estimated_cycles": round(costs.own if own is None else own),
            "unpack_cycles": None if math.isinf(costs.blas) else round(costs.blas),
            "machine": cpu_machine(),
        }
    if choice.backend == "reference":
        return Explanation(**common)
    if choice.backend == "blas":
        on_cpu = gpu is None and packed.device.type == "cpu"
        return Explanation(
            **common,
            kernels="matrix products",
            workspace_bytes=shape.factor_elements
            * (product_dtype(call_dtype) if on_cpu else call_dtype).itemsize,
            first_stages=shape.num_paths,  # shared ones are dequantized for each path
        )
    if choice.backend == "triton":
        plan = plan_triton(shape, tokens, call_dtype, choice.activation, _target(packed, gpu))
        return Explanation(**common, **{**plan, "launches": tuple(plan["launches"])})
    try:
        core()
    except NativeLibraryError as error:
        raise BackendUnavailableError(f"backend {choice.backend!r} cannot run: {error}") from error
    if choice.backend == "cuda":
        properties = gpu_properties(_target(packed, gpu))
        return _of_cuda(common, shape, call_dtype, choice.activation, properties)
    if choice.prepack and isinstance(packed, PackedLinear):
        packed = prepack(packed)
    return _of_cpu(common, packed, call_dtype, choice.activation)


def _target(
    packed: PackedLinear | PrepackedLinear, gpu: GpuProperties | str | None
) -> GpuProperties | torch.device:
    return packed.device if gpu is None else gpu_properties(gpu)


def _of_cuda(
    common: dict[str, Any], shape: LayerShape, dtype: torch.dtype, activation: str, gpu: GpuProperties
) -> Explanation:
    try:
        plan = plan_cuda(shape, common["tokens"], dtype, ACTIVATIONS[activation], gpu)
    except RuntimeError as error:
        raise BackendUnavailableError(f"backend 'cuda' cannot run on {gpu}: {error}") from error
    return Explanation(
        **common,
        kernels=_cuda_kernels(plan),
        activation=_activation_name(plan),
        token_block=plan["token_block"],
        workspace_bytes=plan["workspace_bytes"],
        first_stages=plan["first_stages"],
        estimated_cycles=plan["estimated_cycles"] or None,
        unpack_cycles=unpack_cycles(plan, dtype, shape) or None,
        gpu=gpu,
        launches=tuple(Launch(**launch) for launch in plan["launches"]),
    )


def _of_cpu(
    common: dict[str, Any], packed: PackedLinear | PrepackedLinear, dtype: torch.dtype, activation: str
) -> Explanation:
    if isinstance(packed, PrepackedLinear):
        plan = core().plan_prepacked_cpu(
            packed.layer.numpy(),
            common["tokens"],
            str(dtype).removeprefix("torch."),
            ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        name = _activation_name(plan)
        tiles = plan["isa"] == "amx" and (
            name == "int8x2" or (name == "int8" and common["tokens"] >= _TILE_TOKENS)
        )
        return Explanation(
            **common,
            kernels="tiles" if tiles else "lookup",
            activation=name,
            isa=plan["isa"],
            threads=plan["workers"],
            token_block=plan["token_block"],
            workspace_bytes=plan["workspace_bytes"],
            first_stages=len(packed.shape.own_rows),
        )
    plan = plan_cpu(packed.shape, common["tokens"])
    return Explanation(
        **common,
        kernels="portable",
        activation=activation,
        isa=plan["isa"],
        threads=torch.get_num_threads(),
        token_block=plan["token_block"],
        workspace_bytes=plan["forward_workspace_bytes"],
        first_stages=plan["first_stages"],
    )


def _cuda_kernels(plan: dict[str, Any]) -> str:
    kind: str = plan["launches"][-1]["kind"]
    if kind in ("gemm", "fused"):
        return kind
    return "bit planes" if plan["one_bit_mma"] else "sign halves"


def _activation_name(plan: dict[str, Any]) -> str:
    return next(name for name, value in ACTIVATIONS.items() if value == plan["activation"])


def _dtype_of(x: torch.Tensor | Sequence[int], dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(x, torch.Tensor):
        if dtype not in (None, x.dtype):
            raise ValueError(f"dtype must be that of x, {x.dtype}, or not be given, got {dtype}")
        dtype = x.dtype
    elif dtype is None:
        dtype = torch.float32
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return dtype


def _tokens(x: torch.Tensor | Sequence[int], layer: LayerShape, device: torch.device) -> int:
    if isinstance(x, torch.Tensor):
        check_x(x, layer, device)
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(x)
    if not shape or shape[-1] != layer.in_features:
        raise ValueError(f"x.size(-1) must equal K={layer.in_features}, got shape {list(shape)}")
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    if min(shape) < 0 or tokens > MAX_DIM:
        raise ValueError(f"x must have between 0 and {MAX_DIM} tokens, got shape {list(shape)}")
    return tokens
