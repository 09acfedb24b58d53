"""The core library through ctypes: build information, instruction sets, plans, and packing on numpy arrays.

No extension module is compiled for it, so that one build serves every version of Python. Importing this
module loads the library; :func:`littlebit2_kernels._native.core` does so with errors that help. Structs are
those of ``littlebit2.h`` and ``cuda.h`` (tests/project/clients/test_abi.py compares the layouts).
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint64, c_void_p, sizeof
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..format import FORMAT_VERSION, MAX_PATHS, words_per_row

__all__ = [
    "STRUCTS",
    "compiler",
    "cpu_isa",
    "cpu_isas",
    "cuda_archs",
    "format_version",
    "pack_signs",
    "plan_cpu",
    "plan_grouped_cuda",
    "plan_prepacked_cpu",
    "set_cpu_isa",
    "unpack_signs",
    "version",
]

_FOLDER = Path(__file__).resolve().parents[1] / "lib"
_OK, _INVALID_ARGUMENT = 0, 1
#: lb2_dtype, and what numpy knows the elements as: it has no bfloat16, so 16-bit floats are patterns.
_DTYPES: dict[str, tuple[int, npt.DTypeLike]] = {
    "float32": (0, np.dtype(np.float32)),
    "float16": (1, np.dtype(np.int16)),
    "bfloat16": (2, np.dtype(np.int16)),
    "int8": (3, np.dtype(np.int8)),
}
_ISA_AUTO, _ISA_SCALAR = 0, 1
_KINDS = {1: "convert", 2: "decode", 3: "gemm", 4: "fused"}


class _Struct(ctypes.Structure):
    """A struct whose first field is its own size."""

    def __init__(self, **values: Any) -> None:
        super().__init__(struct_size=sizeof(self), **values)


class _LayerShape(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("k", c_int64),
        ("n", c_int64),
        ("num_paths", c_int64),
        ("ranks", c_int64 * MAX_PATHS),
        ("shares", c_int32 * MAX_PATHS),
        ("single_stage", c_int32),
    )


class _CpuPlan(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("forward_workspace_bytes", c_int64),
        ("backward_workspace_bytes", c_int64),
        ("token_block", c_int64),
        ("macs", c_int64),
        ("isa", c_int32),
        ("first_stages", c_int32),
    )


_ParallelFor = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p)


class _PrepackedArgs(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("layer", c_void_p),
        ("layer_bytes", c_int64),
        ("m", c_int64),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("dtype", c_int32),
        ("activation", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("parallel_for", _ParallelFor),
        ("parallel_context", c_void_p),
    )


class _PrepackedPlan(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("workspace_bytes", c_int64),
        ("token_block", c_int64),
        ("workers", c_int64),
        ("k", c_int64),
        ("n", c_int64),
        ("isa", c_int32),
        ("activation", c_int32),
    )


class _CudaDevice(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("capability", c_int32),
        ("multiprocessors", c_int32),
        ("shared_bytes", c_int64),
    )


_LAUNCH = (
    *("kind", "stage", "grid_x", "grid_y", "grid_z", "threads", "token_tile", "row_warps"),
    *("split_warps", "chunk_slices", "shared_bytes", "chained", "estimated_cycles", "row_tile"),
)


class _CudaLaunch(ctypes.Structure):
    _fields_ = tuple((name, c_int32) for name in _LAUNCH)


class _CudaPlan(_Struct):
    _fields_ = (
        ("struct_size", c_uint64),
        ("device", _CudaDevice),
        ("workspace_bytes", c_int64),
        ("token_block", c_int64),
        ("macs", c_int64),
        ("activation", c_int32),
        ("one_bit_mma", c_int32),
        ("first_stages", c_int32),
        ("num_launches", c_int32),
        ("launches", _CudaLaunch * 4),
        ("estimated_cycles", c_int64),
        ("unpack_cycles", c_int64),
    )


#: The structs by their names in C.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "lb2_layer_shape": _LayerShape,
    "lb2_cpu_plan": _CpuPlan,
    "lb2_prepacked_args": _PrepackedArgs,
    "lb2_prepacked_plan": _PrepackedPlan,
    "lb2_cuda_device": _CudaDevice,
    "lb2_cuda_launch": _CudaLaunch,
    "lb2_cuda_plan": _CudaPlan,
}

#: Arguments of the functions that return a status.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "lb2_cpu_isa": (POINTER(c_int32),),
    "lb2_cpu_set_isa": (c_int32,),
    "lb2_pack_signs": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64),
    "lb2_unpack_signs": (c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int64),
    "lb2_linear_plan_cpu": (POINTER(_LayerShape), c_int64, c_int32, POINTER(_CpuPlan)),
    "lb2_prepacked_plan_cpu": (POINTER(_PrepackedArgs), POINTER(_PrepackedPlan)),
    "lb2_grouped_plan_cuda": (
        *(POINTER(_LayerShape), c_int64, c_int64, c_int32, c_int32),
        *(POINTER(_CudaDevice), c_void_p, POINTER(_CudaPlan)),
    ),
}


def _load() -> tuple[dict[str, Any], ctypes.CDLL]:
    about: dict[str, Any] = json.loads((_FOLDER / "build.json").read_text("utf-8"))
    library = ctypes.CDLL(str(_FOLDER / about["library"]))
    for name in ("lb2_version", "lb2_last_error", "lb2_isa_name"):
        getattr(library, name).restype = c_char_p
    library.lb2_isa_name.argtypes = library.lb2_cpu_isa_available.argtypes = (c_int32,)
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return about, library


_about, _library = _load()

#: Version of the library, which must be that of the Python package.
version: str = _library.lb2_version().decode()
format_version = FORMAT_VERSION
#: What compiled the library.
compiler: str = _about["compiler"]
#: GPU architectures of the CUDA kernels, or ``None`` if the build has none.
cuda_archs: str | None = _about["cuda_archs"]


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library, name)(*arguments)
    if status != _OK:
        message = _library.lb2_last_error().decode()
        raise ValueError(message) if status == _INVALID_ARGUMENT else RuntimeError(message)


# --- instruction sets ----------------------------------------------------------------------------------


def _isa_name(isa: int) -> str:
    name: str = _library.lb2_isa_name(isa).decode()
    return name


def _isa_names() -> list[str]:
    names: list[str] = []
    while (name := _isa_name(_ISA_AUTO + len(names))) != "unknown":
        names.append(name)
    return names


def cpu_isa() -> str:
    """Instruction set that the CPU kernels use.

    Raises:
        RuntimeError: ``LB2_CPU_ISA`` asks for one that cannot run here.
        ValueError: it names none.
    """
    isa = c_int32()
    _call("lb2_cpu_isa", byref(isa))
    return _isa_name(isa.value)


def cpu_isas() -> list[str]:
    """Instruction sets that were built in and can run on this machine."""
    names = _isa_names()
    return [name for isa, name in enumerate(names) if isa and _library.lb2_cpu_isa_available(isa)]


def set_cpu_isa(isa: str) -> None:
    """Force an instruction set in this process; ``"auto"`` undoes it."""
    names = _isa_names()
    if isa not in names:
        raise ValueError(f"isa must be {', '.join(names[:-1])} or {names[-1]}, got {isa}")
    _call("lb2_cpu_set_isa", names.index(isa))


# --- signs ---------------------------------------------------------------------------------------------


def _row_stride(name: str, array: npt.NDArray[Any], dtype: Any) -> int:
    """Elements between the rows of a matrix whose rows are contiguous."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {np.dtype(dtype)}, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must be two-dimensional, got shape {array.shape}")
    if array.size == 0:  # numpy gives empty arrays any strides
        return array.shape[1]
    if array.shape[1] > 1 and array.strides[1] != array.itemsize:
        raise ValueError(f"{name} must have contiguous rows, got strides {array.strides}")
    if array.shape[0] == 1:
        return array.shape[1]
    if array.strides[0] % array.itemsize:
        raise ValueError(f"{name} must have a row stride of whole elements, got strides {array.strides}")
    return array.strides[0] // array.itemsize


