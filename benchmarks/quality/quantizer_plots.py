"""Plots of ``python -m benchmarks.quality.quantizer``: spectra, chosen ranks, spectral energy gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from littlebit2.quantize import LayerReport
from littlebit2.quantize.allocate import LayerSpectrum, layer_spectrum, predicted_error
from littlebit2.quantize.spectrum import energy_share

__all__ = ["write_plots"]


def write_plots(
    folder: Path, weights: Mapping[str, torch.Tensor], chosen: Mapping[str, Sequence[LayerReport]]
) -> Path:
    """Write ``spectra.png``: spectra of the layers, ranks by budget, and the gain over a tiny FP16 pair.

    Args:
        folder: where to write.
        weights: the dense weights ``[N, K]`` by layer name.
        chosen: reports of every quantised model, by what it is.

    Returns:
        The file.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    spectra = {name: layer_spectrum(name, weight, 8) for name, weight in weights.items()}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    _plot_spectra(left, spectra)
    _plot_ranks(middle, chosen)
    _plot_gain(right, spectra)
    path = folder / "spectra.png"
    figure.savefig(path, dpi=75)
    plt.close(figure)
    return path


def _plot_spectra(axes: Any, spectra: Mapping[str, LayerSpectrum]) -> None:
    for name, layer in spectra.items():
        share = layer.energies.cumsum(0)
        x = torch.arange(1, len(share) + 1) / len(share)
        axes.plot(x, share, color=_colour(name), linewidth=0.8, alpha=0.7)
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
    """What binary paths keep, predicted, less what an FP16 pair of equal bits keeps."""
    for name, layer in spectra.items():
        ranks = list(range(8, len(layer.energies) + 1, 8))
        tiny = [energy_share(layer.energies.sqrt(), rank / 16) for rank in ranks]
        kept = [1 - error for error in predicted_error(layer.energies, ranks)]
        x = [rank / len(layer.energies) for rank in ranks]
        gain = [a - b for a, b in zip(kept, tiny, strict=True)]
        axes.plot(x, gain, color=_colour(name), linewidth=0.8, alpha=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="rank / smaller dimension",
        ylabel="energy kept, less that of FP16 rank R / 16",
        title="spectral energy gain at equal bits (predicted)",
    )


_COLOURS = {"attention": "tab:blue", "intermediate": "tab:orange", "output": "tab:green"}


def _colour(name: str) -> str:
    return next(colour for part, colour in _COLOURS.items() if part in name)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=colour, label=part) for part, colour in _COLOURS.items()]
