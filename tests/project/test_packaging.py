"""What is put into a source distribution and into a wheel, and what a build says is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import littlebit2_kernels
from tests.integrations.installed.environment import copy_sources, write_tools

ROOT = Path(__file__).resolve().parents[2]


def backend(call: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call the build backend as pip does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", f"import backend; print(backend.{call})"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "cmake"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    result = backend(f"build_sdist({str(tmp_path)!r})", ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources
    assert sources <= inside
    needed = {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "cmake/backend.py",
    }
    packages = {
        "littlebit2_kernels/linear.py",
        "littlebit2_kernels/py.typed",
        "python/littlebit2/quantize/config.py",
        "python/_littlebit2_autoregister.py",
        "python/littlebit2_autoregister.pth",
        "cmake/littlebit2-config.cmake.in",
        "cmake/portable.cpp",
        "cmake/portable_cuda.cpp",
        "examples/cpp/CMakeLists.txt",
    }
    assert needed | packages <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_a_wheel_is_for_every_python(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "tree")
    variables = write_tools(sources)
    (sources / "littlebit2_kernels/lib").mkdir()
    (sources / "littlebit2_kernels/lib/liblittlebit2_cuda.so.9").write_text("built in place earlier")
    result = backend(f"build_wheel({str(tmp_path)!r})", sources, **variables)
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels: not compiled (LB2_CUDA=on compiles them)" in result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert "linux" in wheel.name.split("-")[4]
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (metadata,) = (name for name in inside if name.endswith("/METADATA"))
        assert "Requires-Python: >=3.11" in archive.read(metadata).decode()
    assert {
        "littlebit2/cli/__init__.py",
        "littlebit2_kernels/linear.py",
        "littlebit2_kernels/lib/build.json",
        "littlebit2_kernels/lib/liblittlebit2.so.1",
        "littlebit2_kernels/lib/liblittlebit2_torch.so",
        "littlebit2_kernels/include/littlebit2/littlebit2.h",
        "littlebit2_autoregister.pth",
    } <= inside
    assert not [name for name in inside if "cpython-" in name or name.endswith(".so.9")]


def test_a_local_version_tells_wheels_apart(tmp_path: Path) -> None:
    sources = copy_sources(tmp_path / "tree")
    variables = write_tools(sources)
    call = f"build_wheel({str(tmp_path)!r})"
    result = backend(call, sources, **variables, LB2_LOCAL_VERSION="cu130")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == f"{littlebit2_kernels.__version__}+cu130"
    result = backend(call, sources, **variables, LB2_LOCAL_VERSION="CU 13")
    assert result.returncode == 1
    assert (
        "LB2_LOCAL_VERSION must be small letters and digits, such as cu130, or nothing, got 'CU 13'"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATH": "nowhere"}, "no C++ compiler was found (c++, g++, clang++); on Debian and Ubuntu: apt-get"),
        ({"CXX": "no-such-compiler -m64"}, "no C++ compiler was found (no-such-compiler);"),
        ({"LB2_TORCH_DIR": ""}, "torch, whose headers the build needs, was not found; pip install"),
        ({"LB2_TORCH_DIR": "old/torch"}, "torch 2.11 or newer is needed, old/torch is older; pip install"),
    ],
    ids=["no-compiler", "wrong-compiler", "no-torch", "old-torch"],
)
@pytest.mark.parametrize(
    "call", ["get_requires_for_build_wheel()", "build_wheel('nowhere')", "get_requires_for_build_editable()"]
)
def test_a_build_says_what_is_missing_in_one_line(
    tmp_path: Path, call: str, variables: dict[str, str], message: str
) -> None:
    result = backend(call, tmp_path, **variables)
    assert result.returncode == 1
    (line,) = (result.stdout + result.stderr).splitlines()
    assert line.startswith(f"littlebit2-kernels cannot be built: {message}")


def test_an_isolated_build_finds_the_torch_of_its_environment(tmp_path: Path) -> None:
    """Pip hides what is installed by a sitecustomize.py on PYTHONPATH."""
    hide = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]"
    (tmp_path / "sitecustomize.py").write_text(hide)
    import setuptools
    import torch

    folder = Path(setuptools.__file__).parents[1]
    (tmp_path / "setuptools").symlink_to(folder / "setuptools")
    (tmp_path / "_distutils_hack").symlink_to(folder / "_distutils_hack")
    path = os.pathsep.join((str(tmp_path), str(ROOT / "cmake")))
    result = backend("find_torch()", tmp_path, PYTHONPATH=path)
    assert result.stdout.strip() == str(Path(torch.__file__).parent), result.stderr
