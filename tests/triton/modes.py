"""The activation modes of the Triton kernels: what each approximates, and how closely."""

from __future__ import annotations

import torch

from littlebit2_kernels import PackedLinear, littlebit_linear
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, max_allowed_error, relative_error, typical_norm
from tests.rounded import rounded_reference

MODES = ("exact", "float16", "int8", "sign")

#: Relative Frobenius error of a mode, both stages, before the rounding of the output. int8 and sign are
#: compared with float64 arithmetic of their definition, where a rounding may go the other way now and then.
BOUND = {"exact": 2e-6, "float16": 5e-4, "int8": 2e-3, "sign": 1e-5}


def run(x: torch.Tensor, packed: PackedLinear, device: torch.device, mode: str = "auto") -> torch.Tensor:
    """The layer by the Triton backend, on an x of the same strides; the result on the CPU."""
    moved = (
        x if x.device == device else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    )
    if moved is not x:
        moved.copy_(x)
    return littlebit_linear(moved, packed.to(device), backend="triton", activation=mode).cpu()


def expected(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """What ``mode`` approximates, in float64."""
    return rounded_reference(x, packed, mode) if mode in ("int8", "sign") else linear_reference(x, packed)


def error_of(y: torch.Tensor, x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """Relative error of ``y``; results that are small by chance are compared with the typical ones."""
    return relative_error(y, expected(x, packed, mode), typical_norm(x, packed))


def allowed(x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """The bound of a mode plus the rounding of the output; for ``auto``, that or PyTorch's own error."""
    if mode == "auto":
        return max_allowed_error(x, packed, linear_reference(x, packed))
    return BOUND[mode] + TOLERANCE[x.dtype]
