"""The dtype of matrix products in tuning: bfloat16 where the machine multiplies it faster."""

from __future__ import annotations

import functools
import math
import time
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

__all__ = ["Precision", "check_precision", "products", "resolve_precision"]

Precision = Literal["auto", "float32", "bfloat16"]

#: The product that is timed, how often, and how much faster bfloat16 must be to be worth its rounding.
_SHAPES = ((512, 576), (576, 1536))
_ROUNDS = 8
_MARGIN = 1.25


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` unless ``precision`` is one of the names above."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return what ``"auto"`` means on a device.

    It is bfloat16 where the hardware multiplies it, and that is measured to be faster: AMX and Zen 4 are, an
    Intel CPU with AVX-512 BF16 and without AMX takes twice the time of float32. Elsewhere a CPU emulates it.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    has_products = features.get("avx512_bf16") or features.get("amx_bf16")
    return "bfloat16" if has_products and _is_bfloat16_faster(torch.get_num_threads()) else "float32"


@functools.cache
def _is_bfloat16_faster(threads: int) -> bool:  # torch's, which the products use
    """Compare products of a small model's size on the CPU, in turns; the ratio is about 2, 4 or a half."""
    least = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(_ROUNDS):
        for dtype, before in least.items():
            x, weight = (torch.ones(shape, dtype=dtype) for shape in _SHAPES)
            start = time.perf_counter()
            x @ weight
            least[dtype] = min(before, time.perf_counter() - start)
    return _MARGIN * least[torch.bfloat16] < least[torch.float32]


def products(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which matrix products are taken in ``precision``, everything else in float32."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bfloat16"
    )
    return context
