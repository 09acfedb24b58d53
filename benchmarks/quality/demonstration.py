"""The steps of `demo`: a real model quantized, and one large layer timed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.plots import demo_figure
from benchmarks.quality.minilm import SENTENCES, embed, encoder, load_model
from benchmarks.timing import Timing, time_interleaved
from littlebit2 import quantize_
from littlebit2.quantize import LayerReport, QuantConfig, analyze_weight, quantize_weight, rank_for_bpw
from littlebit2.quantize.allocate import layer_spectrum
from littlebit2_kernels import LittleBitLinear, PrepackedLinear, explain, littlebit_linear, prepack
from littlebit2_kernels.testing import make_packed

#: The layer whose spectrum is plotted.
PLOTTED_LAYER = "encoder.layer.2.intermediate.dense"

#: Methods shown beside the default one: LittleBit's and LittleBit-2's initialization.
PAPERS_METHODS: tuple[Any, ...] = ("dual-svid", "joint-itq")
#: Work allowed per layer (of ``QuantConfig.budget_seconds``), so that the demo stays short.
BUDGET_SECONDS = 1.0

#: Llama-2-7B's MLP up projection.
IN_FEATURES, OUT_FEATURES = 4096, 11008
TIMED_BPW = (0.1, 0.55, 1.0)
#: Weights of a cold measurement together occupy at least this much, several times a last-level cache.
COLD_BYTES = 192 * 2**20


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table; errors are squared relative Frobenius errors."""

    report: LayerReport
    energy_kept: float
    error_dual_svid: float
    error_joint_itq: float


@dataclass(frozen=True)
class LatencyRow:
    """One line of the latency table."""

    bpw: float
    ranks: tuple[int, ...]
    packed_bytes: int
    hot: Timing
    cold: Timing


def demonstrate(bpw: float, folder: Path) -> None:
    """Run the demo at ``bpw`` counted bits per weight; the plot goes to ``folder``."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU kernels: {current_isa()}\n")
    config = QuantConfig(bpw=bpw, budget_seconds=BUDGET_SECONDS)
    model = load_model()
    dense_embeddings = embed(model)
    packed_model = copy.deepcopy(model)

    print(f"1. Quantizing every encoder Linear of all-MiniLM-L6-v2 at {bpw:g} bits per weight, no training")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing from more, and lose much on a busy machine
    rows = quantize_encoder(model, packed_model, config)
    torch.set_num_threads(threads)
    print_layers(rows)
    print_agreement(model, packed_model, dense_embeddings)

    print(f"\n2. One Llama-2-7B MLP layer ({IN_FEATURES} -> {OUT_FEATURES}), random signs, batch 1, float32")
    dense, latencies = time_layer()
    print_latencies(dense, latencies)

    weight = encoder(model).get_submodule(PLOTTED_LAYER).weight
    path = demo_figure(
        folder / "demo.png",
        layer=PLOTTED_LAYER,
        weight=weight.detach(),
        spectrum=analyze_weight(weight, config),
        bpw=bpw,
        dense=dense.median,
        latencies=[(row.bpw, row.cold.median) for row in latencies],
    )
    print(f"\nplot: {path}")


def current_isa() -> str:
    """The instruction set that the CPU kernels use here."""
    return str(explain((1, 32), make_packed(32, 32, [8])).isa)


# --- the real model ------------------------------------------------------------------------------------


def quantize_encoder(model: Any, packed_model: Any, config: QuantConfig) -> list[LayerRow]:
    """Replace the encoder's linear layers in ``packed_model``, and measure the papers' methods beside it."""
    rows = []
    for report in quantize_(encoder(packed_model), config, include="encoder.*").layers:
        weight = encoder(model).get_submodule(report.name).weight.detach()
        of_papers = [
            quantize_weight(weight, config=replace(config, method=method, paths=None)).report.error
            for method in PAPERS_METHODS
        ]
        energies = layer_spectrum(report.name, weight, 0).energies
        rows.append(LayerRow(report, float(energies[: sum(report.ranks)].sum()), *of_papers))
    return rows


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left and the others to the right."""
    table = [list(headers), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    print()
    for row in table:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *others)).rstrip())


