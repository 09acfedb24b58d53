"""The only place that decides how a call runs: :func:`choose`. The rule is told in docs/dispatch.md."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._native import NativeLibraryError, core, no_cuda_reason
from .format import MAX_DIM, LayerShape
from .gpu import GpuProperties, gpu_properties
from .planning.cpu import CpuCosts, CpuMachine, cpu_costs, cpu_machine
from .planning.native import plan_cuda, unpack_cycles
from .triton.backend import no_triton_reason

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "BLAS_BYTES",
    "BLAS_MARGIN",
    "BLAS_TOKENS",
    "CPU_TOKENS",
    "CUDA_ACTIVATIONS",
    "CUDA_TOKENS",
    "FEW_TOKENS",
    "PREPACKED",
    "BackendUnavailableError",
    "Call",
    "Choice",
    "call_of",
    "check_activation_mode",
    "choose",
    "choose_for",
    "choose_for_all",
    "choose_for_group",
    "costs_on_cpu",
    "has_many_tokens",
    "may_choose_blas",
    "prefill_backend",
    "unavailable_reason",
]

#: Names that ``backend=`` accepts.
BACKENDS = ("auto", "cpu", "cuda", "triton", "blas", "reference")

#: Names that ``activation=`` accepts, and the lb2_activation (littlebit2.h, cuda.h) of each.
ACTIVATIONS = {"auto": 0, "exact": 1, "int16": 2, "int8": 3, "sign": 4, "float16": 5, "int8x2": 6}

#: Of these, what the CUDA kernels serve.
CUDA_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "int8x2")

#: Most tokens of a call that ``auto`` always gives to the CUDA kernels where these can run.
FEW_TOKENS = 16
#: Fewest tokens of a call on the CPU for which ``auto`` compares estimates: below, a layer would be brought
#: to another form for too little work.
CPU_TOKENS = 64
#: Fewest tokens that ``auto`` dequantizes for on GPUs: below, host time is the larger part of a call.
BLAS_TOKENS = 128
#: How many times another estimate that of our kernels must be, so that noise does not decide.
BLAS_MARGIN = 1.1
#: Most bytes of dense factors that ``auto`` makes; about as much as the kernels' workspace.
BLAS_BYTES = 128 * 2**20
#: Most tokens of a call that are never Triton's where the CUDA kernels can run: launches and latencies weigh
#: more than the rate of the tensor cores, and the launches of the CUDA kernels are chained.
CUDA_TOKENS = 512

#: GPUs that the CUDA kernels can be planned for (csrc/cuda/plan/check.cpp).
_LEAST_CAPABILITY = 80
#: GPUs where mma.sync, which the CUDA kernels use, cannot reach peak throughput (Triton emits wgmma and
#: tcgen05). From instruction counts, not yet measured.
_SLOW_MMA_SYNC = range(90, 120)
#: Dtypes with the full rate of a library's tensor cores.
_BLAS_DTYPES = (torch.float16, torch.bfloat16)

#: What :func:`choose` comes to for a prepacked layer on the CPU, as a table for the path of every such call:
#: the operator's activation by (backend, activation) as asked. Other pairs are not as simple, or errors.
PREPACKED = {
    (backend, name): code
    for backend in ("auto", "cpu")
    for name, code in ACTIVATIONS.items()
    if name != "float16"
}

_ASKED = {name: f"asked for by name ({name!r})" for name in BACKENDS}
_REASONS = {
    "cpu": "native kernels for CPU tensors",
    "cuda": "native kernels for CUDA tensors",
    "triton": "Triton kernels: mma.sync (CUDA kernels) cannot reach peak throughput on this GPU",
    "blas": "for this many tokens, dequantizing and calling torch.matmul is estimated to be faster",
}
_PREPACKS = "native kernels; for this many tokens, prepacking the layer in the call is estimated to be faster"
_NO_NATIVE = "Triton kernels: there are no native kernels for this GPU here"


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for, or the only one that would do, cannot run; the message says why."""


