"""Drives CMake, which owns sources and flags; metadata lives in pyproject.toml.

Environment variables of a build: ``LB2_CUDA`` (off unless asked for: on, auto), ``LB2_CUDA_ARCHS`` (GPU
architectures), ``LB2_CMAKE_ARGS`` (extra arguments for CMake), ``LB2_TORCH_DIR`` (torch whose headers are
used), ``LB2_PORTABLE`` (ON for wheels), ``LB2_LOCAL_VERSION`` (what follows ``+`` in the version of a wheel),
``MAX_JOBS`` (parallel compilations).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AUTOREGISTER = ("_littlebit2_autoregister.py", "littlebit2_autoregister.pth")


_CUDA_HINT = "CUDA kernels: not compiled (LB2_CUDA=on compiles them)"
_CUDA_TIME = (
    "CUDA kernels: compiling them takes about ten minutes of one core for each GPU architecture; "
    "LB2_CUDA_ARCHS=90 names the only one that is needed, MAX_JOBS limits how many files at a time"
)


class CMakeBuild(build_ext):
    """Configure, build and install the native libraries into the package folder."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        cuda, torch = os.environ.get("LB2_CUDA", "off"), os.environ.get("LB2_TORCH_DIR")
        print(_CUDA_HINT if cuda.lower() == "off" else _CUDA_TIME, flush=True)
        configure = [
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            *([f"-DLB2_TORCH_DIR={torch}"] if torch else []),
            f"-DLB2_CUDA={cuda}",
            # These always, else an earlier build's choice would stay in CMake's cache.
            f"-DLB2_PORTABLE={os.environ.get('LB2_PORTABLE', 'OFF')}",
            f"-DLB2_CUDA_ARCHS={os.environ.get('LB2_CUDA_ARCHS', '')}",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("LB2_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", "")
        _cmake(*configure)
        _cmake("--build", str(build), "--parallel", *([jobs] if jobs else []))
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # build_py brought what was built in place, which may have other kernels.
        shutil.rmtree(package / "lib", ignore_errors=True)
        self._install(package)

    def get_outputs(self) -> list[str]:
        """No extension module: the libraries are data of the package."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

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


class Wheel(bdist_wheel):
    """One wheel for every CPython: nothing in it is compiled against Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Build(build):
    """The build of setuptools, and :class:`BuildAutoregister`."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_autoregister", None)]


def _version_options() -> dict[str, dict[str, str]]:
    local = os.environ.get("LB2_LOCAL_VERSION", "")
    if not re.fullmatch(r"([a-z0-9]+(\.[a-z0-9]+)*)?", local):
        raise SystemExit(
            f"LB2_LOCAL_VERSION must be small letters and digits, such as cu130, or nothing, got {local!r}"
        )
    return {"egg_info": {"tag_build": f"+{local}"}} if local else {}


def _cmake(*arguments: str) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("littlebit2-kernels: cmake >= 3.24 was not found; pip install cmake ninja")
    subprocess.run([cmake, *arguments], check=True)


setup(
    options=_version_options(),
    ext_modules=[Extension("littlebit2_kernels.lib", sources=[])],
    cmdclass={
        "bdist_wheel": Wheel,
        "build": Build,
        "build_autoregister": BuildAutoregister,
        "build_ext": CMakeBuild,
    },
)
