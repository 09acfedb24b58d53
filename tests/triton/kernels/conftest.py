"""One suite for both: on a GPU, and in Triton's interpreter (test_interpreter.py starts that session)."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels.triton.backend import interpreting, no_triton_reason

if interpreting():
    # With every launch and every call of a device function, the interpreter patches triton.language anew, and
    # it checks all integer arithmetic for overflow: together most of its time. Once for each module will do.
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang
    _patched: set[str] = set()

    class _Kept:
        def restore(self) -> None:
            pass

    def _patch_once(fn):
        if fn.__module__ not in _patched:
            _patched.add(fn.__module__)
            _patch(fn)
        return _Kept()

    interpreter._patch_lang = _patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU, or in the interpreter the CPU; a visible skip without both."""
    if interpreting():
        return torch.device("cpu")
    reason = no_triton_reason("cuda")
    if reason is not None:
        pytest.skip(f"{reason} (test_interpreter.py runs this test in the interpreter)")
    return torch.device("cuda", torch.cuda.current_device())
