"""Loads the library of operators and registers what Python adds to it: fakes, gradients, and ``dense``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from .._native import load_cuda_ops, load_ops
from . import attention, dense, fused, grouped, int8, joined, packed, prepacked, rotary

__all__ = ["eager_operators", "load", "load_for", "load_operator"]

_lock = threading.Lock()
_registered = False
#: What :func:`load_operator` has loaded, by name; for CUDA tensors there may be more to load.
eager_operators: dict[str, Callable[..., Any]] = {}


def load(device_type: str = "cpu") -> None:
    """Define ``torch.ops.littlebit2.*`` in this process: load the library, register fakes and autograd.

    Called on first use by everything in this package; call it yourself before running an exported
    or AOTInductor-compiled program that uses the operators. Later calls do nothing.

    Args:
        device_type: ``"cuda"`` loads the kernels for CUDA tensors too.

    Raises:
        NativeLibraryError: a compiled library is missing or cannot be loaded.
    """
    global _registered
    if not _registered:
        with _lock:
            if not _registered:
                load_ops()
                for operators in (packed, prepacked, dense, grouped, joined, fused, int8, attention, rotary):
                    operators.register()
                _registered = True
    if device_type == "cuda":
        load_cuda_ops()


def _load_while_tracing() -> bool:
    load()
    return True


def _load_cuda_while_tracing() -> bool:
    load("cuda")
    return True


# Run at trace time, leave nothing in the graph. This is what torch.compiler.assume_constant_result marks a
# function with; calling that would import the compiler (a second) together with this package.
_load_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_load_cuda_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_for(x: torch.Tensor) -> None:
    """:func:`load` what the device of ``x`` needs, also while tracing."""
    if torch.compiler.is_compiling():
        if x.is_cuda:
            _load_cuda_while_tracing()
        else:
            _load_while_tracing()
    else:
        load("cuda" if x.is_cuda else "cpu")


def load_operator(name: str, x: torch.Tensor) -> Callable[..., Any]:
    """Load ``torch.ops.littlebit2.<name>`` for calls on ``x`` that are not traced."""
    load_for(x)
    operator = eager_operators.get(name)
    if operator is None:
        # What the operator calls in C++: a call through torch.ops spends half a microsecond in Python.
        operator = eager_operators[name] = getattr(torch.ops.littlebit2, name).default._op
    return operator
