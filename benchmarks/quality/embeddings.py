"""Sentence embeddings of a quantized MiniLM beside the dense ones: the part model of `quantizer`."""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.options import note
from benchmarks.plots import spectra_figure
from benchmarks.quality.methods import seeded
from benchmarks.quality.minilm import CALIBRATION, EVALUATION, embed, encoder, encoder_weights, load_model
from littlebit2 import quantize_
from littlebit2.quantize import Importance, LayerReport, QuantConfig, collect_importance

__all__ = ["Agreement", "model"]


@dataclass(frozen=True)
class Agreement:
    """A whole model at one budget."""

    bpw: float
    name: str
    cosine: float
    worst: float
    counted_bpw: float
    error: float
    predicted: float | None
    seconds: float


def model(options: Namespace) -> list[dict[str, Any]]:
    """All of MiniLM's encoder at equal total bits: uniform against spectral, without and with activations."""
    dense = load_model()
    truth = embed(dense, EVALUATION)
    importance = measure_importance(dense)
    results: list[Agreement] = []
    chosen: dict[str, list[LayerReport]] = {}
    for bpw in options.bpw:
        for activations in (None, importance):
            for budget in ("uniform", "spectral"):
                name = f"{budget}, activations" if activations else budget
                config = QuantConfig(bpw=bpw, budget=budget, admm_iterations=options.iterations)  # type: ignore[arg-type]
                result, reports = agreement(dense, truth, name, config, activations)
                results.append(result)
                chosen[f"{name} at {bpw:g} bpw"] = reports
                note(f"MiniLM, {name}, {bpw:g} bpw: cosine {result.cosine:.3f}")
    cells = [
        [
            f"{r.bpw:g}",
            r.name,
            f"{r.counted_bpw:.4f}",
            f"{r.cosine:.3f}",
            f"{r.worst:.3f}",
            f"{r.error:.3f}",
            "" if r.predicted is None else f"{r.predicted:.3f}",
            f"{r.seconds:.0f}",
        ]
        for r in results
    ]
    head = ["bpw", "budget", "counted", "cosine, mean", "worst", "error", "predicted", "s"]
    print(markdown(head, cells))
    print(f"\nplots: {spectra_figure(options.out / 'spectra.png', encoder_weights(), chosen)}")
    return [asdict(result) for result in results]


def measure_importance(dense: Any) -> dict[str, Importance]:
    """Activations of the calibration sentences, and how much each layer's outputs move the embedding."""
    batch = dict(dense.tokenizer(list(CALIBRATION), padding=True, return_tensors="pt"))
    rng = seeded()

    def projected(output: Any) -> torch.Tensor:
        # The squared gradient of a random projection is that of the whole embedding, on average.
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        unit = torch.nn.functional.normalize(mean)
        return (unit * (torch.randint(0, 2, unit.shape, generator=rng) * 2 - 1)).sum()

    found = collect_importance(encoder(dense), [batch] * 4, loss=projected)
    return {name: one for name, one in found.items() if name.startswith("encoder.")}


def agreement(
    dense: Any,
    truth: torch.Tensor,
    name: str,
    config: QuantConfig,
    importance: dict[str, Importance] | None,
) -> tuple[Agreement, list[LayerReport]]:
    """Quantize a copy of the model and compare its embeddings with the dense ones."""
    packed = copy.deepcopy(dense)
    start = time.perf_counter()
    report = quantize_(encoder(packed), config, include="encoder.*", importance=importance, progress=False)
    reports = list(report.layers)
    seconds = time.perf_counter() - start
    cosines = (truth * embed(packed, EVALUATION)).sum(1)
    sizes = torch.tensor([report.in_features * report.out_features for report in reports]).double()

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values).double() * sizes).sum() / sizes.sum())

    predicted = [report.predicted_error for report in reports]
    assert config.bpw is not None
    result = Agreement(
        bpw=config.bpw,
        name=name,
        cosine=float(cosines.mean()),
        worst=float(cosines.min()),
        counted_bpw=mean([report.counted_bpw for report in reports]),
        error=mean([r.error if r.weighted_error is None else r.weighted_error for r in reports]),
        predicted=None if None in predicted else mean([value or 0.0 for value in predicted]),
        seconds=seconds,
    )
    return result, reports
