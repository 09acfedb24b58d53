"""What was built, what can run here, and why not: ``python -m littlebit2_kernels.diagnostics [--json]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import product
from typing import Any, NamedTuple

import torch

from ._native import NativeLibraryError, core, no_cuda_reason, ops_library_path
from .dispatch import BACKENDS, unavailable_reason
from .format import FORMAT_VERSION, LayerShape
from .functional import littlebit_linear
from .gpu import gpu_properties
from .ops.library import load
from .planning.native import plan_cuda
from .prepacked import prepack
from .reference import linear_reference
from .testing import TOLERANCE, make_problem, relative_error
from .triton.backend import no_triton_reason
from .version import __version__

__all__ = ["SelfTest", "collect", "main", "self_tests"]


class SelfTest(NamedTuple):
    """One backend, tried on small layers against float64.

    Attributes:
        name: of the backend, with the instruction set or the GPU.
        passed: ``None`` where it cannot run.
        outcome: the error that was found, or why there is none.
    """

    name: str
    passed: bool | None
    outcome: str


def collect() -> dict[str, Any]:
    """Gather the report; nothing in it raises.

    Returns:
        JSON-serializable sections ``package``, ``native``, ``cpu``, ``gpu``, ``backends`` and ``self_test``.
        ``self_test`` is ``"ok"`` or the reason why the CPU kernels do not work.
    """
    return {
        "package": {
            "littlebit2_kernels": __version__,
            "format_version": FORMAT_VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed_version("triton"),
            "platform": platform.platform(),
        },
        "native": _native(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "backends": {name: _backend(name) for name in BACKENDS if name != "auto"},
        "self_test": _self_test(),
    }


def _installed_version(name: str) -> str | None:
    # The version without importing: triton is slow to import and may touch the GPU.
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _native() -> dict[str, Any]:
    try:
        module = core()
    except NativeLibraryError as error:
        return {"error": str(error)}
    report = {
        "version": module.version,
        "compiler": module.compiler,
        "cuda_kernels": module.cuda_archs or "not built",
        "operator_library": str(ops_library_path()),
    }
    try:
        load()
    except NativeLibraryError as error:
        report["error"] = str(error)
    return report


def _cpu() -> dict[str, Any]:
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "LB2_CPU_ISA": os.environ.get("LB2_CPU_ISA"),
    }
    try:
        report["available_isas"] = core().cpu_isas()
        report["isa"] = core().cpu_isa()
    except (NativeLibraryError, RuntimeError, ValueError) as error:
        report["error"] = str(error)
    return report


def _gpu() -> dict[str, Any]:
    if not torch.backends.cuda.is_built() and torch.version.hip is None:
        return {"available": False, "reason": "this torch was built without CUDA or ROCm"}
    if not torch.cuda.is_available():
        return {"available": False, "reason": "torch finds no usable GPU or driver"}
    return {
        "available": True,
        "toolkit": torch.version.cuda or torch.version.hip,
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
    }


def _device(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    device = torch.device("cuda", index)
    try:
        usable = no_cuda_reason() or _cuda_self_test(device)
    except (NativeLibraryError, RuntimeError) as error:
        usable = str(error)
    try:
        triton = no_triton_reason("cuda") or _gpu_self_test(device, "triton")
    except Exception as error:  # whatever Triton's compiler says
        triton = f"{type(error).__name__}: {error}"
    return f"{found.name} (sm_{found.major}{found.minor}): triton: {triton}; cuda: {usable}"


def _cuda_self_test(device: torch.device) -> str:
    # Planning says why a GPU is not served.
    plan_cuda(LayerShape(512, 512, (8,)), 1, torch.float32, 0, gpu_properties(device))
    return _gpu_self_test(device, "cuda")


def _gpu_self_test(device: torch.device, backend: str) -> str:
    _, error = next(_errors(backend, device))
    return "usable" if error <= TOLERANCE[torch.float32] else f"wrong results: relative error {error:.2e}"


def _errors(
    backend: str, device: torch.device, tokens: Sequence[int] = (3,), *, prepacked: bool = False
) -> Iterator[tuple[torch.dtype, float]]:
    """Try a backend on a small layer against float64: yield the relative error by dtype, float32 first."""
    for dtype, count in product(TOLERANCE, tokens):
        x, packed = make_problem(
            count, 100, 70, [24, 8], dtype=dtype, generator=torch.Generator().manual_seed(0)
        )
        layer = prepack(packed) if prepacked else packed.to(device)
        y = littlebit_linear(x.to(device), layer, backend=backend)
        yield dtype, relative_error(y.cpu(), linear_reference(x, packed))


def _backend(name: str) -> str:
    device_type = "cuda" if name in ("cuda", "triton") else "cpu"
    reason = unavailable_reason(name, device_type)
    return "available" if reason is None else f"unavailable: {reason}"


def _self_test() -> str:
    try:
        for dtype, error in _errors("auto", torch.device("cpu")):
            tolerance = TOLERANCE[dtype]
            if not error <= tolerance:
                return f"wrong results in {dtype}: relative error {error:.2e}, allowed {tolerance:.0e}"
    except (NativeLibraryError, RuntimeError) as error:
        return str(error)
    return "ok"


def self_tests() -> list[SelfTest]:
    """Try every backend that this machine has, the CPU kernels with each instruction set; nothing raises."""
    found = []
    for backend in BACKENDS[1:]:
        device_type = "cuda" if backend in ("cuda", "triton") else "cpu"
        reason = unavailable_reason(backend, device_type)
        if reason is not None:
            # What was built runs on any CPU.
            found.append(SelfTest(backend, None if device_type == "cuda" else False, reason))
        elif backend == "cpu":
            found += _cpu_self_tests()
        elif device_type == "cuda":
            for index in range(torch.cuda.device_count()):
                name = f"{backend} ({index}: {torch.cuda.get_device_name(index)})"
                found.append(_tried(name, backend, torch.device("cuda", index)))
        else:
            found.append(_tried(backend, backend, torch.device("cpu")))
    return found


def _cpu_self_tests() -> list[SelfTest]:
    found: list[SelfTest] = []
    try:
        current = core().cpu_isa()
    except (RuntimeError, ValueError) as error:  # LB2_CPU_ISA names none, or one that cannot run
        return [SelfTest("cpu", False, str(error))]
    for isa in core().cpu_isas():
        core().set_cpu_isa(isa)
        try:
            used = ", used here" if isa == current else ""
            found.append(_tried(f"cpu ({isa}{used})", "cpu", torch.device("cpu")))
        finally:
            core().set_cpu_isa("auto")
            if core().cpu_isa() != current:
                core().set_cpu_isa(current)
    return found


def _allowed(backend: str, dtype: torch.dtype) -> float:
    tolerance = TOLERANCE[dtype]
    if backend == "blas":
        return 2.5 * tolerance  # factors and latents are rounded too
    # Prepacked layers and the CUDA kernels take 16-bit activations in int16 tables or planes.
    return tolerance if dtype == torch.float32 else tolerance + 5e-4


def _tried(name: str, backend: str, device: torch.device) -> SelfTest:
    worst, bound = 0.0, 0.0
    try:
        # Kernels for few tokens and for many differ.
        for dtype, error in _errors(backend, device, (3, 40), prepacked=backend == "cpu"):
            allowed = _allowed(backend, dtype)
            if not error <= allowed:
                return SelfTest(name, False, f"relative error {error:.1e} in {dtype}, allowed {allowed:.0e}")
            worst, bound = max(worst, error), max(bound, allowed)
    except Exception as error:  # whatever a driver or a compiler says
        return SelfTest(name, False, f"{type(error).__name__}: {error}")
    return SelfTest(name, True, f"largest relative error {worst:.1e}, allowed {bound:.0e}")


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return 0 when the self-test passes (and GPUs are usable, if they must be), else 1."""
    parser = argparse.ArgumentParser(prog="python -m littlebit2_kernels.diagnostics", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--require-gpu", action="store_true", help="fail unless every GPU passes its self-test"
    )
    options = parser.parse_args(arguments)
    try:
        code = _print_report(as_json=options.json, require_gpu=options.require_gpu)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the report has gone; keep the interpreter from failing again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _print_report(*, as_json: bool, require_gpu: bool) -> int:
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for section, content in report.items():
            if not isinstance(content, dict):
                print(f"{section}: {content}")
                continue
            print(f"{section}:")
            for key, value in content.items():
                print(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
    gpus = report["gpu"].get("devices", [])
    usable = bool(gpus) and all(gpu.endswith(": usable") for gpu in gpus)
    return 0 if report["self_test"] == "ok" and (usable or not require_gpu) else 1


if __name__ == "__main__":
    sys.exit(main())
