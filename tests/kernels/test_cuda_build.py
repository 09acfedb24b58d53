"""The CUDA kernels compile for every architecture, without spills, and export what the C ABI promises.

One architecture is compiled by default: one that has clusters. The others are slow tests.

What they compute is proven elsewhere by executing them on the host (tests/cpp/cuda/decode_test.cpp).
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.cuda.compiling import disassemble, disassembler
from benchmarks.cuda.kernel_report import GEMM_POLICIES, POLICIES, TOKEN_TILES, gemm_tiles, parse_ptxas
from benchmarks.sass.block import walk_block
from benchmarks.sass.encoding import parse_functions
from benchmarks.sass.launches import Kernel, kernel_of, plan_launches

ROOT = Path(__file__).resolve().parents[2]
COMMON = (90,)
OTHERS = (80, 86, 89, 100, 120)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")


@dataclass(frozen=True)
class Build:
    """The build folder of the core with CUDA, what ptxas said of every kernel, and the architectures."""

    folder: Path
    log: str
    architectures: tuple[int, ...]

    @property
    def library(self) -> Path:
        return next(self.folder.glob("**/liblittlebit2_cuda.so"))


def _configure(folder: Path, *options: str) -> str:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake on PATH")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ("-DLB2_CUDA=on", "-DLB2_BUILD_TORCH=OFF", "-DLB2_BUILD_PYTHON=OFF", *options)
    return _run("cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], Build]:
    """Builds for a group of architectures, once."""

    @functools.cache
    def make(architectures: tuple[int, ...]) -> Build:
        folder = tmp_path_factory.mktemp("cuda")
        targets = ";".join(f"{arch}-real" for arch in architectures)
        _configure(folder, f"-DLB2_CUDA_ARCHS={targets}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v")
        build = ("cmake", "--build", str(folder), "--target", "littlebit2_cuda")
        log = _run(*build, "--verbose", "--parallel", str(os.cpu_count() or 1))
        return Build(folder, log, architectures)

    return make


@pytest.fixture(
    params=[COMMON, pytest.param(OTHERS, marks=pytest.mark.slow)],
    ids=lambda architectures: "-".join(map(str, architectures)),
)
def build(request: pytest.FixtureRequest, built: Callable[[tuple[int, ...]], Build]) -> Build:
    return built(request.param)


def _each_of(architectures: tuple[int, ...]) -> pytest.MarkDecorator:
    """Run a test on each architecture, with the build that holds it."""
    cases = [
        pytest.param(group, arch, id=f"sm_{arch}", marks=marks)
        for group, marks in ((COMMON, ()), (OTHERS, pytest.mark.slow))
        for arch in group
        if arch in architectures
    ]
    return pytest.mark.parametrize(("build", "arch"), cases, indirect=["build"])


def _run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_architecture_is_built_for_by_default(tmp_path: Path) -> None:
    (line,) = re.findall(r"CUDA kernels: yes \(.*\)", _configure(tmp_path, "-DLB2_CUDA_ARCHS="))
    assert {int(arch) for arch in re.findall(r"(\d+)-real", line)} == {*COMMON, *OTHERS}


def test_every_instance_compiles_for_every_architecture_without_spills(build: Build) -> None:
    kernels = list(parse_ptxas(build.log))
    assert [kernel for kernel in kernels if kernel.local_bytes] == []
    kinds = [("decode", tile) for tile in TOKEN_TILES] + [
        ("convert", tile) for tile in TOKEN_TILES if tile > 4
    ]
    kinds += [(f"{kind}_extended", tile) for kind, tile in kinds]
    # Each for input of 32 and of 16 bits.
    kinds += [("decode_plain", tile) for tile in TOKEN_TILES for _ in range(2)]
    wanted = [
        (kind, 0, tile, mode, arch)
        for (kind, tile), mode, arch in itertools.product(kinds, POLICIES, build.architectures)
    ]
    wanted += [("int8_rows", 0, tile, "", arch) for tile in TOKEN_TILES for arch in build.architectures]
    for kind in ("unpack", "normalize", "pointwise"):
        wanted += [(kind, 0, 0, "", arch) for arch in build.architectures]
    for mode, arch in itertools.product(GEMM_POLICIES, build.architectures):
        wanted += [(kind, 0, 0, mode, arch) for kind in ("gemm_convert", "fused")]
        wanted += [("gemm", *tile, mode, arch) for tile in gemm_tiles(mode)]
    assert sorted((k.kind, k.row_tile, k.token_tile, k.mode, k.capability) for k in kernels) == sorted(wanted)


def test_library_exports_the_c_abi_and_nothing_else_of_ours(build: Build) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm on PATH")
    symbols = _run("nm", "-D", "--defined-only", "--with-symbol-versions", str(build.library))
    defined = {line.split()[-1] for line in symbols.splitlines()}
    # The version of the symbols, and the symbols: nothing of the CUDA runtime inside either.
    assert defined == {
        "LITTLEBIT2_CUDA_1",
        *("lb2_cuda_get_device@@LITTLEBIT2_CUDA_1", "lb2_grouped_forward_cuda@@LITTLEBIT2_CUDA_1"),
        *("lb2_int8_forward_cuda@@LITTLEBIT2_CUDA_1",),
        *("lb2_linear_forward_cuda@@LITTLEBIT2_CUDA_1", "lb2_linear_unpack_cuda@@LITTLEBIT2_CUDA_1"),
        *("lb2_mlp_forward_cuda@@LITTLEBIT2_CUDA_1", "lb2_projections_forward_cuda@@LITTLEBIT2_CUDA_1"),
    }


_CLIENT = """
#include <stdio.h>
#include "littlebit2/cuda.h"
int main(void) {
  lb2_cuda_device device = {sizeof device, 0, 0, 0};
  printf("%d %s", (int)lb2_cuda_get_device(0, &device), lb2_last_error());
  return 0;
}
"""


def test_program_links_the_installed_library(
    built: Callable[[tuple[int, ...]], Build], tmp_path: Path
) -> None:
    """find_package's component cuda; where there is no GPU, the program is told so."""
    _run("cmake", "--install", str(built(COMMON).folder), "--prefix", str(tmp_path / "prefix"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "client.c").write_text(_CLIENT)
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(client LANGUAGES C)\n"
        "find_package(littlebit2 REQUIRED COMPONENTS cuda)\nadd_executable(client client.c)\n"
        "target_link_libraries(client PRIVATE littlebit2::cuda)\n"
    )
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    _run("cmake", "-S", str(source), "-B", str(tmp_path / "build"), prefix)
    _run("cmake", "--build", str(tmp_path / "build"))
    status, _, message = _run(str(tmp_path / "build/client")).partition(" ")
    assert status == "0" or message.startswith("counting the GPUs: "), message
    needed = _run("readelf", "-d", str(tmp_path / "prefix/lib/liblittlebit2_cuda.so.1"))
    assert "Library soname: [liblittlebit2_cuda.so.1]" in needed
    assert "Shared library: [liblittlebit2.so.1]" in needed


