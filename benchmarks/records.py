"""What a run leaves behind: rows with their circumstances, as JSON and CSV."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import PROCESSORS
from benchmarks.layers.floors import Floor
from littlebit2_kernels import diagnostics

__all__ = [
    "SCHEMA",
    "Check",
    "Document",
    "Row",
    "environment",
    "load_document",
    "write_csv",
    "write_json",
    "write_text",
]

#: Version of the JSON document; a reader takes no other.
SCHEMA = 1

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


@dataclass(frozen=True)
class Row:
    """One candidate on one problem, timed together with the other rows of its ``group``.

    Attributes:
        group: rows of one group were interleaved, so that their samples pair up.
        candidate: its name.
        dtype: of the activations.
        ours: whether it is this project's.
        shape: name of the shape.
        in_features: K.
        out_features: N.
        bpw: counted bits per weight asked for.
        ranks: of every path.
        tokens: M.
        mode: ``hot``, ``cold``, or ``warm``: asked for cold, but the copies do not make up the cold size.
        threads: of torch's pool; 0 on a GPU.
        copies: distinct copies of the weights in use.
        weight_bytes: bytes of one copy, all of which a call reads.
        macs: multiply- or sign-accumulates of a call.
        samples: seconds of a call, one per repetition.
        median: their median.
        low: their lower quartile.
        high: their upper quartile.
        floor_fraction: time that the weights need at the measured read floor over ``median``; cold only.
        error: relative error against the float64 reference, where it was checked.
        error_bound: documented bound of that error, where there is one.
        speedups: by peer, ``[median, lower quartile, upper quartile]`` of the ratios within repetitions.
    """

    group: str
    candidate: str
    dtype: str
    ours: bool
    shape: str
    in_features: int
    out_features: int
    bpw: float
    ranks: list[int]
    tokens: int
    mode: str
    threads: int
    copies: int
    weight_bytes: int
    macs: int
    samples: list[float]
    median: float
    low: float
    high: float
    floor_fraction: float | None = None
    error: float | None = None
    error_bound: float | None = None
    speedups: dict[str, list[float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Candidate and dtype."""
        return f"{self.candidate} {self.dtype}"

    @property
    def gmacs(self) -> float:
        """1e9 accumulates a second."""
        return self.macs / self.median / 1e9

    @property
    def gbs(self) -> float:
        """GB/s of weight bytes."""
        return self.weight_bytes / self.median / 1e9


@dataclass(frozen=True)
class Check:
    """Error of one candidate on one problem against the float64 reference.

    Attributes:
        candidate: its name.
        dtype: of the activations.
        shape: name of the shape.
        bpw: counted bits per weight.
        inputs: ``normal``, values that bfloat16 holds; ``full``, all bits of float32; ``outliers``, some
            channels 50 times larger.
        error: relative Frobenius error.
        torch_error: that of torch computing the same formula in ``dtype``, where it was measured.
    """

    candidate: str
    dtype: str
    shape: str
    bpw: float
    inputs: str
    error: float
    torch_error: float | None = None


@dataclass
class Document:
    """Everything that one run measured.

    Attributes:
        environment: see :func:`environment`.
        floors: measured limits of the machine.
        rows: timings.
        checks: errors.
        unavailable: candidates that could not run, with the reason.
        goals: goals beside what was measured, of ``python -m benchmarks goals``.
    """

    environment: dict[str, Any]
    floors: list[Floor] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)


def environment(device: torch.device, threads: Sequence[int]) -> dict[str, Any]:
    """Describe the machine, the versions, the pinning of threads and the commit.

    Args:
        device: what is measured.
        threads: numbers of threads in use.
    """
    cpu = diagnostics.collect()["cpu"]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: version
            for name in ("torch", "triton", "numpy", "transformers", "gemlite", "littlebit2-kernels")
            if (version := _version(name)) is not None
        },
        "cuda": torch.version.cuda,
        "isa": cpu.get("isa"),
        "available_isas": cpu.get("available_isas"),
        "threads": list(threads),
        "affinity": list(PROCESSORS),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "load_average": list(os.getloadavg()),
        "git": git_state(Path(__file__).resolve().parents[1]),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model(Path("/proc/cpuinfo")) or platform.processor() or platform.machine()


def cpu_model(cpuinfo: Path) -> str | None:
    """The model name and family of the first processor, where the system tells them."""
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


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically, with its folders; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)
    return path


def write_json(path: Path, document: Document) -> Path:
    """Write everything, atomically; returns ``path``."""
    return write_text(path, json.dumps({"schema": SCHEMA, **asdict(document)}, indent=1) + "\n")


def load_document(path: Path) -> Document:
    """Read what :func:`write_json` wrote.

    Raises:
        ValueError: it is no such document, or one of another version.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a JSON document of this harness: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, got {schema!r}: run the benchmark again")
    del content["schema"]
    try:
        content["floors"] = [Floor(**entry) for entry in content["floors"]]
        content["rows"] = [Row(**entry) for entry in content["rows"]]
        content["checks"] = [Check(**entry) for entry in content["checks"]]
        return Document(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold what schema {SCHEMA} has: {error}") from error


def write_csv(path: Path, document: Document) -> Path:
    """Write the rows without their samples, with device and commit in every row, atomically."""
    peers = list(dict.fromkeys(peer for row in document.rows for peer in row.speedups))
    names = [f.name for f in fields(Row) if f.name not in ("samples", "speedups")]
    git = document.environment.get("git") or {}
    common = {
        "device": document.environment.get("device"),
        "torch": document.environment.get("versions", {}).get("torch"),
        "isa": document.environment.get("isa"),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "date": document.environment.get("date"),
    }
    text = io.StringIO()
    columns = [*names, "gmacs", "gbs", *(f"{q} vs {peer}" for peer in peers for q in _QUANTITIES), *common]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in document.rows:
        cells: dict[str, Any] = {name: getattr(row, name) for name in names}
        cells["ranks"] = "+".join(map(str, row.ranks))
        for peer, values in row.speedups.items():
            cells.update({f"{q} vs {peer}": v for q, v in zip(_QUANTITIES, values, strict=True)})
        writer.writerow({**cells, "gmacs": row.gmacs, "gbs": row.gbs, **common})
    return write_text(path, text.getvalue())


_QUANTITIES = ("median", "low", "high")
