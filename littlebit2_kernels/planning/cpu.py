"""A small model of the CPU: what a call of many tokens costs, by the kernels that could run it.

Rates are sign-accumulates per clock cycle of one core. Those of AVX-512, AVX2 and plain C++ were measured on
an Emerald Rapids (docs/performance.md); those of AMX and NEON are counted, or known from other measurements.
Only their ratios matter, and all candidates use the cores alike, so the number of cores is left out.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .._native import core
from ..format import LayerShape

__all__ = ["CpuCosts", "CpuMachine", "cpu_costs", "cpu_machine", "product_dtype"]


class _Isa(NamedTuple):
    """Rates of lookup in exact sums and in int16, and of the kernels on packed words.

    ``elements``: how many times :data:`_ELEMENT` an element costs.
    """

    exact: float
    int16: float
    portable: float
    elements: float


_ISAS = {
    "avx512": _Isa(50.0, 60.0, 17.0, 1.0),
    "avx512vnni": _Isa(50.0, 67.0, 17.0, 1.0),
    "amx": _Isa(50.0, 67.0, 17.0, 1.0),
    "avx2": _Isa(16.0, 24.0, 7.5, 1.3),
    "neon": _Isa(9.0, 24.0, 6.0, 2.0),  # counted for neoverse-n1
    "scalar": _Isa(2.5, 1.9, 1.5, 8.0),
}
#: Two planes of activations on the tiles of AMX: counted for the tiles, measured for what is beside them.
_TILES = 240.0
#: torch's products of float32, by what they run on.
_PRODUCT = {"amx": 24.0, "avx512": 24.0, "avx2": 13.0, "other": 8.0}
#: The same of bfloat16, with AMX and with AVX-512 alone (slower than float32 where it was measured).
_PRODUCT_BFLOAT16 = {"amx": 120.0, "avx512": 13.5}

#: Cycles for each input and output of a token, for each path and besides: scales, tables, rounding.
_ELEMENT = (1.5, 0.6)
_TILES_ELEMENT = (0.35, 0.15)
_PORTABLE_ELEMENT = (4.3, 0.0)
_PRODUCT_ELEMENT = (0.0, 0.5)
#: Cycles for each sign of a layer.
_PREPACK = 0.4
_UNPREPACK = 0.5
#: Cycles for each byte of dequantized factors, where they fit the cache and where they do not.
_DEQUANTIZE_CACHED = 1.1
_DEQUANTIZE = 2.0
#: Cycles of the operators around dequantizing, and of those that bring a prepacked layer back.
_BLAS_CALL = 200_000.0
_UNPREPACK_CALL = 600_000.0


class CpuMachine(NamedTuple):
    """What the model knows of a CPU.

    Attributes:
        isa: the instruction set of our kernels.
        product: what torch's products of factors run on: ``"amx"``, ``"avx512"``, ``"avx2"`` or ``"other"``.
        bfloat16: whether factors in bfloat16 have instructions of their own.
        cache_bytes: of a core's second-level cache.
    """

    isa: str
    product: str
    bfloat16: bool
    cache_bytes: int


class CpuCosts(NamedTuple):
    """Estimated cycles of one core; ``None`` where there is no such candidate.

    Attributes:
        own: our kernels on the layer as it is.
        prepacked: prepacking a packed layer in the call, and lookup.
        blas: dequantizing, and torch's products; infinite for float16, whose products are slow or unknown.
    """

    own: float
    prepacked: float | None
    blas: float


def cpu_machine() -> CpuMachine:
    """Describe this CPU, with the instruction set that our kernels use now.

    Raises:
        NativeLibraryError: the compiled module is missing.
    """
    product, bfloat16, cache_bytes = _hardware()
    return CpuMachine(core().cpu_isa(), product, bfloat16, cache_bytes)


@functools.cache
def _hardware() -> tuple[str, bool, int]:
    known = getattr(torch.cpu, "get_capabilities", None)
    capabilities = {} if known is None else known()
    level = torch.backends.cpu.get_cpu_capability()
    simd = {"AVX512": "avx512", "AVX2": "avx2"}.get(level, "other")
    product = "amx" if capabilities.get("amx_bf16") else simd
    bfloat16 = product == "amx" or (simd == "avx512" and bool(capabilities.get("avx512_bf16")))
    return product, bfloat16, int(capabilities.get("l2_cache_size") or 2**20)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``backend="blas"`` multiplies in on this CPU for x of ``dtype``."""
    return torch.float32 if dtype == torch.bfloat16 and not _hardware()[1] else dtype


@functools.lru_cache(maxsize=4096)
def cpu_costs(
    shape: LayerShape, tokens: int, dtype: torch.dtype, machine: CpuMachine, *, prepacked: bool
) -> CpuCosts:
    """Estimate a call with ``activation="auto"``.

    Args:
        shape: of the layer.
        tokens: M.
        dtype: of the activations.
        machine: from :func:`cpu_machine`.
        prepacked: whether the layer is prepacked.
    """
    isa = _ISAS.get(machine.isa, _ISAS["scalar"])

    def own(rate: float, element: tuple[float, float]) -> float:
        return tokens * (shape.macs / rate + isa.elements * _elements(shape, element))

    exact = own(isa.exact, _ELEMENT)
    blas = _blas(shape, tokens, dtype, machine, prepacked=prepacked)
    if not prepacked:
        portable = own(isa.portable, _PORTABLE_ELEMENT)
        return CpuCosts(portable, exact + shape.macs * _PREPACK, blas)
    if dtype == torch.float32:
        return CpuCosts(exact, None, blas)
    if machine.isa == "amx":
        return CpuCosts(own(_TILES, _TILES_ELEMENT), None, blas)
    return CpuCosts(own(isa.int16, _ELEMENT), None, blas)


def _blas(
    shape: LayerShape, tokens: int, dtype: torch.dtype, machine: CpuMachine, *, prepacked: bool
) -> float:
    if dtype == torch.float16:
        return math.inf
    in_bfloat16 = dtype == torch.bfloat16 and machine.bfloat16
    rate = (_PRODUCT_BFLOAT16 if in_bfloat16 else _PRODUCT)[machine.product]
    factor_bytes = shape.factor_elements * (2 if in_bfloat16 else 4)
    cycles = _BLAS_CALL + factor_bytes * (
        _DEQUANTIZE_CACHED if factor_bytes <= machine.cache_bytes else _DEQUANTIZE
    )
    if prepacked:
        cycles += _UNPREPACK_CALL + shape.macs * _UNPREPACK
    return cycles + tokens * (shape.factor_elements / rate + _elements(shape, _PRODUCT_ELEMENT))


def _elements(shape: LayerShape, element: tuple[float, float]) -> float:
    return (shape.in_features + shape.out_features) * (shape.num_paths * element[0] + element[1])