class Call(NamedTuple):
    """What the choice depends on.

    Attributes:
        shape: of the layer.
        tokens: M.
        dtype: of the activations.
        device: of the activations and the layer.
        backend: as asked for, a name of :data:`BACKENDS`.
        activation: as asked for, a name of :data:`ACTIVATIONS`.
        prepacked: whether the layer is prepacked, or will be before it runs on the CPU.
        compiling: whether the call is being traced by ``torch.compile``; then the number of tokens does not
            matter, which would make one graph for few and one for many.
        gpu: what to plan for in place of ``device``, with every backend taken to be installed: properties, or
            a name of :data:`littlebit2_kernels.gpu.GPUS`.
    """

    shape: LayerShape
    tokens: int
    dtype: torch.dtype
    device: torch.device
    backend: str = "auto"
    activation: str = "auto"
    prepacked: bool = False
    compiling: bool = False
    gpu: GpuProperties | str | None = None


class Choice(NamedTuple):
    """How a call runs.

    Attributes:
        backend: a name of :data:`BACKENDS` other than ``"auto"``.
        activation: how activations enter the sums. ``"auto"`` where this is left to the plan of the call (on
            ``cuda`` and ``triton``, and of prepacked layers on the CPU), where there are no modes (``blas``),
            and while compiling.
        reason: why, for people.
        prepack: whether a packed layer on the CPU is prepacked in the call.
    """

    backend: str
    activation: str
    reason: str
    prepack: bool = False


#: Choices for few tokens on the CPU by (backend, activation, prepacked, dtype); nothing else enters them.
_on_cpu: dict[tuple[str, str, bool, torch.dtype], Choice] = {}


def call_of(x: torch.Tensor, shape: LayerShape, backend: str, activation: str, prepacked: bool) -> Call:
    """Describe the call of a layer on ``x`` ``[..., K]``."""
    tokens = x.numel() // shape.in_features
    compiling = torch.compiler.is_compiling()
    return Call(shape, tokens, x.dtype, x.device, backend, activation, prepacked, compiling)


def choose(call: Call) -> Choice:
    """Choose how a call runs; never falls back to a slower backend silently.

    Raises:
        ValueError: a name is unknown, or the backend does not serve the activation for such a layer.
        BackendUnavailableError: the backend cannot run there, with the reason and what would help.
    """
    device_type = call.device.type
    prepack = False
    if call.gpu is not None:
        backend, reason = _choose_planned(call)
    elif call.backend == "auto" and device_type in ("cpu", "meta"):
        backend, reason, prepack = _choose_on_cpu(call)
    else:
        backend, reason = _choose_backend(call, device_type)
    activation = call.activation
    # A layer without values has nothing to prepack; only the shape of the result matters.
    check_activation_mode(activation, backend, call.prepacked or device_type == "meta")
    is_exact = backend == "reference" or (backend == "cpu" and not call.prepacked)
    if activation == "auto" and is_exact and not call.compiling:
        activation = "exact"
    return Choice(backend, activation, reason, prepack)


def has_many_tokens(x: torch.Tensor, shape: LayerShape) -> bool:
    """Whether ``x`` has the tokens from which ``auto`` compares estimates on the CPU."""
    return x.numel() >= CPU_TOKENS * shape.in_features


def choose_for(x: torch.Tensor, shape: LayerShape, backend: str, activation: str, prepacked: bool) -> Choice:
    """:func:`choose` for the call of a layer on ``x``; for few tokens on the CPU no more than a look-up."""
    if not x.is_cpu or torch.compiler.is_compiling() or has_many_tokens(x, shape):
        return choose(call_of(x, shape, backend, activation, prepacked))
    key = (backend, activation, prepacked, x.dtype)
    try:
        known = _on_cpu.get(key)
    except TypeError:  # a name that is no name, which choose refuses
        known = None
    if known is not None:
        return known
    choice = choose(call_of(x, shape, backend, activation, prepacked))
    if choice.backend in ("blas", "cpu", "reference"):  # whether Triton runs there depends on the environment
        _on_cpu[key] = choice
    return choice


def choose_for_group(
    x: torch.Tensor, shapes: Sequence[LayerShape], backend: str, activation: str, prepacked: bool
) -> Choice | None:
    """:func:`choose_for_all` for several layers on ``x``."""
    compiling = torch.compiler.is_compiling()
    if x.is_cpu and (compiling or not has_many_tokens(x, shapes[0])):
        return choose_for(x, shapes[0], backend, activation, prepacked)
    return choose_for_all(call_of(x, shapes[0], backend, activation, prepacked), shapes)


