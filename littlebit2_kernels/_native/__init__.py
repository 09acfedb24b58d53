"""Finds and loads the compiled parts, on first use; says what is missing when they cannot be loaded."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import ModuleType

import torch

from ..version import __version__

__all__ = [
    "NativeLibraryError",
    "core",
    "cuda_ops_library_path",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "get_pkgconfig_dir",
    "load_cuda_ops",
    "load_ops",
    "no_cuda_reason",
    "ops_library_path",
]

_REBUILD = (
    "Reinstall the package: a wheel, or with a C++ compiler at hand, in a checkout, `pip install .` "
    "(or `-e .`). `littlebit2 doctor` shows what was found."
)

_PACKAGE = Path(__file__).resolve().parents[1]

_lock = threading.Lock()
_ops_loaded = False
_cuda_ops_loaded = False


class NativeLibraryError(ImportError):
    """The compiled part of the package is missing, stale, or cannot be loaded; the message says why."""


def core() -> ModuleType:
    """Return :mod:`littlebit2_kernels._native.abi`, which loads the core library.

    Raises:
        NativeLibraryError: it was not built, does not load, or belongs to another version.
    """
    try:
        module = importlib.import_module(f"{__package__}.abi")
    except (ImportError, OSError, AttributeError, ValueError, KeyError) as error:  # or a damaged build.json
        raise NativeLibraryError(f"the core library cannot be loaded: {error}. {_REBUILD}") from error
    if module.version != __version__:
        raise NativeLibraryError(
            f"the core library is of version {module.version}, the Python package of {__version__}: "
            f"the build is stale. {_REBUILD}"
        )
    return module


def get_include() -> str:
    """Folder that holds ``littlebit2/littlebit2.h``, for C and C++ clients (``-I``)."""
    return str(_PACKAGE / "include")


def get_library_dir() -> str:
    """Folder of the library, for C and C++ clients (``-L``, ``-rpath``).

    Linkers find it there as ``-llittlebit2``; what is loaded, also by ``dlopen``, is ``liblittlebit2.so.1``.
    """
    return str(_PACKAGE / "lib")


def get_cmake_dir() -> str:
    """Folder of the CMake package: ``cmake -Dlittlebit2_DIR=...``, then ``find_package(littlebit2)``."""
    return str(_PACKAGE / "lib" / "cmake" / "littlebit2")


def get_pkgconfig_dir() -> str:
    """Folder of the pkg-config files: ``PKG_CONFIG_PATH=... pkg-config --cflags --libs littlebit2``."""
    return str(_PACKAGE / "lib" / "pkgconfig")


def ops_library_path() -> Path:
    """Where the torch operator library of this installation lies (whether or not it exists)."""
    return _PACKAGE / "lib" / "liblittlebit2_torch.so"


def cuda_ops_library_path() -> Path:
    """Where the CUDA operator library of this installation lies (whether or not it exists)."""
    return _PACKAGE / "lib" / "liblittlebit2_torch_cuda.so"


def load_ops() -> None:
    """Load the operator library, which defines ``torch.ops.littlebit2.*``; later calls do nothing.

    Raises:
        NativeLibraryError: the library is missing or cannot be loaded, or another copy of the
            operators is loaded already (loading a second one would crash the process).
    """
    global _ops_loaded
    with _lock:
        if _ops_loaded:
            return
        core()  # the same staleness check guards the operator library
        path = ops_library_path()
        if hasattr(torch.ops.littlebit2, "linear"):
            raise NativeLibraryError(
                "the operators torch.ops.littlebit2.* are defined already by another copy of the library; "
                f"loading {path} too would crash the process. Import littlebit2_kernels before loading "
                "other libraries that bundle these operators, or keep one installation only."
            )
        if not path.is_file():
            raise NativeLibraryError(f"the operator library {path} does not exist. {_REBUILD}")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            cause = error.__cause__ or error
            raise NativeLibraryError(
                f"the operator library {path} cannot be loaded under torch {torch.__version__} "
                f"(>= 2.11 is needed): {cause}"
            ) from error
        _ops_loaded = True


def no_cuda_reason() -> str | None:
    """Why the CUDA kernels can run on no GPU of this process, or ``None``; loads the module at most."""
    if _cuda_ops_loaded:
        return None
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA; install a CUDA build of torch"
    try:
        built = core().cuda_archs is not None
    except NativeLibraryError as error:
        return str(error)
    if not built:
        return (
            "this package was built without its CUDA kernels; reinstall it with nvcc (CUDA 12.4 or newer) at "
            "hand: in a checkout, `LB2_CUDA=on pip install .` says what is missing; or from a wheel that has "
            "them (+cu and a number in its version)"
        )
    if not torch.cuda.is_available():
        return "torch finds no usable GPU or driver"
    return None


# torch.compile takes the answer of trace time. This is what torch.compiler.assume_constant_result marks a
# function with; calling that would import the compiler.
no_cuda_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_cuda_ops() -> None:
    """Load the operators' CUDA kernels, after :func:`load_ops`; later calls do nothing.

    Raises:
        NativeLibraryError: they cannot run here, or the library is missing or cannot be loaded.
    """
    global _cuda_ops_loaded
    if not _cuda_ops_loaded:  # every call on CUDA comes here
        with _lock:
            if not _cuda_ops_loaded:
                _load_cuda_library()
                _cuda_ops_loaded = True


def _load_cuda_library() -> None:
    reason = no_cuda_reason()
    if reason is not None:
        raise NativeLibraryError(f"the CUDA kernels cannot be loaded: {reason}")
    path = cuda_ops_library_path()
    if not path.is_file():
        raise NativeLibraryError(f"the CUDA operator library {path} does not exist. {_REBUILD}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"the CUDA operator library {path} cannot be loaded under torch {torch.__version__}: "
            f"{error.__cause__ or error}"
        ) from error
