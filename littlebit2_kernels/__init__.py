"""Inference kernels for sub-1-bit linear layers (LittleBit, LittleBit-2) with PyTorch bindings.

Importing is free: the native library is loaded on first use.
"""

from ._native import NativeLibraryError, get_include, get_library_dir
from .dispatch import BackendUnavailableError, Explanation, explain
from .format import FORMAT_VERSION, PackedLinear, PackedPath
from .linear import LittleBitLinear
from .ops import littlebit_linear, load
from .packing import pack_signs, unpack_signs
from .state import packed_from_state, packed_to_state
from .version import __version__

__all__ = [
    "FORMAT_VERSION",
    "BackendUnavailableError",
    "Explanation",
    "LittleBitLinear",
    "NativeLibraryError",
    "PackedLinear",
    "PackedPath",
    "__version__",
    "explain",
    "get_include",
    "get_library_dir",
    "littlebit_linear",
    "load",
    "pack_signs",
    "packed_from_state",
    "packed_to_state",
    "unpack_signs",
]
