"""What a call will do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._native import NativeLibraryError, core
from .dispatch import (
    ACTIVATIONS,
    BackendUnavailableError,
    check_activation,
    check_activation_mode,
    choose_backend,
    has_many_tokens,
)
from .format import MAX_DIM, PackedLinear
from .functional import shape_of
from .gpu import GpuProperties, gpu_properties
from .ops.balance import balanced, find_balance
from .ops.operands import ACTIVATION_DTYPES
from .prepacked import PrepackedLinear
from .prompts import prompt_backend, unpack_cycles
from .triton.backend import TritonLaunch, plan_triton

__all__ = ["Explanation", "Launch", "explain"]

#: Why ``auto`` chose a backend.
_REASONS = {
    "cpu": "native kernels for {} tensors",
    "cuda": "native kernels for {} tensors",
    "triton": "Triton kernels: no native ones for these {} tensors, or more tokens than those are made for",
    "blas": "unpacking is estimated to be faster for so many tokens than kernels for {} tensors",
    "reference": "",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a CUDA kernel.

    Attributes:
        kind: ``"convert"`` turns the activations of many tokens into what the tensor cores take, once for all
            blocks; ``"decode"`` multiplies signs by activations, ``"gemm"`` does so for more than 16 tokens,
            ``"fused"`` in both stages at once.
        stage: 0, or 1 for U of a layer with two stages.
        grid: tiles of ``16 * row_warps`` rows, of a GEMM of ``row_tile``; parts that the columns are split
            into, or blocks of a cluster, which share them; blocks of ``token_tile`` tokens.
        threads: of a block.
        token_tile: tokens of a block.
        row_warps: warps of a decode block with rows of their own; 0, as the two that follow, of others.
        split_warps: warps that share rows and split their columns.
        chunk_slices: slices of 512 columns whose activations are in shared memory at once.
        shared_bytes: shared memory of a block.
        chained: whether it may start before the kernel before it has ended; it waits.
        estimated_cycles: clock cycles by the planner's estimate, of one token, or of a whole round of more
            than 16; not a measurement.
        row_tile: rows of a GEMM block; 0 of others.
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
        tokens: M of the call.
        macs: sign-accumulate operations, all stages and paths.
        packed_bytes: bytes of the layer that one pass reads.
        kernels: on the CPU ``"lookup"`` on a prepacked layer and ``"portable"`` on the packed words; on CUDA
            ``"bit planes"`` (1-bit tensor cores), ``"sign halves"`` (float16 ones), ``"gemm"`` and
            ``"fused"`` (both stages in one launch); of Triton
            ``"gemv"`` (in one launch ``"fused"``), ``"gemm"`` or ``"xnor"``; of ``blas``
            ``"matrix products"``; else ``None``.
        activation: how activations enter the sums, ``"auto"`` resolved.
        isa: CPU instruction set, or ``None`` for other backends.
        threads: threads that get work of a prepacked layer, or that torch offers the call.
        token_block: tokens that one pass over the packed words serves.
        workspace_bytes: scratch memory of the forward call; of ``blas`` its factors.
        first_stages: first stages computed (paths that share one count once).
        estimated_cycles: of more than 16 tokens on CUDA, clock cycles by the planner's estimate; no
            measurement.
        unpack_cycles: the same of ``backend="blas"``; of float16, for a layer that fits; not of float32.
        gpu: the GPU that the call is planned for, or ``None``.
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
        dtype: of ``x`` where only its shape is given; float32 by default.
        gpu: plan for this GPU wherever the layer is, be there one or not: its properties, or a name of
            :data:`littlebit2_kernels.gpu.GPUS` such as ``"H200"``. ``backend`` must be ``"auto"``, which is
            then what it would be there with all backends installed, ``"cuda"``, ``"triton"`` or ``"blas"``.

    Raises:
        TypeError: ``x`` is a tensor of an unsupported dtype, or ``packed`` not a layer.
        ValueError: the last dimension is not K, a dimension is out of range, devices differ, or the name of
            the backend, of the activation or of the GPU is unknown or not served.
        BackendUnavailableError: the backend cannot run, or not on such a GPU.
    """
    if not isinstance(packed, PackedLinear | PrepackedLinear):
        raise TypeError(f"packed must be a PackedLinear or a PrepackedLinear, got {type(packed).__name__}")
    tokens = _tokens(x, packed)
    dtype_name = _dtype_name(x, dtype)
    call_dtype: torch.dtype = getattr(torch, dtype_name)
    chosen, reason = _choose(packed, tokens, call_dtype, backend, activation, gpu)
    prepacked = isinstance(packed, PrepackedLinear)
    check_activation_mode(activation, chosen, prepacked)
    leaders = packed.shares if isinstance(packed, PrepackedLinear) else packed.leaders
    stages = [rank for p, rank in enumerate(packed.ranks) if leaders[p] == p]
    macs = tokens * sum(stages) * packed.in_features
    if not packed.single_stage:
        macs += tokens * sum(packed.ranks) * packed.out_features
    common: dict[str, Any] = {
        "backend": chosen,
        "reason": f"asked for by name ({backend!r})" if backend != "auto" and gpu is None else reason,
        "tokens": tokens,
        "macs": macs,
        "packed_bytes": packed.nbytes,
    }
    shapes = (
        tokens,
        packed.in_features,
        packed.out_features,
        list(packed.ranks),
        packed.single_stage,
        list(leaders),
    )
    if chosen == "triton":
        target = packed.device if gpu is None else gpu_properties(gpu)
        plan = plan_triton(*shapes, dtype_name, activation, target)
        return Explanation(**common, **{**plan, "launches": tuple(plan["launches"])})
    if chosen in ("blas", "reference"):
        return _of_torch(common, packed, call_dtype)
    try:
        native = core()
    except NativeLibraryError as error:
        raise BackendUnavailableError(f"backend {chosen!r} cannot run: {error}") from error
    if chosen == "cuda":
        properties = gpu_properties(packed.device if gpu is None else gpu)
        try:
            plan = native.plan_cuda(*shapes, dtype_name, ACTIVATIONS[activation], *properties.for_cuda())
        except RuntimeError as error:
            raise BackendUnavailableError(f"backend 'cuda' cannot run on {properties}: {error}") from error
        return Explanation(
            **common,
            kernels=_cuda_kernels(plan),
            activation=_activation_name(plan),
            token_block=plan["token_block"],
            workspace_bytes=plan["workspace_bytes"],
            first_stages=plan["first_stages"],
            estimated_cycles=plan["estimated_cycles"] or None,
            unpack_cycles=unpack_cycles(plan, call_dtype, packed.single_stage) or None,
            gpu=properties,
            launches=tuple(Launch(**launch) for launch in plan["launches"]),
        )
    if isinstance(packed, PrepackedLinear):
        plan = native.plan_prepacked_cpu(
            packed.layer.numpy(), tokens, dtype_name, ACTIVATIONS[activation], torch.get_num_threads()
        )
        return Explanation(
            **common,
            kernels="lookup",
            activation=_activation_name(plan),
            isa=plan["isa"],
            threads=plan["workers"],
            token_block=plan["token_block"],
            workspace_bytes=plan["workspace_bytes"],
            first_stages=len(stages),
        )
    plan = native.plan_cpu(*shapes)
    return Explanation(
        **common,
        kernels="portable",
        activation="exact",
        isa=plan["isa"],
        threads=torch.get_num_threads(),
        token_block=plan["token_block"],
        workspace_bytes=plan["forward_workspace_bytes"],
        first_stages=plan["first_stages"],
    )


