"""``python -m benchmarks.kernel_report``: registers and local memory of every CUDA kernel, as a table.

Compiles the kernels with nvcc, which needs no GPU, and reads what ptxas says of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import PROCESSORS
from benchmarks.markdown import markdown

__all__ = ["POLICIES", "TOKEN_TILES", "Kernel", "main", "parse_ptxas"]

ROOT = Path(__file__).resolve().parents[1]
#: Activation modes, and the template argument by which a kernel's mangled name tells its mode.
POLICIES = {
    "exact": "SignHalvesILi2E",
    "float16": "SignHalvesILi1E",
    "int16": "BitPlanesILi16E",
    "int8": "BitPlanesILi8E",
    "sign": "BitPlanesILi2E",
}
TOKEN_TILES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Kernel:
    """What ptxas said of one kernel: bytes of stack frame and spills together, and registers of a thread."""

    kind: str
    mode: str
    token_tile: int
    capability: int
    local_bytes: int
    registers: int


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
        mode = next((mode for mode, policy in POLICIES.items() if policy in name), None)
        tile = re.search(r"EELi(\d+)EE", name)
        if mode is None or tile is None:
            raise ValueError(f"kernel names must hold an activation mode and a token tile, got {name}")
        kind = "convert" if "7convert" in name else "decode"
        local = sum(int(match[group]) for group in (3, 4, 5))
        yield Kernel(kind, mode, int(tile[1]), int(match[2]), local, int(match[6]))


def _compile(mode: str, capability: int, folder: Path) -> str:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas=-v", "-cubin"]
    command += [
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'include'}",
        "-o",
        str(folder / f"{mode}{capability}"),
    ]
    command.append(str(ROOT / "csrc" / "cuda" / f"kernels_{mode}.cu"))
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    ).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a kernel uses local memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__)
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 120])
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(PROCESSORS)) as pool:
        jobs = [(mode, capability, Path(folder)) for mode in POLICIES for capability in options.archs]
        logs = pool.map(lambda job: _compile(*job), jobs)
        kernels = [kernel for log in logs for kernel in parse_ptxas(log)]
    found = {(k.kind, k.mode, k.token_tile, k.capability): k for k in kernels}
    rows = []
    for kind, tiles in (("decode", TOKEN_TILES), ("convert", TOKEN_TILES[3:])):
        for mode in POLICIES:
            cells = [
                "/".join(str(found[kind, mode, tile, arch].registers) for arch in options.archs)
                for tile in tiles
            ]
            rows.append([kind, mode, *[""] * (len(TOKEN_TILES) - len(tiles)), *cells])
    print(markdown(["registers", "mode", *map(str, TOKEN_TILES)], rows))
    spilled = [kernel for kernel in kernels if kernel.local_bytes]
    print(f"\n{len(kernels)} kernels, {len(spilled)} with local memory")
    for kernel in spilled:
        print(kernel)
    return int(bool(spilled))


if __name__ == "__main__":
    sys.exit(main())
