"""Inference kernels for sub-1-bit linear layers (LittleBit, LittleBit-2) with PyTorch bindings.

Importing is free: the native library is loaded on first use.
"""

from ._clone import package_folder

__path__[:] = [package_folder(__path__[0])]

from ._native import (
    NativeLibraryError,
    get_cmake_dir,
    get_include,
    get_library_dir,
    get_pkgconfig_dir,
)
from .decoding.attention import attention
from .decoding.rotary import rotary
from .decoding.step import attention_step
from .dispatch import BackendUnavailableError
from .format import FORMAT_VERSION, PackedLinear, PackedPath
from .functional import littlebit_linear
from .fused.mlp import mlp
from .fused.norm import RMSNorm
from .fusion import LinearGroup, fuse_linears, grouped_linear, unfuse_linears
from .gpu import GpuProperties
from .int8 import Int8Embedding, Int8Linear
from .linear import LittleBitLinear
from .ops.library import load
from .packing import pack_signs, unpack_signs
from .planning.explanation import Explanation, explain
from .prepacked import PrepackedLinear, prepack
from .serving.joined import JoinedLinear
from .serving.slicing import select_rows, slice_columns, slice_rows
from .serving.staged import StagedLinear
from .serving.stages import split_stages
from .state import packed_from_state, packed_to_state
from .version import __version__
from .warming import warmup

__all__ = [
    "FORMAT_VERSION",
    "BackendUnavailableError",
    "Explanation",
    "GpuProperties",
    "Int8Embedding",
    "Int8Linear",
    "JoinedLinear",
    "LinearGroup",
    "LittleBitLinear",
    "NativeLibraryError",
    "PackedLinear",
    "PackedPath",
    "PrepackedLinear",
    "RMSNorm",
    "StagedLinear",
    "__version__",
    "attention",
    "attention_step",
    "explain",
    "fuse_linears",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "get_pkgconfig_dir",
    "grouped_linear",
    "littlebit_linear",
    "load",
    "mlp",
    "pack_signs",
    "packed_from_state",
    "packed_to_state",
    "prepack",
    "rotary",
    "select_rows",
    "slice_columns",
    "slice_rows",
    "split_stages",
    "unfuse_linears",
    "unpack_signs",
    "warmup",
]
