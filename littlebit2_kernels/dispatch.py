"""Which backend runs a call, and whether it can."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._native import NativeLibraryError, core, no_cuda_reason
from .ops.operands import ACTIVATION_DTYPES
from .triton.backend import no_triton_reason

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FEW_TOKENS",
    "BackendUnavailableError",
    "check_activation",
    "check_activation_mode",
    "choose_backend",
    "has_many_tokens",
    "unavailable_reason",
]

#: Names that ``backend=`` accepts.
BACKENDS = ("auto", "cpu", "cuda", "triton", "blas", "reference")

#: Names that ``activation=`` accepts, and the lb2_activation (littlebit2.h, cuda.h) of each.
ACTIVATIONS = {"auto": 0, "exact": 1, "int16": 2, "int8": 3, "sign": 4, "float16": 5}

#: Most tokens of a call that ``auto`` always gives to the CUDA kernels where these can run.
FEW_TOKENS = 16


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for, or the only one that would do, cannot run; the message says why."""


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
    # By name and device alone: this is on the way of every call, and a missing library speaks for itself.
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


def has_many_tokens(tokens: int) -> bool:
    """Whether a call may be served otherwise than one of few tokens; never while it is being compiled."""
    return not torch.compiler.is_compiling() and tokens > FEW_TOKENS


def choose_backend(
    backend: str,
    device_type: str,
    tokens: int = 1,
    activation: str = "auto",
    of_prompt: Callable[[], str] = lambda: "cuda",
) -> str:
    """Resolve ``backend`` for tensors on ``device_type``; never falls back to a slower one silently.

    ``auto`` takes the native kernels of the device. On a GPU where there are none, as on AMD's, it takes
    Triton's. Where there are, and for more than :data:`FEW_TOKENS` ``tokens``, it takes what ``of_prompt``
    says; but not if ``activation`` names a mode (which then is the same bits for every number of tokens) or
    the call is being compiled (which would make one graph for few and one for many).

    Args:
        backend: a name of :data:`BACKENDS`.
        device_type: ``"cpu"``, ``"cuda"``, ...
        tokens: M of the call.
        activation: a name of :data:`ACTIVATIONS`.
        of_prompt: :func:`littlebit2_kernels.prompts.prompt_backend` of the call; asked where it matters.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: the backend cannot run there, with the reason and what would help.
    """
    if backend != "auto":
        reason = _unsupported(backend, device_type)
        if reason is not None:
            raise BackendUnavailableError(f"backend={backend!r} cannot run: {reason}")
        return backend
    if device_type in ("cpu", "meta"):
        return "cpu"
    no_cuda = _unsupported("cuda", device_type)
    if no_cuda is None:
        if activation != "auto" or not has_many_tokens(tokens):
            return "cuda"
        best = of_prompt()
        return best if _unsupported(best, device_type) is None else "cuda"
    no_triton = _unsupported("triton", device_type)
    if no_triton is None:
        return "triton"
    raise BackendUnavailableError(
        f"no kernels for tensors on {device_type}: cuda: {no_cuda}; triton: {no_triton}. Move the "
        "layer and x to the CPU, or ask for backend='reference' (plain PyTorch on unpacked signs: "
        "right, but slow)."
    )


def check_activation(x: torch.Tensor, in_features: int, device: torch.device) -> None:
    """Raise unless ``x`` is ``[..., K]`` of a supported dtype on ``device``; see ``littlebit_linear``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x.size(-1) must equal K={in_features}, got shape {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on {device} like the packed layer, got {x.device}")


def check_activation_mode(activation: str, backend: str, prepacked: bool) -> None:
    """Raise ValueError unless ``activation`` is a name that ``backend`` serves for such a layer."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "auto" or (activation == "exact" and backend != "blas") or backend == "cuda":
        return
    if backend == "triton":
        if activation == "int16":
            raise ValueError(
                "activation='int16' is not served by backend='triton'; 'float16' is as accurate there"
            )
        return
    if backend in ("blas", "reference"):
        sums = "in the dtype of x" if backend == "blas" else "exact sums"
        raise ValueError(f"backend={backend!r} computes {sums} only, got activation={activation!r}")
    if backend == "cpu" and activation == "float16":
        raise ValueError("activation='float16' is served on CUDA only; on the CPU, 'int16' is as accurate")
    if not prepacked:
        raise ValueError(
            f"activation={activation!r} needs a prepacked layer: pass littlebit2_kernels.prepack(packed), or "
            "use LittleBitLinear, which prepacks itself on the CPU"
        )
