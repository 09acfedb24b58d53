"""A picture of a block-by-block run: errors of its blocks, and perplexity by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from littlebit2._messages import require

from .report import BlockwiseReport

__all__ = ["check_plot", "plot_report"]

_SUFFIXES = (".pdf", ".png", ".svg")
_INCHES = (9.0, 3.6)


def check_plot(path: str | Path) -> Path:
    """Return the path of a picture that can be written, before any work.

    Raises:
        FileNotFoundError: its folder is not there.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: its name has another suffix than those of pictures.
    """
    found = Path(path)
    if found.suffix not in _SUFFIXES:
        raise ValueError(f"plot must end in {', '.join(_SUFFIXES)}, got {found.name!r}")
    if not found.absolute().parent.is_dir():
        raise FileNotFoundError(f"plot must be in a directory that exists, got {found}")
    require("matplotlib")
    return found


def plot_report(report: BlockwiseReport, path: str | Path) -> None:
    """Write a picture of a run.

    Args:
        report: of :func:`.quantize_blockwise`.
        path: of the file, ending in .pdf, .png or .svg.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as :func:`check_plot`.
        OSError: it cannot be written.
    """
    target = check_plot(path)
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=_INCHES, width_ratios=(2, 1), layout="constrained")
    numbers = [block["index"] for block in report.blocks]
    for name, label in (("before", "before tuning"), ("after", "after")):
        left.plot(numbers, [block[name] for block in report.blocks], marker=".", label=label)
    left.set(xlabel="block", ylabel="error of its output, held-out text", yscale="log")
    left.legend()
    names, values = zip(*report.perplexity.items(), strict=True)
    bars = right.bar(names, values, color=["tab:gray", *["tab:blue"] * (len(names) - 1)])
    right.bar_label(bars, [f"{value:.4g}" for value in values])
    right.set(ylabel=f"perplexity, {report.tokens} held-out tokens", yscale="log")
    try:
        figure.savefig(target)
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl  # noqa: PLC0415  # optional, slow to import

    mpl.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415  # after the choice of what draws

    return pyplot
