"""Where and in what to compute: a device and a dtype by name, checked before any work."""

from __future__ import annotations

import torch

__all__ = ["check_device", "check_dtype"]


def check_device(device: torch.device | str) -> torch.device:
    """Return the device once it is known to hold a tensor: what comes after takes longer to fail.

    Raises:
        ValueError: there is no such device, or torch cannot use it here; the message says why.
    """
    try:
        wanted = torch.device(device)
        if wanted.type != "meta":
            torch.empty(1, device=wanted)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"device must name one that torch can use here, such as 'cpu', got {str(device)!r} ({reason})"
        ) from error
    if wanted.type == "meta":
        raise ValueError("device must hold values, got 'meta'")
    return wanted


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype of a model, given itself or by name.

    Raises:
        ValueError: it is none, or not of floating point.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return found
