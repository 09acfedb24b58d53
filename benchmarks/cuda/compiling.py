"""CUDA sources to machine code and its listing, which needs nvcc and no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib import util
from pathlib import Path

from benchmarks.records import ROOT

__all__ = ["compile_cubin", "disassemble", "disassembler", "output_of"]


def output_of(command: Sequence[str | Path]) -> str:
    """Run a program; return what it printed.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-2000:]}")
    return done.stdout


def compile_cubin(source: Path, arch: int, folder: Path) -> tuple[Path, str]:
    """Compile a .cu file of csrc for one architecture; return the cubin and what ptxas reports."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
    return cubin, output_of([*command, *includes, "-o", cubin, source])


def disassembler() -> str:
    """Path of cuobjdump: on PATH, or in Triton's package.

    Raises:
        FileNotFoundError: it is in neither.
    """
    found = shutil.which("cuobjdump")
    triton = util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if os.access(bundled, os.X_OK) else None
    if found is None:
        raise FileNotFoundError("cuobjdump must be on PATH or in Triton's package, found it in neither")
    return found


def disassemble(binary: Path, *options: str) -> str:
    """List the machine code of a cubin or library."""
    return output_of([disassembler(), "--dump-sass", *options, binary])
