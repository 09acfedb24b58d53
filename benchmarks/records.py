"""The one format of results: JSON that says what ran, where, and at which commit.

``schema``, ``benchmark`` (the command's name), ``command`` (the whole command line), ``environment``
(machine, versions, commit) and ``settings`` (the options' values) are in every file; the other keys are
the benchmark's own.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import PROCESSORS

if TYPE_CHECKING:
    import torch

__all__ = [
    "ROOT",
    "SCHEMA",
    "describe_environment",
    "environment",
    "git_state",
    "host_environment",
    "read_result",
    "result",
    "write_result",
    "write_text",
]

#: Version of the format; a reader takes no other.
SCHEMA = 2
#: The checkout.
ROOT = Path(__file__).resolve().parents[1]

_HEAD = ("schema", "benchmark", "command", "environment", "settings")
_PACKAGES = ("torch", "triton", "numpy", "transformers", "gemlite", "littlebit2-kernels")
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "LD_PRELOAD",
    "LB2_CPU_ISA",
)


def host_environment() -> dict[str, Any]:
    """Describe machine, versions, variables that pin threads, load and commit; needs no torch."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_model(Path("/proc/cpuinfo")) or platform.processor() or platform.machine(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "affinity": list(PROCESSORS),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "load_average": list(os.getloadavg()),
        "git": git_state(ROOT),
    }


def environment(device: torch.device, threads: Sequence[int]) -> dict[str, Any]:
    """:func:`host_environment`, and what torch and the kernels say of ``device``.

    Args:
        device: the device that is measured.
        threads: numbers of threads in use; ``[0]`` on a GPU.
    """
    import torch

    from littlebit2_kernels import diagnostics

    cpu = diagnostics.collect()["cpu"]
    about = host_environment()
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    return {
        **about,
        "cuda": torch.version.cuda,
        "isa": cpu.get("isa"),
        "available_isas": cpu.get("available_isas"),
        "threads": list(threads),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model(cpuinfo: Path) -> str | None:
    """Model name and family of the first processor, or ``None`` if ``cpuinfo`` does not have them."""
    try:
        lines = cpuinfo.read_text("utf-8").splitlines()
    except OSError:
        return None
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return None
    # Virtual machines often hide the model: family and number still tell the generation.
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout and whether it has changes, or ``None`` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_environment(about: Mapping[str, Any]) -> str:
    """What a reader needs to know about the circumstances, as lines of text."""
    git = about.get("git") or {}
    commit = str(git.get("commit") or "unknown")[:12] + (" with local changes" if git.get("dirty") else "")
    variables = " ".join(f"{name}={value}" for name, value in about.get("variables", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return "\n".join(
        (
            f"{about.get('device')}, CPU kernels {about.get('isa')}, {about.get('platform')}",
            f"{versions}, commit {commit}, {about.get('date')}",
            f"threads {about.get('threads')} on processors {about.get('affinity')}; "
            f"{variables or 'no variables for pinning set'}; load average {about.get('load_average')}",
        )
    )


def result(options: Namespace, about: Mapping[str, Any], **contents: Any) -> dict[str, Any]:
    """The JSON object of one run.

    Args:
        options: what ``python -m benchmarks`` parsed.
        about: see :func:`environment`.
        contents: the benchmark's own keys; dataclasses become objects.
    """
    settings = {k: v for k, v in vars(options).items() if k not in ("arguments", "command", "run")}
    return {
        "schema": SCHEMA,
        "benchmark": options.command,
        "command": shlex.join(("python", "-m", "benchmarks", *options.arguments)),
        "environment": dict(about),
        "settings": settings,
        **contents,
    }


def write_result(path: Path, options: Namespace, about: Mapping[str, Any], **contents: Any) -> Path:
    """Write :func:`result` atomically; returns ``path``."""
    content = result(options, about, **contents)
    return write_text(path, json.dumps(content, indent=1, default=_encoded) + "\n")


def _encoded(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def read_result(path: Path, benchmarks: Collection[str]) -> dict[str, Any]:
    """Read what :func:`write_result` wrote.

    Args:
        path: the file.
        benchmarks: names of commands whose results will do.

    Raises:
        ValueError: it is no result, one of another schema, or one of another benchmark.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a JSON file of `python -m benchmarks`: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {schema!r}: run the benchmark again")
    missing = [key for key in _HEAD if key not in content]
    if missing:
        raise ValueError(f"{path} must have the keys {', '.join(_HEAD)}, it lacks {', '.join(missing)}")
    if content["benchmark"] not in benchmarks:
        wanted = " or ".join(benchmarks)
        raise ValueError(f"{path} must be a result of {wanted}, got one of {content['benchmark']!r}")
    return content


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, with its folders; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)
    return path
