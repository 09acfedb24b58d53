"""The decode launches of a layer: their kernels' machine code and the bytes of their parameters.

Both come from the sources as they are: nvcc compiles a mode's kernels for one architecture, and a small
program (``launches.cpp``) plans the call. Neither needs a GPU.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda.compiling import compile_cubin, disassemble, output_of
from benchmarks.records import ROOT
from benchmarks.sass.encoding import Instruction, parse_functions

__all__ = [
    "ACTIVATIONS",
    "DEVICES",
    "DTYPES",
    "Kernel",
    "Launch",
    "compile_kernels",
    "kernel_of",
    "plan_launches",
]

#: lb2_activation and lb2_dtype by name.
ACTIVATIONS = {"exact": 1, "int16": 2, "int8": 3, "sign": 4, "float16": 5}
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
#: Multiprocessors and shared memory of a block of the GPU that each architecture stands for.
DEVICES = {
    80: ("A100", 108, 166912),
    86: ("3090", 82, 101376),
    89: ("4090", 128, 101376),
    90: ("H200", 132, 232448),
    100: ("B200", 148, 232448),
    120: ("5090", 170, 101376),
}
_SOURCES = ("cuda/plan/*.cpp", "cuda/decode/plain.cpp", "core/check.cpp", "core/shape.cpp", "core/status.cpp")


@dataclass(frozen=True)
class Launch:
    """One launch of a call and its parameters, as they lie in the constant bank."""

    kind: str
    stage: int
    token_tile: int
    grid: tuple[int, int, int]
    params: bytes

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Kernel:
    """Machine code of a kernel, the registers of a thread, and the constants in bank 2."""

    name: str
    code: tuple[Instruction, ...]
    registers: int
    literals: bytes = b""

    @property
    def code_bytes(self) -> int:
        """Size without the padding at the end."""
        last = max((i.address for i in self.code if i.opcode not in ("NOP", "BRA")), default=0)
        return last + 16


def compile_kernels(source: Path, arch: int, folder: Path) -> Mapping[str, Kernel]:
    """Compile a .cu file for one architecture and disassemble its kernels, by mangled name."""
    cubin, log = compile_cubin(source, arch, folder)
    used = re.compile(r"Compiling entry function '(\w+)' for.*?Used (\d+) registers", re.DOTALL)
    registers = {match[1]: int(match[2]) for match in used.finditer(log)}
    code = parse_functions(disassemble(cubin))
    constants = _sections(cubin.read_bytes())
    return {
        name: Kernel(name, found, registers[name], constants.get(f".nv.constant2.{name}", b""))
        for name, found in code
        if name in registers
    }


def _sections(elf: bytes) -> dict[str, bytes]:
    """Sections of a 64-bit ELF file by name."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", elf, table + size * index) for index in range(count)]
    first = heads[names][4]
    return {
        elf[first + name : elf.index(b"\0", first + name)].decode(): elf[offset : offset + nbytes]
        for name, kind, _, _, offset, nbytes in heads
        if kind != 8  # without contents
    }


def plan_launches(
    folder: Path,
    arch: int,
    activation: str,
    dtype: str,
    tokens: int,
    sizes: tuple[int, int],
    ranks: Sequence[int],
) -> list[Launch]:
    """Plan a call of a layer of two stages, and return its launches."""
    program = folder / "launches"
    if not program.exists():
        sources = [path for pattern in _SOURCES for path in sorted((ROOT / "csrc").glob(pattern))]
        command: list[str | Path] = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-o", program]
        command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", '-DLB2_VERSION_STRING="0"']
        output_of([*command, Path(__file__).with_name("launches.cpp"), *sources])
    _, multiprocessors, shared_bytes = DEVICES[arch]
    numbers = [
        arch,
        multiprocessors,
        shared_bytes,
        ACTIVATIONS[activation],
        DTYPES[dtype],
        tokens,
        *sizes,
        *ranks,
    ]
    launches = []
    for line in output_of([program, *map(str, numbers)]).splitlines():
        kind, stage, tile, x, y, z, params = line.split()
        launches.append(Launch(kind, int(stage), int(tile), (int(x), int(y), int(z)), bytes.fromhex(params)))
    return launches


def kernel_of(kernels: Mapping[str, Kernel], launch: Launch) -> Kernel:
    """The kernel that a launch takes, found by its mangled name."""
    name = "decode_plain" if launch.kind.startswith("plain") else launch.kind
    tile = f"ELi{launch.token_tile}E"
    halves = {"plain": "Lb0E", "plain16": "Lb1E"}.get(launch.kind, "")
    parts = (f"{len(name)}{name}I", f"{tile}{halves}")
    names = [name for name in kernels if all(part in name for part in parts)]
    if len(names) != 1:
        raise ValueError(
            f"one kernel's name must hold {' and '.join(parts)}, got {', '.join(names) or 'none'}"
        )
    return kernels[names[0]]