def choose_for_all(call: Call, shapes: Sequence[LayerShape]) -> Choice | None:
    """Choose once for several layers of one input, or return ``None`` if their choices differ.

    Args:
        call: the call of any of them.
        shapes: of all.

    Raises:
        ValueError, BackendUnavailableError: as :func:`choose`.
    """
    if not _by_estimate(call):
        return choose(call)
    choices = {choose(call._replace(shape=shape)) for shape in shapes}
    return choices.pop() if len(choices) == 1 else None


def _choose_backend(call: Call, device_type: str) -> tuple[str, str]:
    asked = call.backend
    if asked != "auto":
        reason = _unsupported(asked, device_type)
        if reason is not None:
            raise BackendUnavailableError(f"backend={asked!r} cannot run: {reason}")
        return asked, _ASKED[asked]
    no_cuda = _unsupported("cuda", device_type)
    if no_cuda is None:
        best = "cuda"
        if _by_estimate(call):
            best = prefill_backend(call.shape, call.tokens, call.dtype, call.device)
            if _unsupported(best, device_type) is not None:
                best = "cuda"
        return best, _REASONS[best]
    no_triton = _unsupported("triton", device_type)
    if no_triton is None:
        return "triton", _NO_NATIVE
    raise BackendUnavailableError(
        f"no kernels for tensors on {device_type}: cuda: {no_cuda}; triton: {no_triton}. Move the "
        "layer and x to the CPU, or ask for backend='reference' (plain PyTorch on unpacked signs: "
        "right, but slow)."
    )


def _choose_on_cpu(call: Call) -> tuple[str, str, bool]:
    own = "cpu", _REASONS["cpu"], False
    costs = costs_on_cpu(call)
    if costs is None:
        return own
    least = costs.own
    if costs.prepacked is not None and BLAS_MARGIN * costs.prepacked < least:
        own, least = ("cpu", _PREPACKS, True), costs.prepacked
    fits = call.shape.factor_elements * torch.float32.itemsize <= BLAS_BYTES
    return ("blas", _REASONS["blas"], False) if fits and BLAS_MARGIN * costs.blas < least else own


def costs_on_cpu(call: Call, machine: CpuMachine | None = None) -> CpuCosts | None:
    """What ``auto`` compares for a call on the CPU (or on ``machine``), or ``None`` if nothing."""
    # First whether it is being compiled: tokens that are compared are tokens that a graph is made for.
    if not _by_estimate(call) or call.device.type != "cpu" or call.tokens > MAX_DIM:
        return None
    try:
        machine = machine or cpu_machine()
    except (NativeLibraryError, ValueError, RuntimeError):  # the call itself says what is wrong
        return None
    return cpu_costs(call.shape, call.tokens, call.dtype, machine, prepacked=call.prepacked)


def _choose_planned(call: Call) -> tuple[str, str]:
    planned = f"planned for gpu={call.gpu!r}"
    if call.backend not in ("auto", "blas", "cuda", "triton"):
        raise ValueError(
            f"backend must be 'auto', 'blas', 'cuda' or 'triton' where gpu is given, got {call.backend!r}"
        )
    if call.prepacked:
        raise ValueError("packed must be a PackedLinear where gpu is given: prepacked layers are the CPU's")
    if call.backend != "auto":
        return call.backend, planned
    gpu = gpu_properties(call.gpu) if call.gpu is not None else None
    if gpu is not None and gpu.maker != "nvidia":
        return "triton", f"{planned}; the CUDA kernels run on NVIDIA's GPUs"
    if gpu is not None and gpu.capability < _LEAST_CAPABILITY:
        return "triton", f"{planned}; the CUDA kernels need compute capability 8.0"
    best = "cuda"
    if _by_estimate(call) and call.gpu is not None:
        best = prefill_backend(call.shape, call.tokens, call.dtype, call.gpu)
    return best, f"{planned}; {_REASONS[best]}"


def _by_estimate(call: Call) -> bool:
    """Whether ``auto`` compares estimates for the call, on the CPU or a GPU where the CUDA kernels run.

    A mode that is named gives the same bits for every number of tokens.
    """
    least = CPU_TOKENS - 1 if call.gpu is None and call.device.type in ("cpu", "meta") else FEW_TOKENS
    return not call.compiling and call.backend == "auto" and call.activation == "auto" and call.tokens > least