def _check_words(words: npt.NDArray[Any], signs: npt.NDArray[Any], name: str) -> None:
    expected = (signs.shape[0], words_per_row(signs.shape[1]))
    if words.shape != expected:
        raise ValueError(
            f"words must have shape [rows, ceil(cols / 32)] of {name}, {expected}, got {words.shape}"
        )


def _writable(name: str, array: npt.NDArray[Any]) -> int:
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writable, got a read-only array")
    return array.ctypes.data


def pack_signs(negative: npt.NDArray[np.uint8], words: npt.NDArray[np.int32]) -> None:
    """Pack ``negative`` ``[rows, cols]`` (1 for a negative sign) into ``words`` in place."""
    stride, words_stride = _row_stride("negative", negative, np.uint8), _row_stride("words", words, np.int32)
    _check_words(words, negative, "negative")
    rows, cols = negative.shape
    _call(
        *("lb2_pack_signs", negative.ctypes.data, stride, rows, cols),
        *(_writable("words", words), words_stride),
    )


def unpack_signs(words: npt.NDArray[np.int32], out: npt.NDArray[Any], dtype: str) -> None:
    """Expand ``words`` into ``out`` ``[rows, cols]`` in place; 16-bit floats are int16 patterns."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, float16, bfloat16 or int8, got {dtype}")
    code, elements = _DTYPES[dtype]
    words_stride, stride = _row_stride("words", words, np.int32), _row_stride("out", out, elements)
    _check_words(words, out, "out")
    rows, cols = out.shape
    _call(
        *("lb2_unpack_signs", words.ctypes.data, words_stride, rows, cols, code),
        *(_writable("out", out), stride),
    )


# --- plans ---------------------------------------------------------------------------------------------


def _shape(k: int, n: int, ranks: Sequence[int], single_stage: bool, shares: Sequence[int]) -> _LayerShape:
    if len(ranks) > MAX_PATHS or len(shares) != len(ranks):
        raise ValueError(
            f"ranks must hold at most {MAX_PATHS} entries, and shares as many, "
            f"got {len(ranks)} and {len(shares)}"
        )
    return _LayerShape(
        k=k,
        n=n,
        num_paths=len(ranks),
        ranks=tuple(ranks),
        shares=tuple(shares),
        single_stage=int(single_stage),
    )


def _activation_dtype(name: str) -> int:
    if name not in _DTYPES or name == "int8":
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {name}")
    return _DTYPES[name][0]


def plan_cpu(
    m: int, k: int, n: int, ranks: Sequence[int], single_stage: bool, shares: Sequence[int]
) -> dict[str, Any]:
    """Plan a forward call of M tokens on the packed words."""
    shape, plan = _shape(k, n, ranks, single_stage, shares), _CpuPlan()
    _call("lb2_linear_plan_cpu", byref(shape), m, _ISA_AUTO, byref(plan))
    return {
        "isa": _isa_name(plan.isa),
        "token_block": plan.token_block,
        "macs": plan.macs,
        "first_stages": plan.first_stages,
        "forward_workspace_bytes": plan.forward_workspace_bytes,
        "backward_workspace_bytes": plan.backward_workspace_bytes,
    }


#: A plan wants to know that there is one; it is never called.
_never_called = _ParallelFor(lambda *_: 1)


def plan_prepacked_cpu(
    layer: npt.NDArray[np.uint8], m: int, dtype: str, activation: int, threads: int
) -> dict[str, Any]:
    """Plan a forward call of M tokens of a prepacked layer."""
    args, plan = _PrepackedArgs(), _PrepackedPlan()
    args.layer, args.layer_bytes = layer.ctypes.data, layer.size
    args.m, args.dtype, args.activation = m, _activation_dtype(dtype), activation
    args.num_threads, args.parallel_for = threads, _never_called
    _call("lb2_prepacked_plan_cpu", byref(args), byref(plan))
    return {
        "isa": _isa_name(plan.isa),
        "activation": plan.activation,
        "token_block": plan.token_block,
        "workers": plan.workers,
        "workspace_bytes": plan.workspace_bytes,
    }


def _launch(planned: _CudaLaunch) -> dict[str, Any]:
    numbers = {name: getattr(planned, name) for name in _LAUNCH}
    grid = tuple(numbers.pop(f"grid_{axis}") for axis in "xyz")
    return {
        **numbers,
        "kind": _KINDS[planned.kind],
        "grid": grid,
        "chained": bool(planned.chained),
    }


def plan_grouped_cuda(
    m: int,
    k: int,
    layers: Sequence[tuple[int, Sequence[int], bool, Sequence[int]]],
    dtype: str,
    activation: int,
    capability: int,
    multiprocessors: int,
    shared_bytes: int,
) -> dict[str, Any]:
    """Plan a forward call of M tokens of layers on one input, on a GPU of these properties.

    Args:
        m: tokens.
        k: columns of the input.
        layers: of each its rows, ranks, whether it has a single stage, and shares.
        dtype: of the activations.
        activation: an lb2_activation.
        capability: as in :class:`littlebit2_kernels.gpu.GpuProperties`, like what follows.
        multiprocessors: of the GPU.
        shared_bytes: of a block, at most.
    """
    shapes = (_LayerShape * len(layers))(
        *(_shape(k, n, ranks, single, shares) for n, ranks, single, shares in layers)
    )
    device = _CudaDevice(capability=capability, multiprocessors=multiprocessors, shared_bytes=shared_bytes)
    plan = _CudaPlan()
    _call(
        *("lb2_grouped_plan_cuda", shapes, len(layers), m, _activation_dtype(dtype), activation),
        *(byref(device), None, byref(plan)),
    )
    return {
        "workspace_bytes": plan.workspace_bytes,
        "token_block": plan.token_block,
        "macs": plan.macs,
        "activation": plan.activation,
        "one_bit_mma": bool(plan.one_bit_mma),
        "first_stages": plan.first_stages,
        "launches": [_launch(plan.launches[i]) for i in range(plan.num_launches)],
        "estimated_cycles": plan.estimated_cycles,
        "unpack_cycles": plan.unpack_cycles,
    }