def print_layers(rows: list[LayerRow]) -> None:
    """Print the layer table and its means."""

    def figures(row: LayerRow) -> list[float]:
        report = row.report
        errors = [row.error_dual_svid, row.error_joint_itq, report.error]
        return [report.counted_bpw, report.stored_bpw, row.energy_kept, *errors]

    lines = [
        [
            row.report.name,
            f"{row.report.out_features} x {row.report.in_features}",
            "+".join(map(str, row.report.ranks)),
            *(f"{value:.3f}" for value in figures(row)),
        ]
        for row in rows
    ]
    weights = torch.tensor([row.report.in_features * row.report.out_features for row in rows]).double()
    means = (torch.tensor([figures(row) for row in rows]).double().T @ weights / weights.sum()).tolist()
    lines.append(["mean, weighted by size", "", "", *(f"{value:.3f}" for value in means)])
    head = ("layer", "N x K", "ranks", "bpw counted", "stored", "energy kept")
    print_table((*head, "Dual-SVID", "Joint-ITQ", "error"), lines)
    print("energy kept: share of the squared singular values in the ranks")
    print("error: |W - Q|^2 / |W|^2; before it, those of LittleBit and LittleBit-2 with two paths")


def print_agreement(model: Any, packed_model: Any, dense_embeddings: torch.Tensor) -> None:
    """Compare embeddings and sizes of the dense and the packed model."""
    packed_embeddings = embed(packed_model)
    cosines = (dense_embeddings * packed_embeddings).sum(1)
    similarity = [e @ e.T - 2 * torch.eye(len(e)) for e in (dense_embeddings, packed_embeddings)]
    same_neighbor = (similarity[0].argmax(1) == similarity[1].argmax(1)).sum()
    print(
        f"\n{len(SENTENCES)} sentences, dense against packed: cosine mean {cosines.mean():.3f}, "
        f"min {cosines.min():.3f}; same nearest neighbor for {int(same_neighbor)}"
    )
    layers = [m for m in encoder(packed_model).modules() if isinstance(m, LittleBitLinear)]
    packed_bytes = sum(layer.nbytes for layer in layers)
    dense_bytes = sum(4 * layer.in_features * layer.out_features + 4 * layer.out_features for layer in layers)
    totals = [
        sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (model, packed_model)
    ]
    print(
        f"encoder linears: {dense_bytes / 2**20:.2f} MiB float32 -> {packed_bytes / 2**20:.2f} MiB packed "
        f"({dense_bytes / packed_bytes:.1f}x smaller, {dense_bytes / 2 / packed_bytes:.1f}x against float16)"
    )
    print(f"whole model with its dense embeddings: {totals[0] / 2**20:.1f} -> {totals[1] / 2**20:.1f} MiB")


# --- one large layer -------------------------------------------------------------------------------------


def time_layer() -> tuple[Timing, list[LatencyRow]]:
    """Time the dense layer and prepacked ones in one interleaved run; returns dense and one row per bpw."""
    x = torch.randn(1, IN_FEATURES)
    weight = torch.randn(OUT_FEATURES, IN_FEATURES)
    layers: dict[float, PrepackedLinear] = {}
    candidates: dict[str, Any] = {"dense": lambda: nn.functional.linear(x, weight)}
    for bpw in TIMED_BPW:
        rank = rank_for_bpw(IN_FEATURES, OUT_FEATURES, bpw, paths=2)
        packed = layers[bpw] = prepack(make_packed(IN_FEATURES, OUT_FEATURES, [rank, rank]))
        copies = itertools.cycle(copy.deepcopy(packed) for _ in range(COLD_BYTES // packed.nbytes + 1))
        candidates[f"hot {bpw}"] = lambda packed=packed: littlebit_linear(x, packed)
        candidates[f"cold {bpw}"] = lambda copies=copies: littlebit_linear(x, next(copies))
        # Fill the cycle before timing: its first round makes the copies.
        for _ in range(COLD_BYTES // packed.nbytes + 1):
            next(copies)
    with torch.inference_mode():
        timings = time_interleaved(candidates)
    rows = [
        LatencyRow(bpw, packed.shape.rows, packed.nbytes, timings[f"hot {bpw}"], timings[f"cold {bpw}"])
        for bpw, packed in layers.items()
    ]
    return timings["dense"], rows


def print_latencies(dense: Timing, rows: list[LatencyRow]) -> None:
    """Print the latency table; speedups are medians of the ratios within each repetition."""
    dense_mib = IN_FEATURES * OUT_FEATURES * 4 / 2**20
    lines = [["dense fp32", "", f"{dense_mib:.2f}", "", f"{dense.median * 1e6:.0f}", "", ""]]
    lines += [
        [
            f"{row.bpw:g} bpw",
            "+".join(map(str, row.ranks)),
            f"{row.packed_bytes / 2**20:.2f}",
            f"{row.hot.median * 1e6:.0f}",
            f"{row.cold.median * 1e6:.0f}",
            f"{row.hot.speedup_over(dense):.1f}x",
            f"{row.cold.speedup_over(dense):.1f}x",
        ]
        for row in rows
    ]
    print_table(("", "ranks", "MiB", "hot us", "cold us", "hot vs dense", "cold vs dense"), lines)
    print("hot: one layer again and again; cold: weights rotate through more memory than the caches hold")
