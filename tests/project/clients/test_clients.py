"""What people do with an installation: compile C against it, ask for diagnostics, run the README."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import littlebit2_kernels
from littlebit2_kernels import diagnostics, dispatch
from littlebit2_kernels._native import no_cuda_reason

ROOT = Path(__file__).resolve().parents[3]


def test_c_program_against_the_installed_headers_and_library(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed to build this package"
    program = tmp_path / "client"
    libraries = littlebit2_kernels.get_library_dir()
    source = ROOT / "tests/cpp/core/c_api_test.c"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{littlebit2_kernels.get_include()}"]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-llittlebit2", "-lm", "-o", program]
    subprocess.run([compiler, *flags, source, *link], check=True)
    subprocess.run([program], check=True)


def test_core_library_needs_neither_torch_nor_python() -> None:
    (library,) = Path(littlebit2_kernels.get_library_dir()).glob("liblittlebit2.so.*")
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search("libtorch|libpython|libc10", needed)


def test_diagnostics_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "littlebit2_kernels.diagnostics", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0
    assert report["self_test"] == "ok"
    assert report["backends"]["cpu"] == "available"
    cuda = no_cuda_reason()
    assert report["backends"]["cuda"] == ("available" if cuda is None else f"unavailable: {cuda}")
    assert report["cpu"]["isa"] in report["cpu"]["available_isas"]
    assert report["package"]["littlebit2_kernels"] == littlebit2_kernels.__version__


def test_diagnostics_say_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise littlebit2_kernels.NativeLibraryError("no library here")

    monkeypatch.setattr(diagnostics, "littlebit_linear", lambda x, packed, backend: broken())
    monkeypatch.setattr(diagnostics, "core", broken)
    monkeypatch.setattr(dispatch, "core", broken)
    assert diagnostics.collect()["backends"]["cpu"] == "unavailable: no library here"
    assert diagnostics.main([]) == 1
    assert capsys.readouterr().out.count("no library here") >= 3


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure the core alone."""
    command = ["cmake", "-S", ROOT, "-B", build, "-DLB2_BUILD_TORCH=OFF", "-DLB2_BUILD_PYTHON=OFF", *options]
    # The environment of a build of the package could say something else.
    clean = {name: value for name, value in os.environ.items() if name != "LB2_CUDA_ARCHS"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, **environment})


def test_cuda_without_a_compiler(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nvcc")
    result = configure(tmp_path / "on", "-DLB2_CUDA=on", CUDACXX=nowhere)
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "LB2_CUDA=on, but the CUDA kernels cannot be built: no working nvcc was found" in message
    result = configure(tmp_path / "auto", CUDACXX=nowhere)
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels: no (no working nvcc was found" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-DLB2_CUDA=maybe",), "LB2_CUDA must be auto, on or off, got maybe"),
        (("-DLB2_CUDA_ARCHS=90 75",), "LB2_CUDA_ARCHS must list architectures from 80 on, .* got 75"),
        (("-DLB2_CUDA_ARCHS=sm_90",), "LB2_CUDA_ARCHS must list .* got sm_90"),
        (("-DLB2_CUDA=on", "-DLB2_SANITIZE=address"), "cannot be built: not together with LB2_SANITIZE"),
    ],
    ids=["cuda", "old", "sm_90", "sanitize"],
)
def test_bad_build_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = configure(tmp_path, *options)
    assert result.returncode != 0
    assert re.search(message, " ".join(result.stderr.split()))