def prefill_backend(
    shape: LayerShape, tokens: int, dtype: torch.dtype, gpu: GpuProperties | torch.device | str
) -> str:
    """Name the backend that should be the fastest for many tokens: ``"blas"``, ``"cuda"`` or ``"triton"``.

    docs/dispatch.md tells the rule. It compares the planner's estimates of the CUDA kernels and of
    dequantizing, which are counts, not measurements.

    Args:
        shape: of the layer.
        tokens: M.
        dtype: of the activations.
        gpu: as for :func:`littlebit2_kernels.gpu.gpu_properties`.
    """
    properties = _properties(gpu) if isinstance(gpu, torch.device) else gpu_properties(gpu)
    if tokens < BLAS_TOKENS or properties.capability < _LEAST_CAPABILITY:
        return "cuda"
    ours, dense = _estimates(shape, tokens, dtype, properties)
    # A call without a GEMM (no shared memory for it) has no estimates.
    if (
        dtype in _BLAS_DTYPES
        and shape.factor_elements * dtype.itemsize <= BLAS_BYTES
        and BLAS_MARGIN * dense < ours
    ):
        return "blas"
    if tokens <= CUDA_TOKENS or properties.capability not in _SLOW_MMA_SYNC or 0 < ours <= dense:
        return "cuda"
    return "triton"


def may_choose_blas(call: Call) -> bool:
    """Whether the same call with another number of tokens may go to ``blas`` without being asked to."""
    return (
        call.backend == "auto"
        and call.activation == "auto"
        and call.dtype in _BLAS_DTYPES
        and call.device.type == "cuda"
        and no_cuda_reason() is None
    )


@functools.cache
def _properties(device: torch.device) -> GpuProperties:
    return gpu_properties(device)


# Models have few shapes, and prefills as many lengths as there are requests.
@functools.lru_cache(maxsize=4096)
def _estimates(shape: LayerShape, tokens: int, dtype: torch.dtype, gpu: GpuProperties) -> tuple[int, int]:
    """Cycles of the CUDA kernels, and of dequantizing and torch.matmul; 0 where there is no estimate."""
    plan = plan_cuda(shape, tokens, dtype, ACTIVATIONS["auto"], gpu)
    return plan["estimated_cycles"], unpack_cycles(plan, dtype, shape)


def unavailable_reason(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on a device type, or ``None`` if it can.

    Raises:
        ValueError: ``backend`` is ``"auto"`` or no name in :data:`BACKENDS`.
    """
    reason = _unsupported(backend, device_type)
    if reason is None and backend in ("blas", "cpu"):
        try:
            core()
        except NativeLibraryError as error:
            return str(error)
    return reason


def _unsupported(backend: str, device_type: str) -> str | None:
    # From name and device alone: every call comes here, and a missing library raises by itself.
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device_type in ("cpu", "meta") else f"it runs on CPU tensors, not on {device_type}"
    if backend == "cuda":
        return no_cuda_reason() if device_type == "cuda" else f"it runs on CUDA tensors, not on {device_type}"
    if backend == "triton":
        return no_triton_reason(device_type)
    if backend == "blas":
        if device_type in ("cpu", "meta"):
            return None
        if device_type == "cuda":
            return no_cuda_reason()
        return f"it runs on CPU and CUDA tensors, not on {device_type}"
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def check_activation_mode(activation: str, backend: str, prepacked: bool) -> None:
    """Raise ValueError unless ``activation`` is a name that ``backend`` serves for such a layer."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "auto" or (activation == "exact" and backend != "blas"):
        return
    if activation == "int8x2" and backend in ("cuda", "triton"):
        raise ValueError(
            "activation='int8x2' is served on CPUs with AMX only; on GPUs, 'int16' is as accurate"
        )
    if backend == "cuda":
        return
    if backend == "triton":
        if activation == "int16":
            raise ValueError(
                "activation='int16' is not served by backend='triton'; 'float16' is as accurate there"
            )
        return
    if backend in ("blas", "reference"):
        sums = "torch's sums" if backend == "blas" else "exact sums"
        raise ValueError(f"backend={backend!r} computes {sums} only, got activation={activation!r}")
    if backend == "cpu" and activation == "float16":
        raise ValueError("activation='float16' is served on CUDA only; on the CPU, 'int16' is as accurate")
    if not prepacked:
        raise ValueError(
            f"activation={activation!r} needs a prepacked layer on the CPU: pass "
            "littlebit2_kernels.prepack(packed). LittleBitLinear prepacks itself at the first call, unless "
            "auto_prepack is off or the call is traced: call prepack_() before"
        )