def _machine_code(build: Build, arch: int, kernel: str) -> list[str]:
    """Functions whose mangled names hold ``kernel``, as disassembled; skips where nothing disassembles."""
    code = _disassembled(build.library, arch)
    return [part for part in re.split(r"\n\s*Function : ", code)[1:] if kernel in part.split()[0]]


@functools.lru_cache(maxsize=len(OTHERS))
def _disassembled(library: Path, arch: int) -> str:
    try:
        disassembler()
    except FileNotFoundError:
        pytest.skip("needs cuobjdump (CUDA toolkit or Triton's package)")
    return disassemble(library, "--gpu-architecture", f"sm_{arch}")


@_each_of((80, 86, 89, 90))
def test_machine_code_holds_the_intended_instructions(build: Build, arch: int) -> None:
    # Converting activations needs no tensor cores.
    functions = _machine_code(build, arch, "decode")
    assert len(functions) == 4 * len(POLICIES) * len(TOKEN_TILES)
    for function in functions:
        name = function.split()[0]
        expected = "BMMA.168256.AND.POPC" if "BitPlanes" in name else "HMMA.16816.F32"
        assert expected in function, f"{name}: no {expected}"
        assert re.search(r"LDG\.E\.(\w+\.)*128", function), f"{name}: no 16-byte loads of global memory"
        assert "LDS.128" in function, f"{name}: no 16-byte loads of shared memory"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name}: uses local memory"


