"""``python -m benchmarks.estimates.predict_models``: what the packed layers of a decode step should cost, counted.

For whole models, with projections that share their input in one call and in calls of their own. Rates and
assumptions are those of :mod:`benchmarks.estimates.predict`: to be read beside a measurement, not in its place.
Attention, norms and lm_head are not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.estimates.predict import RATES
from benchmarks.markdown import markdown
from benchmarks.models.llama import LLAMA_SHAPES, LlamaShape, linear_macs, parse_llama_shape
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels._native import core
from littlebit2_kernels.dispatch import ACTIVATIONS
from littlebit2_kernels.gpu import gpu_properties

__all__ = ["ModelPrediction", "main", "predict_group", "predict_model"]

#: Projections of a decoder layer by the input that they share.
GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class GroupPrediction:
    """One call for one token: launches, bytes of signs and scales, seconds."""

    launches: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class ModelPrediction:
    """The packed layers of one decode step.

    Attributes:
        launches: of all decoder layers.
        nbytes: of signs and scales.
        seconds: of the launches, one after another.
        dense_seconds: reading the float16 weights once.
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
    if gpu not in RATES:
        raise ValueError(f"gpu must be one of {', '.join(RATES)}, got {gpu!r}")
    shapes = [(n, ranks, False, list(range(len(ranks)))) for n, ranks in layers]
    plan = core().plan_grouped_cuda(
        1, k, shapes, "float16", ACTIVATIONS["auto"], *gpu_properties(gpu).for_cuda()
    )
    first = sum(4 * (rank * -(-k // 32) + k) for _, ranks in layers for rank in ranks)
    last = sum(4 * (n * -(-rank // 32) + rank + n) for n, ranks in layers for rank in ranks)
    rates = RATES[gpu]
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
        2 * linear_macs(shape, count) / RATES[gpu].memory,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions as a markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimates.predict_models", description=__doc__
    )
    parser.add_argument("--gpu", nargs="+", default=["H200"], choices=RATES)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[name for name in LLAMA_SHAPES if name != "tiny"],
        choices=LLAMA_SHAPES,
    )
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.1, 0.55, 1.0])
    options = parser.parse_args(arguments)
    head = [
        "GPU",
        "model",
        "bpw",
        "MB",
        "launches",
        "fused",
        "us",
        "fused",
        "gain",
        "dense at least us",
        "ratio",
    ]
    lines = []
    for gpu in options.gpu:
        for name in options.shapes:
            for bpw in options.bpw:
                shape = parse_llama_shape(name)
                alone, fused = (predict_model(shape, bpw, gpu, fused=fused) for fused in (False, True))
                lines.append(
                    [
                        gpu,
                        name,
                        f"{bpw:g}",
                        f"{fused.nbytes / 1e6:.0f}",
                        str(alone.launches),
                        str(fused.launches),
                        f"{alone.seconds * 1e6:.0f}",
                        f"{fused.seconds * 1e6:.0f}",
                        f"{alone.seconds / fused.seconds:.2f}x",
                        f"{fused.dense_seconds * 1e6:.0f}",
                        f"{fused.dense_seconds / fused.seconds:.1f}x",
                    ]
                )
    print(markdown(head, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