def _choose(
    packed: PackedLinear | PrepackedLinear,
    tokens: int,
    dtype: torch.dtype,
    backend: str,
    activation: str,
    gpu: GpuProperties | str | None,
) -> tuple[str, str]:
    """The backend of the call, and why."""
    reasons: list[str] = []
    if gpu is None:
        device = packed.device
        chosen = choose_backend(
            *(backend, device.type, tokens, activation),
            lambda: _of_prompt(packed, tokens, dtype, device, reasons),
        )
        return chosen, "; ".join([_REASONS[chosen].format(device.type), *reasons])
    if backend not in ("auto", "blas", "cuda", "triton"):
        raise ValueError(
            f"backend must be 'auto', 'blas', 'cuda' or 'triton' where gpu is given, got {backend!r}"
        )
    if isinstance(packed, PrepackedLinear):
        raise ValueError("packed must be a PackedLinear where gpu is given: prepacked layers are the CPU's")
    planned = f"planned for gpu={gpu!r}"
    if backend != "auto":
        return backend, planned
    chosen = "cuda"
    if activation == "auto" and has_many_tokens(tokens):
        chosen = _of_prompt(packed, tokens, dtype, gpu, reasons)
    return chosen, "; ".join([planned, _REASONS[chosen].format("cuda"), *reasons])


