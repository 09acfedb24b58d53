"""How kernels are launched: visible to ``torch.compile`` while it traces, directly otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._library.triton import is_wrap_triton_enabled, set_wrap_triton_enabled
from triton.runtime.jit import JITFunction

__all__ = ["direct_launches", "is_interpreted", "wrap_triton"]


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


@contextmanager
def direct_launches(device: torch.device) -> Iterator[None]:
    """Launch without tracing, on ``device``."""
    with set_wrap_triton_enabled(False):
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
