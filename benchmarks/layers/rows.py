"""Rows of `sweep` and `goals`: what they hold, their JSON, CSV and markdown table."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.records import read_result, write_result, write_text

__all__ = [
    "Check",
    "Document",
    "Floor",
    "Row",
    "floor_fraction",
    "floors_table",
    "load_document",
    "rows_table",
    "write_csv",
    "write_document",
]


@dataclass(frozen=True)
class Row:
    """One candidate on one problem, timed together with the other rows of its ``group``.

    Attributes:
        group: rows of one group were interleaved, so that their samples pair up.
        candidate: its name.
        dtype: dtype of the activations.
        ours: whether it is this project's.
        shape: name of the shape.
        in_features: K.
        out_features: N.
        bpw: counted bits per weight asked for.
        ranks: rank of each path.
        tokens: M.
        mode: ``hot``, ``cold``, or ``warm``: cold was asked for, but the copies do not make up the cold size.
        threads: size of torch's thread pool; 0 on a GPU.
        copies: distinct copies of the weights in use.
        weight_bytes: bytes of one copy, all of which a call reads.
        macs: multiply- or sign-accumulates of a call.
        samples: seconds of a call, one per repetition.
        median: their median.
        low: their lower quartile.
        high: their upper quartile.
        floor_fraction: time to read the weights at the measured read floor, over ``median``; cold only.
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
        """1e9 accumulates per second."""
        return self.macs / self.median / 1e9

    @property
    def gbs(self) -> float:
        """GB/s of weight bytes."""
        return self.weight_bytes / self.median / 1e9

    @property
    def past_bound(self) -> bool:
        """Whether the error exceeds its bound; NaN does."""
        return self.error is not None and self.error_bound is not None and not self.error <= self.error_bound


@dataclass(frozen=True)
class Check:
    """Error of one candidate on one problem against the float64 reference.

    Attributes:
        candidate: its name.
        dtype: dtype of the activations.
        shape: name of the shape.
        bpw: counted bits per weight.
        inputs: ``normal``, values that bfloat16 holds; ``full``, all bits of float32; ``outliers``, some
            channels 50 times larger.
        error: relative Frobenius error.
        torch_error: error of torch computing the same formula in ``dtype``, where it was measured.
    """

    candidate: str
    dtype: str
    shape: str
    bpw: float
    inputs: str
    error: float
    torch_error: float | None = None


@dataclass(frozen=True)
class Floor:
    """Measured limits of the machine for one number of threads.

    Attributes:
        threads: size of torch's thread pool; 0 on a GPU.
        read_gbs: GB/s of the fastest reduction over a tensor that no cache holds.
        copy_gbs: GB/s of a copy of it, bytes read plus bytes written.
        matmul_gmacs: by dtype, 1e9 multiply-accumulates per second of a square matrix product.
    """

    threads: int
    read_gbs: float
    copy_gbs: float
    matmul_gmacs: dict[str, float]


@dataclass
class Document:
    """Everything that one run measured.

    Attributes:
        environment: see :func:`benchmarks.records.environment`.
        floors: measured limits of the machine.
        rows: timings.
        checks: errors.
        unavailable: candidates that could not run, with the reason.
        goals: goals beside what was measured, of `goals`.
    """

    environment: dict[str, Any]
    floors: list[Floor] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)


def write_document(path: Path, options: Namespace, document: Document) -> Path:
    """Write everything as JSON, atomically; returns ``path``."""
    contents = {f.name: getattr(document, f.name) for f in fields(Document) if f.name != "environment"}
    return write_result(path, options, document.environment, **contents)


def load_document(path: Path) -> Document:
    """Read what :func:`write_document` wrote.

    Raises:
        ValueError: it is no result of `sweep` or `goals`, or does not hold what those have.
    """
    content = read_result(path, ("sweep", "goals"))
    try:
        return Document(
            environment=content["environment"],
            floors=[Floor(**entry) for entry in content["floors"]],
            rows=[Row(**entry) for entry in content["rows"]],
            checks=[Check(**entry) for entry in content["checks"]],
            unavailable=content["unavailable"],
            goals=content["goals"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold what a result of sweep or goals has: {error}") from error


_QUANTITIES = ("median", "low", "high")


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


def rows_table(rows: Iterable[Row]) -> str:
    """Medians with their quartiles; ratios are medians of the ratios within repetitions."""
    rows = list(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row.speedups))
    checked = any(row.error is not None for row in rows)
    head = ["shape", "bpw", "M", "mode", "threads", "candidate", "us", "GMAC/s", "GB/s", "of floor"]
    head += ["error"] if checked else []
    head += [f"vs {peer}" for peer in peers]
    return markdown(head, [_cells(row, peers, checked) for row in rows])


def _cells(row: Row, peers: Sequence[str], checked: bool) -> list[str]:
    cells = [
        f"{row.in_features}->{row.out_features}",
        f"{row.bpw:g}",
        str(row.tokens),
        row.mode,
        str(row.threads or "-"),
        row.label,
        f"{row.median * 1e6:.4g} ({row.low * 1e6:.4g}-{row.high * 1e6:.4g})",
        f"{row.gmacs:.1f}",
        f"{row.gbs:.1f}",
        "" if row.floor_fraction is None else f"{row.floor_fraction:.0%}",
    ]
    if checked:
        cells.append(
            ("" if row.error is None else f"{row.error:.1e}") + (" > bound" if row.past_bound else "")
        )
    for peer in peers:
        ratio = row.speedups.get(peer)
        cells.append("" if ratio is None else f"{ratio[0]:.3g}x ({ratio[1]:.3g}-{ratio[2]:.3g})")
    return cells


def floor_fraction(nbytes: int, seconds: float, floor: Floor) -> float:
    """The time to read ``nbytes`` at the measured floor, as a share of ``seconds``."""
    return nbytes / (floor.read_gbs * 1e9) / seconds


def floors_table(floors: Iterable[Floor]) -> str:
    """The floors as a markdown table."""
    floors = list(floors)
    dtypes = list(dict.fromkeys(dtype for floor in floors for dtype in floor.matmul_gmacs))
    return markdown(
        ["threads", "read GB/s", "copy GB/s", *(f"matmul {dtype} GMAC/s" for dtype in dtypes)],
        [
            [
                str(floor.threads or "-"),
                f"{floor.read_gbs:.1f}",
                f"{floor.copy_gbs:.1f}",
                *(f"{floor.matmul_gmacs[d]:.0f}" if d in floor.matmul_gmacs else "" for d in dtypes),
            ]
            for floor in floors
        ],
    )
