"""Packing and unpacking of signs: the native fast path for CPU tensors and numpy arrays.

The definitions are :func:`littlebit2_kernels.format.pack_signs_reference` and
:func:`~littlebit2_kernels.format.unpack_signs_reference`; results are the same bits.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from ._native import NativeLibraryError, core
from .format import (
    check_signs_input,
    check_words,
    pack_signs_reference,
    unpack_signs_reference,
    words_per_row,
)

__all__ = ["pack_signs", "unpack_signs"]

_NATIVE_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}


@overload
def pack_signs(values: torch.Tensor, *, backend: str = "auto") -> torch.Tensor: ...
@overload
def pack_signs(values: npt.NDArray[Any], *, backend: str = "auto") -> npt.NDArray[np.int32]: ...
def pack_signs(values: Any, *, backend: str = "auto") -> Any:
    """Pack the signs of ``values`` along the last dimension into 32-bit words (packed format v1).

    Args:
        values: tensor or numpy array ``[..., cols]`` of a real dtype. Negative entries become bit 1,
            all others (zero and ``-0.0`` too) bit 0.
        backend: ``"native"``, ``"reference"`` (plain PyTorch), or ``"auto"``: native for CPU data
            where the compiled module is there.

    Returns:
        int32 ``[..., ceil(cols / 32)]``: a tensor on the device of ``values``, or an array.

    Raises:
        TypeError: ``values`` is neither a real tensor nor a real array.
        ValueError: ``values`` has no dimension or contains NaN, or ``backend`` is unknown.
        NativeLibraryError: ``backend="native"`` and the compiled module is missing.
    """
    if isinstance(values, np.ndarray):
        return pack_signs(_as_tensor("values", values), backend=backend).numpy()
    check_signs_input(values)
    if not _use_native(values, backend):
        return pack_signs_reference(values)
    cols = values.shape[-1]
    negative = (values < 0).reshape(values.numel() // cols if cols else 0, cols).contiguous()
    words = torch.empty((negative.shape[0], words_per_row(cols)), dtype=torch.int32)
    core().pack_signs(negative.view(torch.uint8).numpy(), words.numpy())
    return words.reshape(*values.shape[:-1], words_per_row(cols))


@overload
def unpack_signs(
    words: torch.Tensor, cols: int, dtype: torch.dtype = ..., *, backend: str = "auto"
) -> torch.Tensor: ...
@overload
def unpack_signs(
    words: npt.NDArray[np.int32], cols: int, dtype: npt.DTypeLike = ..., *, backend: str = "auto"
) -> npt.NDArray[Any]: ...
def unpack_signs(words: Any, cols: int, dtype: Any = None, *, backend: str = "auto") -> Any:
    """Expand packed words to dense +1 and -1.

    Args:
        words: int32 tensor or numpy array ``[..., ceil(cols / 32)]``.
        cols: number of signs per row.
        dtype: dtype of the result, float32 by default; the native path serves float32, float16,
            bfloat16 and int8.
        backend: as for :func:`pack_signs`.

    Returns:
        ``[..., cols]``, a tensor or an array as ``words`` is.

    Raises:
        TypeError: ``words`` is not int32, or ``dtype`` is not one the requested backend serves.
        ValueError: ``words`` does not hold ``cols`` signs per row, or ``backend`` is unknown.
        NativeLibraryError: ``backend="native"`` and the compiled module is missing.
    """
    if isinstance(words, np.ndarray):
        numpy_dtype = np.dtype(np.float32 if dtype is None else dtype)
        torch_dtype = torch.from_numpy(np.empty(0, numpy_dtype)).dtype
        return unpack_signs(_as_tensor("words", words), cols, torch_dtype, backend=backend).numpy()
    dtype = torch.float32 if dtype is None else dtype
    check_words(words, cols)
    native = _use_native(words, backend)
    if backend == "native" and dtype not in _NATIVE_DTYPES:
        raise TypeError(f"dtype must be one of {list(_NATIVE_DTYPES)} for the native backend, got {dtype}")
    if not native or dtype not in _NATIVE_DTYPES:
        return unpack_signs_reference(words, cols, dtype)
    rows = words.reshape(words.numel() // words.shape[-1] if words.shape[-1] else 0, words.shape[-1])
    out = torch.empty((rows.shape[0], cols), dtype=dtype)
    as_patterns = out.view(torch.int16) if dtype in (torch.float16, torch.bfloat16) else out
    core().unpack_signs(rows.contiguous().numpy(), as_patterns.numpy(), _NATIVE_DTYPES[dtype])
    return out.reshape(*words.shape[:-1], cols)


def _as_tensor(name: str, array: npt.NDArray[Any]) -> torch.Tensor:
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-d array")
    # torch warns of arrays that it could not write to, and takes no negative strides.
    readable = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
    try:
        return torch.from_numpy(readable)
    except TypeError as error:
        raise TypeError(f"{name} must have a real numeric dtype, got {array.dtype}") from error


def _use_native(tensor: torch.Tensor, backend: str) -> bool:
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be 'auto', 'native' or 'reference', got {backend!r}")
    if backend == "reference":
        return False
    if tensor.device.type != "cpu":
        if backend == "native":
            raise ValueError(f"backend='native' packs CPU data only, got a tensor on {tensor.device}")
        return False
    try:
        core()
    except NativeLibraryError:
        if backend == "native":
            raise
        return False
    return True
