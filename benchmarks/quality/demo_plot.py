"""The plot of ``make demo``: the spectrum and the errors of one layer, and the latency of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from littlebit2.quantize import SpectralReport
from littlebit2.quantize.solvers.svd import truncated_factors

__all__ = ["write_plot"]


def write_plot(
    path: Path,
    *,
    layer: str,
    weight: torch.Tensor,
    spectrum: SpectralReport,
    bpw: float,
    dense: float,
    latencies: Sequence[tuple[float, float]],
) -> Path:
    """Write the three panels as a PNG, atomically.

    Args:
        path: the file to write; its folder is made.
        layer: name of the analysed layer.
        weight: its dense weight ``[N, K]``.
        spectrum: its analysis at ``bpw``.
        bpw: counted bits per weight of the analysis.
        dense: seconds of the dense layer.
        latencies: ``(bpw, seconds)`` of the packed layers.

    Returns:
        ``path``.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (energy, errors, times) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    _plot_energy(energy, layer, weight, spectrum)
    _plot_errors(errors, spectrum, bpw)
    _plot_latencies(times, dense, latencies)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)
    unfinished.replace(path)
    return path


def _plot_energy(axes: Any, layer: str, weight: torch.Tensor, spectrum: SpectralReport) -> None:
    values = truncated_factors(weight.float(), min(weight.shape)).singular_values
    share = (values.square().cumsum(0) / values.square().sum()).tolist()
    axes.plot(range(1, len(share) + 1), share, color="tab:blue")
    for rank, kept, text in (
        (spectrum.rank, spectrum.kept, f"R = {spectrum.rank}: {spectrum.kept:.2f}"),
        (
            spectrum.rank / 16,
            spectrum.kept_tiny,
            f"FP16 of equal bits, R/16 = {spectrum.rank / 16:g}: {spectrum.kept_tiny:.2f}",
        ),
    ):
        axes.plot([rank], [kept], "o", color="tab:orange")
        axes.annotate(text, (rank, kept), xytext=(8, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="rank", ylabel="share of energy", ylim=(0, 1.02), title=f"singular-value energy\n{layer}")


def _plot_errors(axes: Any, spectrum: SpectralReport, bpw: float) -> None:
    stages = {
        "truncated SVD": spectrum.truncation_error,
        "Dual-SVID": spectrum.dual_svid.error,
        "random\nrotation": spectrum.random_rotation.error,
        "Joint-ITQ": spectrum.joint_itq.error,
    }
    stages["stored"] = spectrum.path_errors[-1]
    bars = axes.bar(
        list(stages), list(stages.values()), color=["tab:gray", *["tab:blue"] * (len(stages) - 1)]
    )
    axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel="|W - Q|² / |W|²", ylim=(0, 1.08), title=f"error by stage at {bpw:g} bpw")


def _plot_latencies(axes: Any, dense: float, latencies: Sequence[tuple[float, float]]) -> None:
    labels = ["dense\nfp32", *[f"{bpw:g}\nbpw" for bpw, _ in latencies]]
    micros = [dense * 1e6, *[seconds * 1e6 for _, seconds in latencies]]
    bars = axes.bar(labels, micros, color=["tab:gray", *["tab:blue"] * len(latencies)])
    axes.bar_label(bars, [f"{value:.0f} us\n{micros[0] / value:.0f}x" for value in micros], fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(min(micros) / 3, max(micros) * 3)
    axes.set(ylabel="us per call, cold weights", title="4096 -> 11008, batch 1, CPU")
