"""Makes what the suite runs: the library and the programs in CUDA C++.

On a machine without a GPU, ``gpu-suite prepare`` makes them for one architecture and leaves them in a folder
to be carried along, beside GemLite's wheel. On the GPU machine, ``python -m benchmarks.cuda.suite.make``
takes them from there where they were made of the same sources and load, and compiles them otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cuda.suite.steps import PYTHON
from benchmarks.records import ROOT, git_state

__all__ = ["CARRIED", "GEMLITE", "main", "prepare", "sources_digest"]

#: Programs that are carried; the others link the library, by a path of the machine.
CARRIED = ("mma_rates", "boundary")
GEMLITE = "gemlite==0.6.0.post2"
#: More than this does not travel.
MOST_MIB = 60

_PACKAGE = ROOT / "littlebit2_kernels"
_LIBRARY_SOURCES = ("csrc", "cmake", "CMakeLists.txt", "littlebit2_kernels/version.py")
_PROGRAM_SOURCES = ("csrc/cuda/device.h", "csrc/include", "benchmarks/cuda/timing.h")


def sources_digest(names: Iterable[str]) -> str:
    """A digest of files and of all files in folders, by their paths from the root."""
    total = hashlib.sha256()
    for name in names:
        place = ROOT / name
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        for path in files:
            if path.suffix != ".pyc":
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _digest(what: str) -> str:
    if what == "library":
        return sources_digest(_LIBRARY_SOURCES)
    return sources_digest((*_PROGRAM_SOURCES, f"benchmarks/cuda/{what}.cu"))


def _run(*command: str | Path, **variables: str) -> None:
    print("+", shlex.join(map(str, command)), flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **variables}, check=True)


def _compile_library(build: Path, prefix: Path, arch: str) -> None:
    ninja = ("-G", "Ninja") if shutil.which("ninja") else ()
    options = (f"-DPython_EXECUTABLE={PYTHON}", "-DLB2_CUDA=on", f"-DLB2_CUDA_ARCHS={arch}-real")
    _run("cmake", "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options, *ninja)
    _run("cmake", "--build", build, "--parallel")
    _run("cmake", "--install", build, "--prefix", prefix)


def _compile_program(source: str, target: Path, arch: str) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-o", str(target)]
    command += [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "benchmarks")]
    command.append(str(ROOT / "benchmarks" / "cuda" / f"{source}.cu"))
    if source not in CARRIED:
        lib = _PACKAGE / "lib"
        command += [f"-L{lib}", f"-Xlinker=-rpath={lib}", "-llittlebit2_cuda", "-llittlebit2"]
    _run(*command)


# --- on the GPU machine --------------------------------------------------------------------------------


def _carried(carry: Path, what: str, arch: str) -> str:
    """Why what was carried along cannot be taken, or nothing."""
    try:
        manifest = json.loads((carry / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return f"nothing was carried along in {carry}"
    if manifest.get("arch") != arch:
        return f"it was compiled for sm_{manifest.get('arch')}, this GPU is sm_{arch}"
    if manifest.get("digests", {}).get(what) != _digest(what):
        return "it was compiled of other sources"
    return ""


def _loads() -> bool:
    script = "from littlebit2_kernels import load; load('cuda')"
    tried = subprocess.run([PYTHON, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if tried.returncode:
        print(f"what was carried along does not load here:\n{tried.stderr}", flush=True)
    return tried.returncode == 0


def _take_library(carry: Path) -> bool:
    for name in ("lib", "include"):
        shutil.rmtree(_PACKAGE / name, ignore_errors=True)
        shutil.copytree(carry / "package" / name, _PACKAGE / name)
    return _loads()


def _provide(what: str, name: str, work: Path, carry: Path, arch: str) -> None:
    reason = _carried(carry, what, arch)
    if what == "library":
        if not reason and _take_library(carry):
            print("the library that was carried along loads")
            return
        print(f"compiling the library: {reason or 'see above'}", flush=True)
        _compile_library(work / f"library-{arch}", _PACKAGE, arch)
        return
    target = work / name
    if not reason:
        shutil.copy(carry / what, target)
        target.chmod(0o755)
        print(f"{what} was carried along")
        return
    print(f"compiling {what}: {reason}", flush=True)
    _compile_program(what, target, arch)


# --- before ----------------------------------------------------------------------------------------------


def prepare(carry: Path, arch: str) -> int:
    """Make everything for ``arch`` and collect it in ``carry``, without a GPU; returns the exit status."""
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"prepare needs {tool} on PATH, which was not found")
    start = time.monotonic()
    print(f"compiling the library for sm_{arch}: five to ten minutes on one core")
    carry.mkdir(parents=True, exist_ok=True)
    (carry / "manifest.json").unlink(missing_ok=True)
    _compile_library(ROOT / "build" / f"prepare-{arch}", carry / "package", arch)
    for program in CARRIED:
        _compile_program(program, carry / program, arch)
    wheels = carry / "wheels"
    if not any(wheels.glob("gemlite-*.whl")):
        wheel = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, GEMLITE)
        if subprocess.run([PYTHON, *map(str, wheel)], check=False).returncode:
            print(f"there is no wheel of {GEMLITE} to be had here: the suite will leave GemLite out")
    manifest = {
        "arch": arch,
        "digests": {what: _digest(what) for what in ("library", *CARRIED)},
        "git": git_state(ROOT),
    }
    (carry / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    size = sum(path.stat().st_size for path in carry.rglob("*") if path.is_file()) / 2**20
    print(f"{carry}: {size:.1f} MiB after {time.monotonic() - start:.0f} s")
    if size > MOST_MIB:
        print(f"error: that is more than the {MOST_MIB} MiB that travel", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Provide the library or a program, on the GPU machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.suite.make", description=__doc__)
    parser.add_argument("what", help="library, or the name of a .cu file of benchmarks/cuda")
    parser.add_argument("--as", dest="name", help="name of the program (default: that of its source)")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--carry", type=Path, required=True)
    parser.add_argument("--arch", required=True)
    options = parser.parse_args(arguments)
    name = options.name or options.what
    _provide(options.what, name, options.work, options.carry, options.arch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
