"""The dtype of matrix products in tuning: bfloat16 where the machine multiplies it in hardware."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

__all__ = ["Precision", "check_precision", "products", "resolve_precision"]

Precision = Literal["auto", "float32", "bfloat16"]


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` unless ``precision`` is one of the names above."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return what ``"auto"`` means on a device.

    It is bfloat16 where the hardware multiplies it: twice as fast as float32 with AVX-512 BF16, more with
    AMX. Elsewhere a CPU emulates it, which is slower than float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") else "float32"


def products(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which matrix products are taken in ``precision``, everything else in float32."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bfloat16"
    )
    return context
