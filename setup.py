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
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AUTOREGISTER = ("_littlebit2_autoregister.py", "littlebit2_autoregister.pth")


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


class BuildAutoregister(Command):
    """Put the hook that makes transformers know packed checkpoints at the top of site-packages.

    setuptools has no option for a .pth file. A wheel holds what lies in ``build_lib``, an editable one what
    lies where it would install libraries, which is a folder of its own then.
    """

    description = "copy the files that register littlebit2 in transformers"
    user_options: ClassVar = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = self.build_lib
        if self.editable_mode:
            folder = self.get_finalized_command("install").install_lib
        self.mkpath(folder)
        for source in self.get_source_files():
            self.copy_file(source, folder, preserve_mode=False)

    def get_source_files(self) -> list[str]:
        return [f"python/{name}" for name in AUTOREGISTER]

    def get_outputs(self) -> list[str]:
        names = () if self.editable_mode else AUTOREGISTER
        return [os.path.join(self.build_lib, name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return dict(zip(self.get_outputs(), self.get_source_files(), strict=False))


class Build(build):
    """The build of setuptools, and :class:`BuildAutoregister`."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_autoregister", None)]


def _cmake(*arguments: str) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("littlebit2-kernels: cmake >= 3.24 was not found; pip install cmake ninja")
    subprocess.run([cmake, *arguments], check=True)


setup(
    ext_modules=[Extension("littlebit2_kernels._core", sources=[])],
    cmdclass={"build": Build, "build_autoregister": BuildAutoregister, "build_ext": CMakeBuild},
)