def _of_prompt(
    packed: PackedLinear | PrepackedLinear,
    tokens: int,
    dtype: torch.dtype,
    gpu: GpuProperties | torch.device | str,
    reasons: list[str],
) -> str:
    """``prompt_backend`` of the call; adds to ``reasons`` why the layer's scales are against unpacking."""
    sizes = (tokens, dtype, *shape_of(packed), gpu)
    best = prompt_backend(*sizes)
    if best != "blas" or dtype != torch.float16 or isinstance(packed, PrepackedLinear):
        return best
    found = find_balance(packed.operands)
    problem = "the scales were not read yet" if found is None else found.problem
    if problem is None:
        return best
    reasons.append(f"unpacking would be faster by its estimate, but does not fit float16: {problem}")
    return prompt_backend(*sizes, packed.operands)


def _of_torch(
    common: dict[str, Any], packed: PackedLinear | PrepackedLinear, dtype: torch.dtype
) -> Explanation:
    """Of a backend made of torch's products: ``reference``, or ``blas``, which shares no first stages."""
    if common["backend"] == "reference":
        return Explanation(**common)
    if dtype == torch.float16:
        balanced((packed.unpack() if isinstance(packed, PrepackedLinear) else packed).operands)
    elements = packed.in_features * packed.out_features
    if not packed.single_stage:
        elements = sum(packed.ranks) * (packed.in_features + packed.out_features)
    return Explanation(
        **common,
        kernels="matrix products",
        workspace_bytes=elements * dtype.itemsize,
        first_stages=len(packed.ranks),
    )


def _cuda_kernels(plan: dict[str, Any]) -> str:
    kind: str = plan["launches"][-1]["kind"]
    if kind in ("gemm", "fused"):
        return kind
    return "bit planes" if plan["one_bit_mma"] else "sign halves"


def _activation_name(plan: dict[str, Any]) -> str:
    return next(name for name, value in ACTIVATIONS.items() if value == plan["activation"])


def _dtype_name(x: torch.Tensor | Sequence[int], dtype: torch.dtype | None) -> str:
    if isinstance(x, torch.Tensor):
        if dtype not in (None, x.dtype):
            raise ValueError(f"dtype must be that of x, {x.dtype}, or not be given, got {dtype}")
        dtype = x.dtype
    elif dtype is None:
        dtype = torch.float32
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    return str(dtype).removeprefix("torch.")


def _tokens(x: torch.Tensor | Sequence[int], packed: PackedLinear | PrepackedLinear) -> int:
    if isinstance(x, torch.Tensor):
        check_activation(x, packed.in_features, packed.device)
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(x)
    if not shape or shape[-1] != packed.in_features:
        raise ValueError(f"x.size(-1) must equal K={packed.in_features}, got shape {list(shape)}")
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    if min(shape) < 0 or tokens > MAX_DIM:
        raise ValueError(f"x must have between 0 and {MAX_DIM} tokens, got shape {list(shape)}")
    return tokens
