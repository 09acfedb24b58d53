"""Predict the time of one-token calls on a GPU from counts of bytes and instructions. Nothing is measured.

Bytes and instructions follow from the layer and from the launches that the planner chooses. The predicted
time of a stage is its launch plus the longer of two times: the planner's estimate of its cycles, and
reading its signs and scales from memory. Clocks are the vendors' boost clocks; memory runs at 0.9 of its
nominal rate, as an H200 reached in a copy; the launch time within a graph is assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.estimates.rates import rates_of
from benchmarks.markdown import markdown
from benchmarks.problems import Problem
from littlebit2_kernels import PackedLinear, explain
from littlebit2_kernels.planning.explanation import Explanation

__all__ = ["Prediction", "predict", "rows", "table"]

SLICE = 512
TILE_ROWS = 16
#: MMAs of 16 rows and one slice, and 16-byte loads of shared memory beside them, for one token.
MMAS = {"int16": 4, "int8": 2, "sign": 2, "float16": 32, "exact": 32}
SHARED_LOADS = {"int16": 2, "int8": 1, "sign": 1, "float16": 16, "exact": 16}


@dataclass(frozen=True)
class Prediction:
    """One token through one layer.

    Attributes:
        explanation: what is launched.
        nbytes: bytes of signs (row padding included) and scales that each launch reads.
        sign_loads: warp-wide loads of signs; of 16 bytes where rows start at multiples of 16 bytes, as in
            ``LittleBitLinear`` on a GPU.
        shared_loads: warp-wide 16-byte loads of activations from shared memory beside the MMAs.
        mmas: warp-wide MMAs.
        staged: slices staged by all blocks together.
        seconds: predicted seconds of each launch.
        dense_seconds: time to read the float16 weight once, a lower bound for a dense product.
    """

    explanation: Explanation
    nbytes: tuple[int, ...]
    sign_loads: int
    shared_loads: int
    mmas: int
    staged: int
    seconds: tuple[float, ...]
    dense_seconds: float


def predict(packed: PackedLinear, gpu: str, activation: str = "auto") -> Prediction:
    """Count one float16 token through ``packed`` on a GPU of :data:`benchmarks.estimates.rates.RATES`.

    Raises:
        ValueError: the GPU or the activation is unknown.
    """
    rates = rates_of(gpu)
    shape = (1, packed.in_features)
    explanation = explain(shape, packed, "cuda", activation, dtype=torch.float16, gpu=gpu)
    mode = str(explanation.activation)
    # (rows, columns) of the signs of each launch.
    first = [(rows, packed.in_features) for rows in packed.shape.own_rows]
    last = [(packed.out_features, rank) for rank in packed.ranks or ()]
    stages = [first] if packed.single_stage else [first, last]
    decodes = [launch for launch in explanation.launches if launch.kind == "decode"]
    tiles = [sum(-(-rows // TILE_ROWS) * -(-cols // SLICE) for rows, cols in stage) for stage in stages]
    # A scale for every column of a stage, and one for every row of the last.
    nbytes = tuple(
        sum(
            rows * -(-cols // 32) * 4 + 4 * cols + (4 * rows if stage is stages[-1] else 0)
            for rows, cols in stage
        )
        for stage in stages
    )
    staged = 0
    for launch, stage in zip(decodes, stages, strict=True):
        slices = sum(-(-cols // SLICE) for _, cols in stage)
        # Every block of the last stage stages all paths, one of the first stage its own part of x.
        staged += launch.grid[0] * (slices if stage is stages[-1] else -(-packed.in_features // SLICE))
    return Prediction(
        explanation=explanation,
        nbytes=nbytes,
        sign_loads=2 * sum(tiles),
        shared_loads=SHARED_LOADS[mode] * sum(tiles),
        mmas=MMAS[mode] * sum(tiles),
        staged=staged,
        seconds=tuple(
            rates.seconds(chained=launch.chained, nbytes=read, cycles=launch.estimated_cycles)
            for launch, read in zip(decodes, nbytes, strict=True)
        ),
        dense_seconds=2 * packed.in_features * packed.out_features / rates.memory,
    )


def rows(gpus: Sequence[str], problems: Sequence[Problem], activation: str = "auto") -> list[dict[str, Any]]:
    """Predictions as plain rows: bytes, counts and seconds."""
    found = []
    for problem in problems:
        packed = problem.quick_packed()
        for gpu in gpus:
            p = predict(packed, gpu, activation)
            found.append(
                {
                    "gpu": gpu,
                    "shape": problem.shape.label,
                    "bpw": problem.bpw,
                    "activation": str(p.explanation.activation),
                    "grids": [list(launch.grid) for launch in p.explanation.launches],
                    "bytes": list(p.nbytes),
                    "mmas": p.mmas,
                    "sign_loads": p.sign_loads,
                    "shared_loads": p.shared_loads,
                    "staged_slices": p.staged,
                    "seconds": list(p.seconds),
                    "dense_seconds": p.dense_seconds,
                }
            )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    head = ["GPU", "shape", "bpw", "mode", "grid", "KiB", "MMAs", "LDG.128", "LDS.128", "staged slices"]
    head += ["us by stage", "us", "dense at least us", "ratio"]
    return markdown(
        head,
        [
            [
                *[row["gpu"], row["shape"], f"{row['bpw']:g}", row["activation"]],
                " + ".join("x".join(map(str, grid[:2])) for grid in row["grids"]),
                f"{sum(row['bytes']) / 1024:.0f}",
                *(str(row[key]) for key in ("mmas", "sign_loads", "shared_loads", "staged_slices")),
                " + ".join(f"{seconds * 1e6:.2f}" for seconds in row["seconds"]),
                f"{sum(row['seconds']) * 1e6:.2f}",
                f"{row['dense_seconds'] * 1e6:.1f}",
                f"{row['dense_seconds'] / sum(row['seconds']):.1f}x",
            ]
            for row in found
        ],
    )
