"""List registers and local memory of every CUDA kernel, as a table; exit 1 if a kernel uses local memory.

Compiles the kernels with nvcc, which needs no GPU, and reads what ptxas reports.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import PROCESSORS
from benchmarks.cuda.compiling import compile_cubin
from benchmarks.markdown import markdown
from benchmarks.options import add_json
from benchmarks.records import ROOT, host_environment, write_result

__all__ = [
    "GEMM_POLICIES",
    "GEMM_TILES",
    "POLICIES",
    "TOKEN_TILES",
    "Kernel",
    "add_arguments",
    "gemm_tiles",
    "parse_ptxas",
    "run",
]

#: Activation modes, and the template argument by which a kernel's mangled name tells its mode.
POLICIES = {
    "exact": "SignHalvesILi2E",
    "float16": "SignHalvesILi1E",
    "int16": "BitPlanesILi16E",
    "int8": "BitPlanesILi8E",
    "sign": "BitPlanesILi2E",
}
TOKEN_TILES = (1, 2, 4, 8, 16)
#: The same for the GEMM, and its tiles of rows and tokens.
GEMM_POLICIES = {"exact": "GemmHalvesILi2E", "float16": "GemmHalvesILi1E", "int8": "GemmInt8"}
GEMM_TILES = ((64, 32), (128, 32), (128, 64), (128, 128))


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel: bytes of stack frame and spills together, registers per thread.

    ``row_tile`` is 0 except for a GEMM. ``token_tile`` is 0 for a GEMM's conversion and for ``fused``, the
    kernel of both stages. ``unpack``, ``normalize`` and ``pointwise`` have no mode.
    ``decode_extended`` and ``convert_extended`` are those with what surrounds a layer (docs/cuda.md);
    ``decode_plain`` are those of calls as most are, one for input of 32 bits and one for 16.
    """

    kind: str
    mode: str
    token_tile: int
    capability: int
    local_bytes: int
    registers: int
    row_tile: int = 0


def gemm_tiles(mode: str) -> tuple[tuple[int, int], ...]:
    """Tiles that are compiled for a mode."""
    return tuple(tile for tile in GEMM_TILES if mode != "exact" or tile[1] < 128)


def parse_ptxas(log: str) -> Iterator[Kernel]:
    """The kernels in the output of ``nvcc -Xptxas=-v``."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    for match in pattern.finditer(log):
        name = match[1]
        prefill = {"4gemmI": "gemm", "12gemm_convertI": "gemm_convert", "5fusedI": "fused"}
        prefill_kind = next((kind for part, kind in prefill.items() if part in name), None)
        policies = POLICIES if prefill_kind is None else GEMM_POLICIES
        mode = next((mode for mode, policy in policies.items() if policy in name), None)
        shape = re.search(r"GemmShapeILi(\d+)ELi(\d+)E", name)
        tile = re.search(r"EELi(\d+)E(?:Lb[01]E)?E", name)
        local = sum(int(match[group]) for group in (3, 4, 5))
        if mode is not None and shape is not None:
            yield Kernel("gemm", mode, int(shape[2]), int(match[2]), local, int(match[6]), int(shape[1]))
        elif mode is not None and prefill_kind is not None:
            yield Kernel(prefill_kind, mode, 0, int(match[2]), local, int(match[6]))
        elif mode is not None and tile is not None:
            kind = "convert" if "convert" in name else "decode"
            kind += "_extended" if "_extendedI" in name else "_plain" if "_plainI" in name else ""
            yield Kernel(kind, mode, int(tile[1]), int(match[2]), local, int(match[6]))
        elif (rows := re.search(r"9int8_rowsILi(\d+)E", name)) is not None:
            yield Kernel("int8_rows", "", int(rows[1]), int(match[2]), local, int(match[6]))
        elif (single := re.search(r"\d(unpack|normalize|pointwise)E", name)) is not None:
            yield Kernel(single[1], "", 0, int(match[2]), local, int(match[6]))
        else:
            raise ValueError(f"kernel names must hold an activation mode and a tile, got {name}")


def _compile(file: str, capability: int, folder: Path) -> str:
    return compile_cubin(ROOT / "csrc" / "cuda" / f"{file}.cu", capability, folder)[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 120], help="default: 80 90 120")
    add_json(parser)


def run(options: Namespace) -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(PROCESSORS)) as pool:
        files = [
            *(f"instances/decode_{mode}" for mode in POLICIES),
            "unpack/unpack",
            "pointwise/pointwise",
            "int8/int8",
        ]
        files += [f"instances/{kind}_{mode}" for kind in ("gemm", "fused") for mode in GEMM_POLICIES]
        jobs = [(file, capability, Path(folder)) for file in files for capability in options.archs]
        logs = pool.map(lambda job: _compile(*job), jobs)
        kernels = [kernel for log in logs for kernel in parse_ptxas(log)]
    # Of the two plain kernels of a tile, the one with more registers.
    kernels.sort(key=lambda kernel: kernel.registers)
    found = {(k.kind, k.mode, k.row_tile, k.token_tile, k.capability): k for k in kernels}

    def cell(kind: str, mode: str, rows: int, tokens: int) -> str:
        names = [(kind, mode, rows, tokens, arch) for arch in options.archs]
        return "/".join(str(found[name].registers) if name in found else "" for name in names).strip("/")

    rows = []
    kinds = (("decode", TOKEN_TILES), ("convert", TOKEN_TILES[3:]))
    extended = [(f"{kind}_extended", tiles) for kind, tiles in kinds]
    for kind, tiles in (*kinds, ("decode_plain", TOKEN_TILES), *extended):
        for mode in POLICIES:
            cells = [cell(kind, mode, 0, tile) for tile in tiles]
            rows.append([kind, mode, *[""] * (len(TOKEN_TILES) - len(tiles)), *cells])
    print(markdown(["registers", "mode", *map(str, TOKEN_TILES)], rows))
    rows = [
        [
            mode,
            cell("gemm_convert", mode, 0, 0),
            *(cell("gemm", mode, *tile) for tile in GEMM_TILES),
            cell("fused", mode, 0, 0),
        ]
        for mode in GEMM_POLICIES
    ]
    print()
    print(
        markdown(["GEMM", "convert", *(f"{rows} x {tokens}" for rows, tokens in GEMM_TILES), "fused"], rows)
    )
    singles = (f"{kind}: {cell(kind, '', 0, 0)} registers" for kind in ("unpack", "normalize", "pointwise"))
    print("\n" + "; ".join(singles))
    print("int8_rows: " + ", ".join(cell("int8_rows", "", 0, tile) for tile in TOKEN_TILES) + " registers")
    spilled = [kernel for kernel in kernels if kernel.local_bytes]
    print(f"\n{len(kernels)} kernels, {len(spilled)} with local memory")
    for kernel in spilled:
        print(kernel)
    if options.json is not None:
        write_result(options.json, options, host_environment(), kernels=kernels)
    return int(bool(spilled))
