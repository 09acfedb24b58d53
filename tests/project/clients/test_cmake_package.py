"""find_package and pkg-config, against the installed package and against an installed build of the core."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import littlebit2_kernels
from tests.project.clients.example import ROOT, build_client, configure, copy_prefix, run

PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(client LANGUAGES C)
find_package({package})
add_executable(client {source})
set_target_properties(client PROPERTIES C_STANDARD 99)
target_link_libraries(client PRIVATE littlebit2::littlebit2 m)
"""


def project(folder: Path, package: str) -> Path:
    folder.mkdir()
    source = ROOT / "tests/cpp/core/c_api_test.c"
    (folder / "CMakeLists.txt").write_text(PROJECT.format(package=package, source=f'"{source}"'))
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_prefix(tmp_path_factory.mktemp("prefix") / "moved here")


def test_c_program_by_find_package(tmp_path: Path, prefix: Path) -> None:
    major, minor = littlebit2_kernels.__version__.split(".")[:2]
    source = project(tmp_path / "source", f"littlebit2 {major}.{minor} REQUIRED CONFIG")
    done = configure(source, tmp_path / "build", prefix)
    assert done.returncode == 0, done.stderr
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build/client")
    needed = run("readelf", "-d", tmp_path / "build/client")
    assert re.findall(r"NEEDED.*(liblittlebit2[^]]*)", needed) == ["liblittlebit2.so.1"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("littlebit2 99.0 REQUIRED", 'compatible with requested version "99.0"'),
        ("littlebit2 REQUIRED COMPONENTS rocm", "has no component rocm: the only component is cuda"),
        ("littlebit2 REQUIRED COMPONENTS cuda", "has no component cuda: it was built without CUDA kernels"),
    ],
    ids=["version", "component", "cuda"],
)
def test_what_is_not_there_is_named(tmp_path: Path, prefix: Path, package: str, message: str) -> None:
    if package.endswith("cuda") and (prefix / "lib/cmake/littlebit2/littlebit2-cuda-targets.cmake").exists():
        pytest.skip("this build has CUDA kernels")
    done = configure(project(tmp_path / "source", package), tmp_path / "build", prefix)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_c_program_by_pkg_config(tmp_path: Path, prefix: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("needs pkg-config on PATH")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig")}
    found = run("pkg-config", "--cflags", "--libs", "littlebit2", env=environment)
    source = ROOT / "tests/cpp/core/c_api_test.c"
    # Through a shell, for the quotes of pkg-config.
    command = f"cc -std=c99 '{source}' {found.strip()} '-Wl,-rpath,{prefix}/lib' -lm -o '{tmp_path}/client'"
    run("sh", "-c", command)
    run(tmp_path / "client")
    version = run("pkg-config", "--modversion", "littlebit2", env=environment)
    assert version.strip() == littlebit2_kernels.__version__


def test_folders_are_where_the_files_are() -> None:
    assert Path(littlebit2_kernels.get_cmake_dir(), "littlebit2-config.cmake").is_file()
    assert Path(littlebit2_kernels.get_pkgconfig_dir(), "littlebit2.pc").is_file()


def test_no_installed_file_names_a_folder_of_the_build(prefix: Path) -> None:
    files = [path for path in (prefix / "lib").rglob("*") if path.suffix in (".cmake", ".pc")]
    assert len(files) >= 5
    for path in files:
        assert str(ROOT) not in path.read_text("utf-8")


@pytest.mark.slow
def test_core_built_and_installed_elsewhere(tmp_path: Path) -> None:
    """A build of the core alone, in a prefix whose libraries are in lib64, as on Fedora."""
    options = (
        "-DLB2_BUILD_TORCH=OFF",
        "-DLB2_BUILD_PYTHON=OFF",
        "-DLB2_CUDA=off",
        "-DCMAKE_INSTALL_LIBDIR=lib64",
    )
    build, prefix = tmp_path / "core", tmp_path / "prefix"
    assert configure(ROOT, build, prefix, *options).returncode == 0
    run("cmake", "--build", build)
    run("cmake", "--install", build, "--prefix", prefix)
    assert (prefix / "lib64/liblittlebit2.so").readlink() == Path("liblittlebit2.so.1")
    moved = prefix.rename(tmp_path / "moved")
    # Debian's CMake looks into no lib64 by itself.
    client = build_client(tmp_path / "client", moved, f"-Dlittlebit2_DIR={moved}/lib64/cmake/littlebit2")
    assert (
        "usage: layer_client" in subprocess.run([client], capture_output=True, text=True, check=False).stderr
    )
    found = run("pkg-config", "--libs", moved / "lib64/pkgconfig/littlebit2.pc")
    assert str(moved / "lib64") in os.path.normpath(found.split()[0].removeprefix("-L"))


@pytest.mark.slow
def test_as_part_of_another_project(tmp_path: Path) -> None:
    """add_subdirectory builds the C ABI alone, under the names of the package."""
    source = project(tmp_path / "source", "Threads")
    text = (source / "CMakeLists.txt").read_text("utf-8")
    text = text.replace("LANGUAGES C)", "LANGUAGES C CXX)")
    included = f'set(LB2_CUDA off)\nadd_subdirectory("{ROOT}" littlebit2)'
    (source / "CMakeLists.txt").write_text(text.replace("find_package(Threads)", included))
    done = configure(source, tmp_path / "build", tmp_path)
    assert done.returncode == 0, done.stderr
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build/client")
