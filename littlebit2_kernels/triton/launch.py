"""How kernels are launched: visible to ``torch.compile`` while it traces, directly otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._library.triton import is_wrap_triton_enabled, set_wrap_triton_enabled
from triton.runtime.jit import JITFunction

__all__ = ["direct_launches", "is_interpreted", "on_device", "wrap_triton"]


def is_interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` was made for Triton's interpreter: TRITON_INTERPRET was 1 when it was defined."""
    return not isinstance(kernel, JITFunction)


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton`` while a call is traced; else, and in the interpreter, the kernel itself.

    torch looks for calls of this name to find the kernels of an operator.
    """
    if is_wrap_triton_enabled() and not is_interpreted(kernel):
        return torch.library.wrap_triton(kernel)
    return kernel


def direct_launches() -> AbstractContextManager[None]:
    """Launch without tracing."""
    return set_wrap_triton_enabled(False)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to ``device``, whichever is the current one; what is traced is not launched."""
    if device.type == "cuda" and not is_wrap_triton_enabled():
        return torch.cuda.device(device)
    return nullcontext()
