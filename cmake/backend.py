"""setuptools' build backend, and one line on what is missing before anything is built.

The operators are compiled against torch's headers. torch is no build requirement: pip would download
gigabytes into an environment of its own, while the one that is installed into has a torch already.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_HEADER = "include/torch/csrc/stable/library.h"
_FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


def find_torch() -> str:
    """Folder of the torch that the package will be used with, or nothing."""
    if "LB2_TORCH_DIR" in os.environ:
        return os.environ["LB2_TORCH_DIR"]
    here = importlib.util.find_spec("torch")
    if here is not None and here.origin:
        return str(Path(here.origin).parent)
    # pip hides what is installed from an isolated build by variables, which -E ignores.
    found = subprocess.run([sys.executable, "-E", "-c", _FIND], capture_output=True, text=True, check=False)
    origin = found.stdout.strip()
    return str(Path(origin).parent) if origin else ""


def missing(torch: str, *, tools: bool) -> str:
    """What is missing, in one line, or nothing; ``tools`` are those that pip brings to an isolated build."""
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        return f"no C++ compiler was found ({', '.join(compiler)}); on Debian and Ubuntu: apt-get install g++"
    if not torch:
        return (
            "torch, whose headers the build needs, was not found; pip install torch, then again, or, where "
            "the build runs in an environment of its own, set LB2_TORCH_DIR=<site-packages>/torch or give "
            "--no-build-isolation"
        )
    if not Path(torch, _HEADER).is_file():
        return f"torch 2.11 or newer is needed, {torch} is older; pip install --upgrade torch"
    if tools and shutil.which("cmake") is None:
        return "cmake 3.24 or newer was not found; pip install cmake ninja"
    return ""


def _check(*, tools: bool) -> None:
    torch = find_torch()
    reason = missing(torch, tools=tools)
    if reason:
        raise SystemExit(f"littlebit2-kernels cannot be built: {reason}. A wheel needs no build.")
    os.environ["LB2_TORCH_DIR"] = torch


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs for the build, once nothing else is missing."""
    _check(tools=False)
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    """The same for an editable installation."""
    _check(tools=False)
    return build_meta.get_requires_for_build_editable(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel."""
    _check(tools=True)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build what installs a checkout in place."""
    _check(tools=True)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
