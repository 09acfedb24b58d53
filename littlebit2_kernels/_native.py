"""Finds and loads the compiled parts, on first use; says what is missing when they cannot be loaded."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import ModuleType

import torch

from .version import __version__

__all__ = ["NativeLibraryError", "core", "get_include", "get_library_dir", "load_ops", "ops_library_path"]

_REBUILD = (
    "Reinstall the package with a C++ compiler, cmake and ninja at hand: in a checkout, "
    "`pip install --no-build-isolation .` (or `-e .`). "
    "`python -m littlebit2_kernels.diagnostics` shows what was found."
)

_PACKAGE = Path(__file__).resolve().parent

_lock = threading.Lock()
_ops_loaded = False


class NativeLibraryError(ImportError):
    """The compiled part of the package is missing, stale, or cannot be loaded; the message says why."""


def core() -> ModuleType:
    """Return the pybind11 module ``littlebit2_kernels._core``.

    Raises:
        NativeLibraryError: it was not built, does not load, or belongs to another version.
    """
    try:
        module = importlib.import_module(f"{__package__}._core")
    except ImportError as error:
        raise NativeLibraryError(
            f"the native module littlebit2_kernels._core cannot be loaded: {error}. {_REBUILD}"
        ) from error
    if module.version != __version__:
        raise NativeLibraryError(
            f"the native module is of version {module.version}, the Python package of {__version__}: "
            f"the build is stale. {_REBUILD}"
        )
    return module


def get_include() -> str:
    """Folder that holds ``littlebit2/littlebit2.h``, for C and C++ clients (``-I``)."""
    return str(_PACKAGE / "include")


def get_library_dir() -> str:
    """Folder that holds ``liblittlebit2.so``, for C and C++ clients (``-L``, ``-rpath``)."""
    return str(_PACKAGE / "lib")


def ops_library_path() -> Path:
    """Where the torch operator library of this installation lies (whether or not it exists)."""
    return _PACKAGE / "lib" / "liblittlebit2_torch.so"


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
