"""Drives CMake, which owns sources and flags; metadata lives in pyproject.toml.

Environment variables of a build: ``LB2_CUDA`` (auto, on, off), ``LB2_CUDA_ARCHS`` (GPU architectures),
``LB2_CMAKE_ARGS`` (extra arguments for CMake), ``MAX_JOBS`` (parallel compilations).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure, build and install the native libraries into the package folder."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        configure = [
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLB2_CUDA={os.environ.get('LB2_CUDA', 'auto')}",
            # Always, else an earlier build's choice would stay in CMake's cache.
            f"-DLB2_CUDA_ARCHS={os.environ.get('LB2_CUDA_ARCHS', '')}",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("LB2_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", "")
        _cmake(*configure)
        _cmake("--build", str(build), "--parallel", *([jobs] if jobs else []))
        self._install(Path(self.get_ext_fullpath(ext.name)).resolve().parent)

    def copy_extensions_to_source(self) -> None:
        """In an editable install, put everything beside the sources: the module needs its libraries there."""
        self._install(Path(self.get_finalized_command("build_py").get_package_dir("littlebit2_kernels")))

    def _install(self, package: Path) -> None:
        _cmake("--install", str(Path(self.build_temp).resolve()), "--prefix", str(package.resolve()))


def _cmake(*arguments: str) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("littlebit2-kernels: cmake >= 3.24 was not found; pip install cmake ninja")
    subprocess.run([cmake, *arguments], check=True)


setup(
    ext_modules=[Extension("littlebit2_kernels._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
