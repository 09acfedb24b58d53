"""Plot a JSON as PNG files.

Of `sweep` or `goals`: roofline, speedup by bits per weight, latency by tokens. Of `whole-model --profile`:
where the time of a step goes.

Every figure of the benchmarks is drawn here, one function each, with one style.
"""

from __future__ import annotations

import argparse
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.layers.rows import Document, Row
    from littlebit2.quantize import LayerReport
    from littlebit2.quantize.allocate import LayerSpectrum

__all__ = [
    "add_arguments",
    "demo_figure",
    "document_figures",
    "finetune_figure",
    "run",
    "series",
    "spectra_figure",
    "steps_figure",
]

#: Inches of one panel.
PANEL = (5.6, 4.8)
DPI = 100
#: Colors by what is drawn; whatever is not listed takes the next color of matplotlib's cycle.
COLORS = {
    "ours": "tab:blue",
    "peer": "tab:gray",
    "mark": "tab:orange",
    "dual-svid": "tab:red",
    "joint-itq": "tab:orange",
    "admm": "tab:blue",
    "attention": "tab:blue",
    "intermediate": "tab:orange",
    "output": "tab:green",
}
FINE_LINE = {"linewidth": 0.8, "alpha": 0.7}

Key = tuple[str, str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("json", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path("build/benchmarks"), help="folder (default %(default)s)"
    )


def run(options: Namespace) -> int:
    """Write the figures and print their paths."""
    from benchmarks.layers.rows import load_document
    from benchmarks.records import read_result

    if read_result(options.json, ("sweep", "goals", "whole-model"))["benchmark"] == "whole-model":
        paths = [steps_figure(options.json, options.out / "steps.png")]
    else:
        paths = document_figures(load_document(options.json), options.out)
    for path in paths:
        print(path)
    return 0


@contextmanager
def _figure(path: Path, rows: int, columns: int, *, title: str = "", sharex: bool = False) -> Iterator[Any]:
    """A grid of axes ``[rows][columns]``; written to ``path`` as PNG, atomically, at the end of the block.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise RuntimeError(
            "plots need matplotlib, which is not installed: pip install 'littlebit2-kernels[plot]'"
        ) from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    size = (PANEL[0] * columns, PANEL[1] * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=sharex
    )
    try:
        yield grid
        if title:
            figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        figure.savefig(unfinished, dpi=DPI, format="png")
        unfinished.replace(path)
    finally:
        plt.close(figure)


# --- sweep and goals -----------------------------------------------------------------------------------


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
    """A color for every candidate, a line for every mode, a marker for every number of threads."""

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


def document_figures(document: Document, folder: Path) -> list[Path]:
    """Write the figures that the rows allow; returns the files.

    Args:
        document: what was measured.
        folder: the folder for the files; it is made.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: the document has no rows.
    """
    if not document.rows:
        raise ValueError("the document must have rows to plot, it has none")

    def save(name: str, draw: Callable[..., None], panels: int) -> Path:
        path = folder / f"{name}.png"
        with _figure(path, 1, panels, title=_title(name, document)) as grid:
            draw(*grid[0])
        return path

    paths = [save("roofline", lambda axes: _roofline(axes, document), 1)]
    peers = list(dict.fromkeys(peer for row in document.rows if row.ours for peer in row.speedups))
    if peers:
        paths.append(save("speedup", lambda *axes: _speedups(axes, document, peers), len(peers)))
    shapes = list(dict.fromkeys((row.shape, row.bpw) for row in document.rows))
    chosen = shapes[:: max(1, len(shapes) // 4)][:4]
    paths.append(save("latency", lambda *axes: _latency(axes, document, chosen), len(chosen)))
    return paths


_CAPTIONS = {
    "roofline": "accumulates per second against accumulates per weight byte; lines: the measured floors",
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
        axes.plot(ends, [floor.read_gbs * end for end in ends], "--", color=COLORS["peer"], linewidth=1)
        axes.annotate(f"read, {threads}", (ends[0], floor.read_gbs * ends[0]), fontsize=7)
        for dtype, gmacs in floor.matmul_gmacs.items():
            axes.axhline(gmacs, color=COLORS["peer"], linewidth=1, linestyle=":")
            axes.annotate(f"matmul {dtype}, {threads}", (ends[0], gmacs), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="accumulates per weight byte", ylabel="GMAC/s")
    _legend(axes)


def _speedups(panels: Sequence[Any], document: Document, peers: Sequence[str]) -> None:
    for axes, peer in zip(panels, peers, strict=True):
        _speedup_panel(axes, document, peer)


def _speedup_panel(axes: Any, document: Document, peer: str) -> None:
    axes.axhline(1, color=COLORS["peer"], linewidth=1)
    style = _Style(document.rows)
    fewest = min(row.tokens for row in document.rows)
    rows = [row for row in document.rows if row.ours and row.tokens == fewest and peer in row.speedups]
    for key, points in series(rows, lambda r: r.bpw, lambda r: r.speedups[peer][0]).items():
        axes.plot(*zip(*points, strict=True), **style.of(key))
    axes.set(yscale="log", xlabel="counted bits per weight", ylabel=f"speedup over {peer}, M = {fewest}")
    _legend(axes)


def _latency(panels: Sequence[Any], document: Document, chosen: Sequence[tuple[str, float]]) -> None:
    style = _Style(document.rows)
    for axes, (shape, bpw) in zip(panels, chosen, strict=True):
        rows = [row for row in document.rows if (row.shape, row.bpw) == (shape, bpw)]
        for key, points in series(rows, lambda r: r.tokens, lambda r: r.median * 1e6).items():
            axes.plot(*zip(*points, strict=True), **style.of(key))
        axes.set(xscale="log", yscale="log", xlabel="M", ylabel="us per call", title=f"{shape}, {bpw:g} bpw")
        _legend(axes)


# --- whole models --------------------------------------------------------------------------------------


def steps_figure(result: Path, path: Path) -> Path:
    """Draw where the time of a decoding step goes, a panel for each prompt; returns ``path``.

    Args:
        result: JSON of `whole-model --profile`.
        path: the file to write; its folder is made.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: the result has no profiles.
    """
    from benchmarks.records import read_result

    content = read_result(result, ("whole-model",))
    by_prompt: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, profile in content["profiles"].items():
        model, _, prompt = name.rpartition(", prompt ")
        by_prompt.setdefault(prompt, {})[model] = profile["parts"]
    if not by_prompt:
        raise ValueError(f"{result} must hold profiles, it has none: run whole-model with --profile")
    about = content["environment"]
    commit = str((about.get("git") or {}).get("commit") or "unknown")[:12]
    title = f"where a decoding step goes, batch 1\n{about.get('device')}, commit {commit}"
    with _figure(path, 1, len(by_prompt), title=title) as grid:
        for axes, (prompt, models) in zip(grid[0], by_prompt.items(), strict=True):
            _steps_panel(axes, models)
            axes.set(title=f"prompt of {prompt} tokens", ylabel="ms of a step")
    return path


def _steps_panel(axes: Any, models: Mapping[str, Mapping[str, float]]) -> None:
    labels = [model.removeprefix("packed ").replace(", ", "\n") for model in models]
    bottom = [0.0] * len(models)
    for part in next(iter(models.values())):
        heights = [parts[part] * 1e3 for parts in models.values()]
        axes.bar(labels, heights, bottom=bottom, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for label, total in zip(labels, bottom, strict=True):
        axes.annotate(f"{total:.1f}", (label, total), ha="center", va="bottom", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    _legend(axes)


# --- demo ----------------------------------------------------------------------------------------------


def demo_figure(
    path: Path,
    *,
    points: Sequence[tuple[str, float, float]],
    models: Sequence[tuple[str, float | None, int | None]],
    title: str,
) -> Path:
    """Write quality against bits, and speed and size of the dense and the packed model; returns ``path``.

    Args:
        path: the file to write; its folder is made.
        points: name, bits per weight and perplexity of every model; dense first, packed last.
        models: name, tokens/s and bytes of dense and packed.
        title: what was run.
    """
    with _figure(path, 1, 2, title=title) as ((quality, cost),):
        _plot_quality(quality, points)
        _plot_cost(cost, models)
    return path


def _plot_quality(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    colors = ["black", *[COLORS["peer"]] * (len(points) - 2), COLORS["ours"]]
    for (name, bits, value), color in zip(points, colors, strict=True):
        axes.plot([bits], [value], "o", color=color, markersize=8)
        text = f"{name}\n{value:.1f}"
        # Dense, whose value is often that of 8 bits, has its label below.
        place = (0, -29) if color == "black" else (0, 9)
        axes.annotate(text, (bits, value), xytext=place, textcoords="offset points", ha="center", fontsize=9)
    values = [value for _, _, value in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set(xlim=(0.1 if min(bits for _, bits, _ in points) < 0.6 else 0.6, 26))
    axes.set(ylim=(min(values) / 1.5, max(values) * 2))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set(
        xlabel="bits per weight of the linear layers", ylabel="perplexity", title="quality, lower is better"
    )


def _plot_cost(axes: Any, models: Sequence[tuple[str, float | None, int | None]]) -> None:
    # What is not known has no bar.
    speeds = [math.nan if speed is None else speed for _, speed, _ in models]
    sizes = [math.nan if size is None else size / 1e6 for _, _, size in models]
    other = axes.twinx()
    names = [name for name, _, _ in models]
    for panel, values, shift, color, unit in (
        (axes, speeds, -0.2, COLORS["ours"], "tokens/s"),
        (other, sizes, 0.2, COLORS["mark"], "MB of weights"),
    ):
        bars = panel.bar([at + shift for at in range(len(names))], values, 0.38, color=color)
        panel.bar_label(bars, ["" if math.isnan(value) else f"{value:.0f}" for value in values], fontsize=9)
        panel.set_ylabel(unit, color=color)
        panel.set_ylim(0, 1.15 * max((value for value in values if not math.isnan(value)), default=1.0))
    axes.set_xticks(range(len(names)), names)
    axes.set(title="speed and size of the whole model")


# --- finetune ------------------------------------------------------------------------------------------


def finetune_figure(path: Path, outcomes: Sequence[Mapping[str, Any]], teacher: float) -> Path:
    """Write a row of three panels for each bpw: perplexity, loss and flip rate by step; returns ``path``.

    Args:
        path: the file to write.
        outcomes: fields of :class:`benchmarks.quality.training.Outcome`.
        teacher: perplexity of the dense model.
    """
    bpws = list(dict.fromkeys(o["bpw"] for o in outcomes))
    with _figure(path, len(bpws), 3, sharex=True) as grid:
        for row, bpw in zip(grid, bpws, strict=True):
            for outcome in outcomes:
                if outcome["bpw"] == bpw:
                    _curves(row, outcome)
            row[0].axhline(teacher, color="black", linewidth=0.8, linestyle="--", label="dense")
            row[0].set(ylabel=f"{bpw:g} bpw: perplexity, held out", yscale="log")
            row[1].set(ylabel="training loss", yscale="log")
            row[2].set(ylabel="signs flipped per step (%)")
            row[0].legend(fontsize=8)
        for axes in grid[-1]:
            axes.set(xlabel="step")
    return path


def _curves(row: Sequence[Any], outcome: Mapping[str, Any]) -> None:
    label = outcome["method"]
    color = COLORS[label]

    def series(key: str) -> tuple[list[int], list[float]]:
        points = {entry["step"]: entry[key] for entry in outcome["history"] if key in entry}
        return list(points), list(points.values())

    steps, values = series("eval_perplexity")
    row[0].plot(steps, values, marker="o", markersize=3, color=color, label=label)
    row[1].plot(*series("loss"), color=color, linewidth=1, label=label)
    steps, rates = series("flip_rate")
    widths = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    row[2].plot(steps, [100 * r / w for r, w in zip(rates, widths, strict=True)], color=color, label=label)


# --- quantizer -----------------------------------------------------------------------------------------


def spectra_figure(
    path: Path, weights: Mapping[str, torch.Tensor], chosen: Mapping[str, Sequence[LayerReport]]
) -> Path:
    """Write the layers' spectra, their ranks by budget, and the gain over a tiny FP16 pair; returns ``path``.

    Args:
        path: the file to write.
        weights: the dense weights ``[N, K]`` by layer name.
        chosen: reports of every quantized model, by its description.
    """
    from littlebit2.quantize.allocate import layer_spectrum

    spectra = {name: layer_spectrum(name, weight, 8) for name, weight in weights.items()}
    with _figure(path, 1, 3) as ((left, middle, right),):
        _plot_spectra(left, spectra)
        _plot_ranks(middle, chosen)
        _plot_gain(right, spectra)
    return path


def _plot_spectra(axes: Any, spectra: Mapping[str, LayerSpectrum]) -> None:
    for name, layer in spectra.items():
        share = layer.energies.cumsum(0)
        x = [(i + 1) / len(share) for i in range(len(share))]
        axes.plot(x, share, color=_layer_color(name), **FINE_LINE)
    axes.set(
        xlabel="share of the directions", ylabel="share of the energy", title="spectra of MiniLM's layers"
    )
    axes.legend(handles=_handles(), fontsize=8)


def _plot_ranks(axes: Any, chosen: Mapping[str, Sequence[LayerReport]]) -> None:
    for label, reports in chosen.items():
        if label.startswith("spectral") and "0.55" in label:
            axes.plot(
                [sum(r.ranks) / min(r.in_features, r.out_features) for r in reports], "o", ms=4, label=label
            )
    names = [report.name.removeprefix("encoder.layer.") for report in next(iter(chosen.values()))]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
    axes.set(ylabel="rank / smaller dimension", title="ranks by layer")
    axes.legend(fontsize=8)


def _plot_gain(axes: Any, spectra: Mapping[str, LayerSpectrum]) -> None:
    """Energy that binary paths keep, predicted, minus the energy that an FP16 pair of equal bits keeps."""
    from littlebit2.quantize.allocate import predicted_error
    from littlebit2.quantize.spectrum import energy_share

    for name, layer in spectra.items():
        ranks = list(range(8, len(layer.energies) + 1, 8))
        tiny = [energy_share(layer.energies.sqrt(), rank / 16) for rank in ranks]
        kept = [1 - error for error in predicted_error(layer.energies, ranks)]
        x = [rank / len(layer.energies) for rank in ranks]
        gain = [a - b for a, b in zip(kept, tiny, strict=True)]
        axes.plot(x, gain, color=_layer_color(name), **FINE_LINE)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="rank / smaller dimension",
        ylabel="energy kept, minus that of FP16 rank R / 16",
        title="spectral energy gain at equal bits (predicted)",
    )


def _layer_color(name: str) -> str:
    return next(COLORS[part] for part in ("attention", "intermediate", "output") if part in name)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    parts = ("attention", "intermediate", "output")
    return [Line2D([], [], color=COLORS[part], label=part) for part in parts]
