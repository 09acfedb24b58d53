"""The CUDA kernels compile for every architecture, without spills, and export what the C ABI promises.

What they compute is proven elsewhere by executing them on the host (tests/cpp/cuda_decode_test.cpp).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
MODES = ("BitPlanesILi16E", "BitPlanesILi8E", "BitPlanesILi2E", "SignHalvesILi1E", "SignHalvesILi2E")
TOKEN_TILES = (1, 2, 4, 8, 16)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The build folder of the core with CUDA, and what ptxas said of every kernel."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake on PATH")
    folder = tmp_path_factory.mktemp("cuda")
    options = [
        "-DLB2_CUDA=on",
        "-DLB2_BUILD_TORCH=OFF",
        "-DLB2_BUILD_PYTHON=OFF",
        "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options)
    log = _run("cmake", "--build", str(folder), "--verbose", "--parallel", str(os.cpu_count() or 1))
    return folder, log


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def _kernels(log: str) -> Iterator[tuple[str, int, int]]:
    """(name, architecture, bytes of stack and spills) of every kernel that ptxas reported."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        re.DOTALL,
    )
    for match in pattern.finditer(log):
        yield match[1], int(match[2]), sum(int(match[i]) for i in (3, 4, 5))


def test_every_instance_compiles_for_every_architecture_without_spills(build: tuple[Path, str]) -> None:
    found = {(name, arch): spilled for name, arch, spilled in _kernels(build[1])}
    for arch in ARCHITECTURES:
        for mode in MODES:
            for tile in TOKEN_TILES:
                spilled = [
                    bytes_
                    for (name, of), bytes_ in found.items()
                    if of == arch and mode in name and f"EELi{tile}EE" in name
                ]
                assert spilled == [0], f"{mode} with {tile} tokens on sm_{arch}: {spilled}"


def test_library_exports_the_c_abi_and_nothing_else_of_ours(build: tuple[Path, str]) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm on PATH")
    library = next(build[0].glob("**/liblittlebit2_cuda.so"))
    defined = {line.split()[-1] for line in _run("nm", "-D", "--defined-only", str(library)).splitlines()}
    ours = {name for name in defined if "lb2" in name}
    assert ours == {"lb2_cuda_get_device", "lb2_linear_forward_cuda"}


def _disassembler() -> str | None:
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    triton = util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if os.access(bundled, os.X_OK) else None


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code_holds_the_intended_instructions(build: tuple[Path, str], arch: int) -> None:
    disassembler = _disassembler()
    if disassembler is None:
        pytest.skip("needs cuobjdump (CUDA toolkit or Triton's package)")
    library = next(build[0].glob("**/liblittlebit2_cuda.so"))
    code = _run(disassembler, "--dump-sass", "--gpu-architecture", f"sm_{arch}", str(library))
    functions = re.split(r"\n\s*Function : ", code)[1:]
    assert len(functions) == len(MODES) * len(TOKEN_TILES)
    for function in functions:
        name = function.split()[0]
        expected = "BMMA.168256.AND.POPC" if "BitPlanes" in name else "HMMA.16816.F32"
        assert expected in function, f"{name}: no {expected}"
        assert re.search(r"LDG\.E\.(\w+\.)*128", function), f"{name}: no 16-byte loads of global memory"
        assert "LDS.128" in function, f"{name}: no 16-byte loads of shared memory"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name}: uses local memory"


@pytest.mark.parametrize("program", sorted(path.stem for path in (ROOT / "benchmarks" / "cuda").glob("*.cu")))
def test_measurements_compile(tmp_path: Path, program: str) -> None:
    folders = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "benchmarks")]
    source = ROOT / "benchmarks" / "cuda" / f"{program}.cu"
    _run("nvcc", "-std=c++17", "-arch=sm_80", *folders, "-c", str(source), "-o", str(tmp_path / "object.o"))
