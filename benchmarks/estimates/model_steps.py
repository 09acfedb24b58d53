"""Predict the packed layers' time in a decode step of a whole model, from counts. Nothing is measured.

With projections that share their input in one call (fused), and in calls of their own (apart). Rates and
assumptions are those of :mod:`benchmarks.estimates.rates`. Attention, norms and lm_head are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.estimates.rates import rates_of
from benchmarks.markdown import markdown
from benchmarks.shapes import LlamaShape
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels.dispatch import ACTIVATIONS
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.gpu import gpu_properties
from littlebit2_kernels.planning.native import plan_grouped_cuda

__all__ = ["ModelPrediction", "predict_group", "predict_model", "rows", "table"]

#: Projections of a decoder layer by the input that they share.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class GroupPrediction:
    """One call with one token: launches, bytes of signs and scales, predicted seconds."""

    launches: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class ModelPrediction:
    """The packed layers of one decode step.

    Attributes:
        launches: launches of all decoder layers.
        nbytes: bytes of signs and scales.
        seconds: predicted seconds of the launches, one after another.
        dense_seconds: time to read the float16 weights once.
    """

    launches: int
    nbytes: int
    seconds: float
    dense_seconds: float


def predict_group(k: int, layers: Sequence[tuple[int, list[int]]], gpu: str) -> GroupPrediction:
    """Count one float16 token through two-stage layers ``(N, ranks)`` on one input of K channels.

    Raises:
        ValueError: the GPU is unknown.
    """
    rates = rates_of(gpu)
    shapes = [LayerShape(k, n, tuple(ranks)) for n, ranks in layers]
    plan = plan_grouped_cuda(shapes, 1, torch.float16, ACTIVATIONS["auto"], gpu_properties(gpu))
    first = sum(4 * (rank * -(-k // 32) + k) for _, ranks in layers for rank in ranks)
    last = sum(4 * (n * -(-rank // 32) + rank + n) for n, ranks in layers for rank in ranks)
    seconds = sum(
        rates.seconds(chained=launch["chained"], nbytes=nbytes, cycles=launch["estimated_cycles"])
        for launch, nbytes in zip(plan["launches"], (first, last), strict=True)
    )
    return GroupPrediction(len(plan["launches"]), first + last, seconds)


def predict_model(shape: LlamaShape, bpw: float, gpu: str, *, fused: bool, paths: int = 2) -> ModelPrediction:
    """Count one token through all packed layers of a model.

    Raises:
        ValueError: the GPU is unknown, or ``bpw`` too small for a layer.
    """
    hidden, wide = shape.hidden, shape.intermediate
    sizes = {
        "q": (hidden, hidden),
        "k": (hidden, shape.kv_size),
        "v": (hidden, shape.kv_size),
        "o": (hidden, hidden),
        "gate": (hidden, wide),
        "up": (hidden, wide),
        "down": (wide, hidden),
    }
    calls = GROUPS if fused else tuple((name,) for group in GROUPS for name in group)
    predictions = []
    for names in calls:
        layers = []
        for name in names:
            rank = rank_for_bpw(*sizes[name], bpw, paths=paths)
            layers.append((sizes[name][1], [rank] * paths))
        predictions.append(predict_group(sizes[names[0]][0], layers, gpu))
    count = shape.layers
    return ModelPrediction(
        count * sum(p.launches for p in predictions),
        count * sum(p.nbytes for p in predictions),
        count * sum(p.seconds for p in predictions),
        2 * shape.linear_macs(count) / rates_of(gpu).memory,
    )


def rows(gpus: Sequence[str], shapes: Sequence[LlamaShape], bpws: Sequence[float]) -> list[dict[str, Any]]:
    """Predictions as plain rows: bytes, launches and seconds."""
    found = []
    for gpu in gpus:
        for shape in shapes:
            for bpw in bpws:
                apart, fused = (predict_model(shape, bpw, gpu, fused=fused) for fused in (False, True))
                found.append(
                    {
                        "gpu": gpu,
                        "model": shape.name,
                        "bpw": bpw,
                        "bytes": fused.nbytes,
                        "launches_apart": apart.launches,
                        "launches_fused": fused.launches,
                        "seconds_apart": apart.seconds,
                        "seconds_fused": fused.seconds,
                        "dense_seconds": fused.dense_seconds,
                    }
                )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    head = ["GPU", "model", "bpw", "MB", "launches apart", "fused", "us apart", "fused", "gain"]
    head += ["dense at least us", "ratio"]
    return markdown(
        head,
        [
            [
                *[row["gpu"], row["model"], f"{row['bpw']:g}", f"{row['bytes'] / 1e6:.0f}"],
                *[str(row["launches_apart"]), str(row["launches_fused"])],
                *[f"{row['seconds_apart'] * 1e6:.0f}", f"{row['seconds_fused'] * 1e6:.0f}"],
                f"{row['seconds_apart'] / row['seconds_fused']:.2f}x",
                f"{row['dense_seconds'] * 1e6:.0f}",
                f"{row['dense_seconds'] / row['seconds_fused']:.1f}x",
            ]
            for row in found
        ],
    )
