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

ROOT = Path(__file__).resolve().parents[2]


def test_c_program_against_the_installed_headers_and_library(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed to build this package"
    program = tmp_path / "client"
    libraries = littlebit2_kernels.get_library_dir()
    source = ROOT / "tests/cpp/c_api_test.c"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{littlebit2_kernels.get_include()}"]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-llittlebit2", "-lm", "-o", program]
    subprocess.run([compiler, *flags, source, *link], check=True)
    subprocess.run([program], check=True)


def test_core_library_needs_neither_torch_nor_python() -> None:
    library = Path(littlebit2_kernels.get_library_dir(), "liblittlebit2.so")
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
    assert report["backends"]["cuda"].startswith("unavailable: ")
    assert report["cpu"]["isa"] in report["cpu"]["available_isas"]
    assert report["package"]["littlebit2_kernels"] == littlebit2_kernels.__version__


def test_diagnostics_say_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise littlebit2_kernels.NativeLibraryError("no library here")

    monkeypatch.setattr(diagnostics, "littlebit_linear", lambda x, packed: broken())
    monkeypatch.setattr(diagnostics, "core", broken)
    monkeypatch.setattr(dispatch, "core", broken)
    assert diagnostics.collect()["backends"]["cpu"] == "unavailable: no library here"
    assert diagnostics.main([]) == 1
    assert capsys.readouterr().out.count("no library here") >= 3


def test_readme_example_runs_as_written() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        result = subprocess.run(
            [sys.executable, "-c", block], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert result.returncode == 0, result.stderr


def test_cuda_cannot_be_demanded_of_a_version_without_it(tmp_path: Path) -> None:
    options = ["-DLB2_CUDA=on", "-DLB2_BUILD_TORCH=OFF", "-DLB2_BUILD_PYTHON=OFF"]
    result = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert result.returncode != 0
    assert "has no CUDA kernels" in " ".join(result.stderr.split())
