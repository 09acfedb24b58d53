"""Drives CMake, which owns sources and flags; metadata lives in pyproject.toml.

Environment variables of a build: ``LB2_CUDA`` (auto, on, off), ``LB2_CMAKE_ARGS`` (extra arguments
for CMake), ``MAX_JOBS`` (parallel compilations).
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
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("littlebit2-kernels: cmake >= 3.24 was not found; pip install cmake ninja")
        build = Path(self.build_temp).resolve()
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DLB2_CUDA={os.environ.get('LB2_CUDA', 'auto')}",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("LB2_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", "")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", *([jobs] if jobs else [])], check=True)
        subprocess.run([cmake, "--install", str(build)], check=True)


setup(
    ext_modules=[Extension("littlebit2_kernels._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