@_each_of(COMMON + OTHERS)
def test_machine_code_of_the_gemm(build: Build, arch: int) -> None:
    """MMAs, copies past the registers, and no more 16-byte loads beside the MMAs than there must be."""
    functions = _machine_code(build, arch, "4gemmI")
    assert len(functions) == sum(len(gemm_tiles(mode)) for mode in GEMM_POLICIES)
    for function in functions:
        name = function.split()[0]
        mma = "IMMA.16832.S8.S8" if "GemmInt8" in name else "HMMA.16816.F32"
        mmas = function.count(mma)
        assert mmas > 0, f"{name}: no {mma}"
        assert "LDGSTS" in function, f"{name}: no copies to shared memory"
        assert "LDS.128" in function, f"{name}: no 16-byte loads of shared memory"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name}: uses local memory"
        # One load serves two MMAs of each of the warp's row tiles, in `exact` for each of its terms.
        rows, tokens = map(int, re.findall(r"GemmShapeILi(\d+)ELi(\d+)E", name)[0])
        row_tiles = rows // (2 if tokens == 128 else 4) // 16
        assert mmas / (2 * row_tiles) <= function.count("LDS.128"), name


@_each_of(COMMON + OTHERS)
def test_machine_code_of_the_kernel_of_both_stages(build: Build, arch: int) -> None:
    """MMAs, 16-byte loads, no local memory; and barriers of clusters and their memory where these are."""
    functions = _machine_code(build, arch, "5fusedI")
    assert len(functions) == len(GEMM_POLICIES)
    for function in functions:
        name = function.split()[0]
        mma = "IMMA.16832.S8.S8" if "GemmInt8" in name else "HMMA.16816.F32"
        # Loops of one index: one tile of rows, or two, in the first stage, and two in the last.
        mmas = (1 + 2 + 2) * (4 if "GemmInt8" in name else 8) * (2 if "GemmHalvesILi2E" in name else 1) * 4
        assert function.count(mma) == mmas, name
        assert "LDS.128" in function, f"{name}: no 16-byte loads of shared memory"
        assert not re.search(r"\b(LDL|STL)\b", function), f"{name}: uses local memory"
        assert ("UCGABAR_ARV" in function and "UCGABAR_WAIT" in function) == (arch >= 90), name


@_each_of((90, 100))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_launch_reads_nothing_before_it_waits(
    build: Build, arch: int, dtype: str, tmp_path: Path
) -> None:
    """Whoever ran before may have written weights: the compiler must not move loads up past the wait."""
    code = dict(parse_functions(_disassembled(build.library, arch)))
    kernels = {name: Kernel(name, instructions, 0) for name, instructions in code.items()}
    for tokens in (1, 4, 16):
        launches = plan_launches(tmp_path, arch, "int16", dtype, tokens, (4096, 4096), (80, 80))
        for index, launch in enumerate(launches):
            policy = {name: kernel for name, kernel in kernels.items() if POLICIES["int16"] in name}
            path = walk_block(kernel_of(policy, launch).code, arch, launch.params, {}, 256)
            assert path.cycles[0] > 0, f"{launch.kind}: no wait"
            assert index > 0 or path.early_loads == 0, f"{launch.kind}: {path.early_loads} loads too early"
        # The second stage has its signs under way by then.
        assert path.early_loads > 0


@pytest.mark.parametrize("program", sorted(path.stem for path in (ROOT / "benchmarks" / "cuda").glob("*.cu")))
def test_measurements_compile(tmp_path: Path, program: str) -> None:
    folders = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "benchmarks")]
    source = ROOT / "benchmarks" / "cuda" / f"{program}.cu"
    _run("nvcc", "-std=c++17", "-arch=sm_80", *folders, "-c", str(source), "-o", str(tmp_path / "object.o"))
