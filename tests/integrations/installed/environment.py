"""Throw-away environments in which the package is installed as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import littlebit2_kernels

from .hook import ROOT

#: What a build of the package reads, but for the sources of the libraries.
_SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "cmake",
    "python",
    "littlebit2_kernels",
)
#: Stands in for CMake: compiling the libraries again would take minutes, so it installs those that are built.
_CMAKE = """#!/bin/sh
if [ "$1" = --install ]; then
    mkdir -p "$4" && cp -r "$BUILT/lib" "$BUILT/include" "$4"
fi
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the current one, but not our own."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(
        self, *arguments: str | Path, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its Python, outside the tree, with the environment variables given."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LB2_"))}
        result = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    def pip(self, command: str, *arguments: str | Path, **variables: str) -> None:
        """Run pip of the current environment on this one, without an index."""
        run = ("-m", "pip", "--disable-pip-version-check", command, *arguments)
        self.run(*run, **variables)


def make_environment(folder: Path, *, alone: bool = False) -> Environment:
    """Make an environment without packages of its own, and if ``alone``, without those of this one."""
    venv.create(folder, symlinks=True, with_pip=False)
    environment = Environment(folder)
    if alone:
        return environment
    # A folder that a .pth file names is searched, but .pth files in it are not read: no editable install.
    outer = dict.fromkeys([sysconfig.get_path("purelib"), *sys.path])
    (environment.packages / "outer.pth").write_text(
        "".join(f"{folder}\n" for folder in outer if Path(folder).name == "site-packages")
    )
    return environment


def copy_sources(folder: Path) -> Path:
    """Copy what the package is built from."""
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "lib", "include")
    for name in _SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def write_tools(sources: Path) -> dict[str, str]:
    """Put the stand-in for CMake beside the sources; returns the variables of a build that finds it."""
    tools = sources / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "cmake").write_text(_CMAKE)
    (tools / "cmake").chmod(0o755)
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "BUILT": str(Path(littlebit2_kernels.get_include()).parent),
    }


def install(environment: Environment, sources: Path, *options: str) -> None:
    """Install the package from its sources, with the libraries that are built."""
    how = ("--no-deps", "--no-index", "--no-build-isolation", *options)
    environment.pip("install", *how, sources, **write_tools(sources))
