"""The plot of ``python -m benchmarks.quality.finetune``: loss and flips by step, perplexity before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_plot"]

_COLOURS = {"dual-svid": "tab:red", "joint-itq": "tab:orange", "admm": "tab:blue"}


def write_plot(path: Path, outcomes: Sequence[Mapping[str, Any]], teacher: float) -> Path:
    """Write a row of three panels for each number of bits: perplexity, loss, flip rate.

    Args:
        path: of the PNG.
        outcomes: fields of :class:`.Outcome`.
        teacher: perplexity of the dense model.

    Returns:
        ``path``.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    bpws = list(dict.fromkeys(o["bpw"] for o in outcomes))
    figure, grid = plt.subplots(
        len(bpws), 3, figsize=(15, 3.6 * len(bpws)), layout="constrained", squeeze=False, sharex=True
    )
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
    figure.savefig(path, dpi=70)
    plt.close(figure)
    return path


def _curves(row: Sequence[Any], outcome: Mapping[str, Any]) -> None:
    colour, label = _COLOURS[outcome["method"]], outcome["method"]

    def series(key: str) -> tuple[list[int], list[float]]:
        points = {entry["step"]: entry[key] for entry in outcome["history"] if key in entry}
        return list(points), list(points.values())

    steps, values = series("eval_perplexity")
    row[0].plot(steps, values, marker="o", markersize=3, color=colour, label=label)
    row[1].plot(*series("loss"), color=colour, linewidth=1, label=label)
    steps, rates = series("flip_rate")
    widths = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    row[2].plot(steps, [100 * r / w for r, w in zip(rates, widths, strict=True)], color=colour, label=label)
