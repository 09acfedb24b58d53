"""The activation modes of the CUDA kernels: what each approximates, and how closely."""

from __future__ import annotations

import torch

from littlebit2_kernels import PackedLinear
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, relative_error, typical_norm
from tests.rounded import rounded_reference

MODES = ("exact", "float16", "int16", "int8", "sign")

#: Relative Frobenius error of a mode over many outputs, both stages, before the rounding of the output.
BOUND = {"exact": 2e-6, "float16": 5e-4, "int16": 5e-4, "int8": 2e-2, "sign": 1e-5}

#: Most tokens of the decode kernels in the modes that have a GEMM for more; bits change above.
SWITCH = 16
GEMM_MODES = ("exact", "float16", "int8")


def expected(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """What ``mode`` approximates, in float64, on the CPU."""
    x, packed = x.cpu(), packed.to("cpu")
    return rounded_reference(x, packed, mode) if mode == "sign" else linear_reference(x, packed)


def error_of(y: torch.Tensor, x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """Relative error of ``y``; results that are small by chance are compared with the typical ones."""
    x, packed = x.cpu(), packed.to("cpu")
    return relative_error(y.cpu(), expected(x, packed, mode), typical_norm(x, packed))


def allowed(dtype: torch.dtype, mode: str, outputs: int) -> float:
    """The bound of a mode plus the rounding of the output.

    The error of a mode is random from output to output: one alone, or the norm of a few, lies further out.
    """
    return BOUND[mode] * (1 + 3 / max(outputs, 1) ** 0.5) + TOLERANCE[dtype]
