"""Plots of a run: roofline, speed-up against bits per weight, latency against tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Document, Row

__all__ = ["series", "write_plots"]

DPI = 120


Key = tuple[str, str, int]


def series(
    rows: Iterable[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> dict[Key, list[tuple[float, float]]]:
    """Points ``(x, geometric mean of y)`` of every candidate, mode and number of threads, by x.

    The values of ``y`` must be positive.
    """
    found: dict[Key, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(_key(row), {}).setdefault(x(row), []).append(y(row))
    return {
        key: [(at, statistics.geometric_mean(values)) for at, values in sorted(points.items())]
        for key, points in found.items()
    }


def _key(row: Row) -> Key:
    return (row.label, row.mode, row.threads)


class _Style:
    """A colour for every candidate, a line for every mode, a marker for every number of threads."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._labels = list(dict.fromkeys(row.label for row in rows))

    def of(self, key: Key, line: bool = True) -> dict[str, Any]:
        """Options of ``plot``."""
        label, mode, threads = key
        text = f"{label} {mode}" + (f", {threads} threads" if threads > 1 else "")
        return {
            "label": text,
            "color": f"C{self._labels.index(label) % 10}",
            "linestyle": ({"cold": "-", "warm": "--"}.get(mode, ":")) if line else "",
            "marker": "s" if threads > 1 else "o",
            "fillstyle": "full" if mode == "cold" else "none",
            "markersize": 4,
        }


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def write_plots(document: Document, folder: Path) -> list[Path]:
    """Write the plots that the rows allow as PNG files, atomically.

    Args:
        document: what was measured.
        folder: where to; it is made.

    Returns:
        The files.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: the document has no rows.
    """
    if not document.rows:
        raise ValueError("the document must have rows to plot, it has none")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RuntimeError(
            "plots need matplotlib, which is not installed: pip install 'littlebit2-kernels[plot]'"
        ) from error
    mpl.use("agg")
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, draw: Callable[..., None], panels: int) -> Path:
        return _save(folder / f"{name}.png", draw, panels, _title(name, document))

    paths = [save("roofline", lambda axes: _roofline(axes, document), 1)]
    peers = list(dict.fromkeys(peer for row in document.rows if row.ours for peer in row.speedups))
    if peers:
        paths.append(save("speedup", lambda *axes: _speedups(axes, document, peers), len(peers)))
    shapes = list(dict.fromkeys((row.shape, row.bpw) for row in document.rows))
    chosen = shapes[:: max(1, len(shapes) // 4)][:4]
    paths.append(save("latency", lambda *axes: _latency(axes, document, chosen), len(chosen)))
    return paths


def _save(path: Path, draw: Callable[..., None], panels: int, title: str) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 5.8), layout="constrained", squeeze=False)
    draw(*axes[0])
    figure.suptitle(title, fontsize=9)
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, dpi=DPI, format="png")
    plt.close(figure)
    unfinished.replace(path)
    return path


_CAPTIONS = {
    "roofline": "accumulates a second against accumulates per weight byte; lines: the measured floors",
    "speedup": "fewest tokens measured, geometric mean over shapes",
    "latency": "median time of a call",
}


def _title(name: str, document: Document) -> str:
    commit = str((document.environment.get("git") or {}).get("commit") or "unknown")[:12]
    return f"{_CAPTIONS[name]}\n{document.environment.get('device')}, commit {commit}"


def _roofline(axes: Any, document: Document) -> None:
    style = _Style(document.rows)
    points: dict[Key, list[tuple[float, float]]] = {}
    for row in document.rows:
        points.setdefault(_key(row), []).append((row.macs / row.weight_bytes, row.gmacs))
    for key, where in points.items():
        axes.plot(*zip(*where, strict=True), **style.of(key, line=False))
    intensities = [row.macs / row.weight_bytes for row in document.rows]
    ends = [min(intensities) / 2, max(intensities) * 2]
    for floor in document.floors:
        threads = f"{floor.threads} threads" if floor.threads else "device"
        axes.plot(ends, [floor.read_gbs * end for end in ends], "--", color="gray", linewidth=1)
        axes.annotate(f"read, {threads}", (ends[0], floor.read_gbs * ends[0]), fontsize=7)
        for dtype, gmacs in floor.matmul_gmacs.items():
            axes.axhline(gmacs, color="gray", linewidth=1, linestyle=":")
            axes.annotate(f"matmul {dtype}, {threads}", (ends[0], gmacs), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="accumulates per weight byte", ylabel="GMAC/s")
    _legend(axes)


def _speedups(panels: Sequence[Any], document: Document, peers: Sequence[str]) -> None:
    for axes, peer in zip(panels, peers, strict=True):
        _speedup_panel(axes, document, peer)


def _speedup_panel(axes: Any, document: Document, peer: str) -> None:
    axes.axhline(1, color="gray", linewidth=1)
    style = _Style(document.rows)
    fewest = min(row.tokens for row in document.rows)
    rows = [row for row in document.rows if row.ours and row.tokens == fewest and peer in row.speedups]
    for key, points in series(rows, lambda r: r.bpw, lambda r: r.speedups[peer][0]).items():
        axes.plot(*zip(*points, strict=True), **style.of(key))
    axes.set(yscale="log", xlabel="counted bits per weight", ylabel=f"speed-up over {peer}, M = {fewest}")
    _legend(axes)


def _latency(panels: Sequence[Any], document: Document, chosen: Sequence[tuple[str, float]]) -> None:
    style = _Style(document.rows)
    for axes, (shape, bpw) in zip(panels, chosen, strict=True):
        rows = [row for row in document.rows if (row.shape, row.bpw) == (shape, bpw)]
        for key, points in series(rows, lambda r: r.tokens, lambda r: r.median * 1e6).items():
            axes.plot(*zip(*points, strict=True), **style.of(key))
        axes.set(xscale="log", yscale="log", xlabel="M", ylabel="us per call", title=f"{shape}, {bpw:g} bpw")
        _legend(axes)
