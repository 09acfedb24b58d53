"""Builds the C++ example as its users do: copied out of the tree, against an installed prefix."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import littlebit2_kernels

ROOT = Path(__file__).resolve().parents[3]


def run(*command: str | Path, **options: object) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return str(done.stdout)


def copy_prefix(folder: Path) -> Path:
    """Copy what the installed package holds for C and C++, as if it had been moved."""
    package = Path(littlebit2_kernels.get_include()).parent
    shutil.copytree(package / "include", folder / "include")
    shutil.copytree(package / "lib", folder / "lib", ignore=shutil.ignore_patterns("*_torch*"))
    return folder


def configure(source: Path, build: Path, prefix: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configure a project that looks for the package in ``prefix``."""
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    return subprocess.run(
        ["cmake", "-S", source, "-B", build, *generator, f"-DCMAKE_PREFIX_PATH={prefix}", *options],
        capture_output=True,
        text=True,
        check=False,
    )


def build_client(folder: Path, prefix: Path, *options: str) -> Path:
    """Copy the example into ``folder``, build it there, and return the program."""
    source = folder / "source"
    shutil.copytree(ROOT / "examples/cpp", source)
    done = configure(source, folder / "build", prefix, "-DCMAKE_CXX_FLAGS_INIT=-Werror", *options)
    assert done.returncode == 0, done.stderr
    run("cmake", "--build", folder / "build")
    return folder / "build/layer_client"
