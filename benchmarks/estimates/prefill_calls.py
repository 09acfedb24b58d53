"""Predict the time of prefill calls on a GPU from counts of MMAs, bytes and launches. Nothing is measured.

For calls that take the GEMM or the kernel of both stages. The predicted time of such a launch is the
planner's estimate of its cycles at boost clock, or its memory traffic if that takes longer; a conversion
takes its traffic at the rate of the memory. cuBLAS is modeled at 70 % of peak, or at its memory traffic;
host time is ignored. The low-rank peers leave scales out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.estimates.rates import LAUNCH, PEER_RATE, Rates, rates_of
from benchmarks.markdown import markdown
from benchmarks.problems import Problem
from littlebit2_kernels import PackedLinear, explain
from littlebit2_kernels.planning.explanation import Explanation, Launch

__all__ = ["PrefillPrediction", "predict_prefill", "rows", "table"]

#: Columns that the GEMM skips at once where a term ends; columns of a slice; rows and tokens of an MMA
#: (csrc/cuda/gemm/sizes.h).
INDEX, SLICE, TILE_ROWS, GROUP = 128, 512, 16, 8
#: MMAs for 16 rows, 8 tokens and INDEX columns; bytes of a converted activation.
INDEX_MMAS = {"float16": 8, "exact": 16, "int8": 4}
CONVERTED = {"float16": 2, "exact": 4, "int8": 1}


@dataclass
class Counts:
    """What the launches of a call do.

    Attributes:
        mmas: warp-wide MMAs: m16n8k16 or, in int8, m16n8k32.
        converted_bytes: bytes read and written by conversions that are launches of their own.
        copied_bytes: bytes of activations that blocks of the GEMM copy from the L2 cache to shared memory.
        sign_bytes: bytes of signs that blocks read, likewise.
        seconds: predicted seconds of all launches.
    """

    mmas: int = 0
    converted_bytes: int = 0
    copied_bytes: int = 0
    sign_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PrefillPrediction:
    """One call.

    Attributes:
        explanation: what is launched for each round of ``token_block`` tokens.
        launches: number of launches in all rounds.
        counts: sums over all rounds.
        used: share of the MMAs' multiply-adds that are the layer's; the others are padding.
        dense_seconds: predicted seconds of a dense product by cuBLAS.
        low_rank_seconds: predicted seconds of two products with +-1 factors.
        unpack_seconds: predicted seconds of unpacking, then those two products.
        backend: the backend that ``auto`` takes.
    """

    explanation: Explanation
    launches: int
    counts: Counts
    used: float
    dense_seconds: float
    low_rank_seconds: float
    unpack_seconds: float
    backend: str


def predict_prefill(
    packed: PackedLinear, gpu: str, tokens: int, activation: str = "auto"
) -> PrefillPrediction:
    """Count a call of ``tokens`` float16 tokens on a GPU of :data:`benchmarks.estimates.rates.RATES`.

    Raises:
        ValueError: the GPU or the activation is unknown, or such a call takes neither kernel.
    """
    rates = rates_of(gpu)
    shape, half = (tokens, packed.in_features), torch.float16
    explanation = explain(shape, packed, "cuda", activation, dtype=half, gpu=gpu)
    mode = str(explanation.activation)
    if explanation.kernels not in ("gemm", "fused"):
        raise ValueError(f"tokens and activation must be of a call that takes the GEMM, got {tokens}, {mode}")
    block = explanation.token_block or tokens
    rounds = [min(block, tokens - start) for start in range(0, tokens, block)]
    count = _count_fused if explanation.kernels == "fused" else _count_gemm
    counts = count(packed, explanation, rounds, rates)
    macs = explanation.macs
    peer = PEER_RATE * rates.tensor / 2
    factors = 2 * packed.shape.factor_elements
    size = packed.in_features * packed.out_features
    moved = 2 * tokens * (packed.in_features + packed.out_features)
    low_rank = 2 * LAUNCH + max(macs / peer, (factors + moved) / rates.memory)
    mma_macs = TILE_ROWS * GROUP * (32 if mode == "int8" else 16) // (2 if mode == "exact" else 1)
    return PrefillPrediction(
        explanation=explanation,
        launches=len(rounds) * len(explanation.launches),
        counts=counts,
        used=macs / (counts.mmas * mma_macs),
        dense_seconds=LAUNCH + max(tokens * size / peer, (2 * size + moved) / rates.memory),
        low_rank_seconds=low_rank,
        # Factors are written, by one launch, and read again.
        unpack_seconds=low_rank + LAUNCH + factors / rates.memory,
        backend=explain(shape, packed, "auto", activation, dtype=half, gpu=gpu).backend,
    )


def _stages(packed: PackedLinear) -> list[list[tuple[int, int]]]:
    """Rows and columns of the signs of each stage."""
    first = [(rows, packed.in_features) for rows in packed.shape.own_rows]
    last = [(packed.out_features, rank) for rank in packed.ranks or ()]
    return [first] if packed.single_stage else [first, last]


def _count_gemm(packed: PackedLinear, explanation: Explanation, rounds: list[int], rates: Rates) -> Counts:
    mode, stages = str(explanation.activation), _stages(packed)
    gemms = [launch for launch in explanation.launches if launch.kind == "gemm"]
    counts = Counts()
    for index, (launch, stage) in enumerate(zip(gemms, stages, strict=True)):
        slices = max(-(-cols // SLICE) for _, cols in stage)
        for count in rounds:
            tiles = -(-count // launch.token_tile)
            padded = tiles * launch.token_tile
            converted = 0
            for rows, cols in stage:
                row_tiles = -(-rows // launch.row_tile)
                indices = -(-cols // INDEX)
                counts.mmas += (
                    row_tiles * launch.row_tile // TILE_ROWS * (padded // GROUP) * indices * INDEX_MMAS[mode]
                )
                counts.copied_bytes += row_tiles * count * indices * INDEX * CONVERTED[mode]
                counts.sign_bytes += tiles * rows * -(-cols // 32) * 4
                # The first stage reads x, the second the sums of the first one's slices.
                parts = 1
                if index == 1 and gemms[0].grid[1] > 1:
                    parts = -(-packed.in_features // SLICE)
                read = 2 if index == 0 else 4 * parts
                converted += count * cols * (read + CONVERTED[mode])
            written = 2 * count * packed.out_features if stage is stages[-1] else 0
            if stage is not stages[-1]:
                parts = slices if launch.grid[1] > 1 else 1
                written = 4 * count * parts * sum(rows for rows, _ in stage)
            counts.converted_bytes += converted
            counts.seconds += rates.seconds(chained=launch.chained, nbytes=converted)
            cycles = launch.estimated_cycles * count / rounds[0]
            from_memory = sum(rows * -(-cols // 32) * 4 for rows, cols in stage) + written
            counts.seconds += rates.seconds(chained=launch.chained, nbytes=from_memory, cycles=cycles)
    return counts


def _count_fused(packed: PackedLinear, explanation: Explanation, rounds: list[int], rates: Rates) -> Counts:
    mode, (first, last) = str(explanation.activation), _stages(packed)
    (launch,) = explanation.launches
    counts = Counts()
    for count in rounds:
        tiles = -(-count // launch.token_tile)
        # Rows of the first stage come in tiles, those of the last in two of them.
        for stage, tile_rows in ((first, TILE_ROWS), (last, 2 * TILE_ROWS)):
            for rows, cols in stage:
                row_tiles = -(-rows // tile_rows) * (tile_rows // TILE_ROWS)
                groups = tiles * launch.token_tile // GROUP
                counts.mmas += row_tiles * groups * -(-cols // INDEX) * INDEX_MMAS[mode]
                counts.sign_bytes += tiles * rows * -(-cols // 32) * 4
        signs = sum(rows * -(-cols // 32) * 4 for rows, cols in (*first, *last))
        moved = 2 * count * (packed.in_features + packed.out_features) + signs
        cycles = launch.estimated_cycles * count / rounds[0]
        counts.seconds += rates.seconds(chained=launch.chained, nbytes=moved, cycles=cycles)
    return counts


def rows(
    gpus: Sequence[str], problems: Sequence[Problem], token_counts: Sequence[int], activation: str = "auto"
) -> list[dict[str, Any]]:
    """Predictions as plain rows: bytes, counts and seconds."""
    found = []
    for problem in problems:
        packed = problem.quick_packed()
        for gpu in gpus:
            for tokens in token_counts:
                p = predict_prefill(packed, gpu, tokens, activation)
                launches = [launch for launch in p.explanation.launches if launch.kind != "convert"]
                found.append(
                    {
                        "gpu": gpu,
                        "shape": problem.shape.label,
                        "bpw": problem.bpw,
                        "activation": str(p.explanation.activation),
                        "tokens": tokens,
                        "tiles": [_tile(launch) for launch in launches],
                        "grids": [list(launch.grid) for launch in launches],
                        "launches": p.launches,
                        **asdict(p.counts),
                        "used": p.used,
                        "dense_seconds": p.dense_seconds,
                        "low_rank_seconds": p.low_rank_seconds,
                        "unpack_seconds": p.unpack_seconds,
                        "backend": p.backend,
                    }
                )
    return found


def _tile(launch: Launch) -> str:
    return (
        f"both x{launch.token_tile}" if launch.kind == "fused" else f"{launch.row_tile}x{launch.token_tile}"
    )


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    head = ["GPU", "shape", "bpw", "mode", "M", "tiles", "grids", "launches", "MMAs", "used", "converted MiB"]
    head += ["copied MiB", "signs MiB", "us", "dense us", "low-rank us", "unpack us", "vs dense", "vs unpack"]
    head.append("auto")
    sizes = ("converted_bytes", "copied_bytes", "sign_bytes")
    times = ("seconds", "dense_seconds", "low_rank_seconds", "unpack_seconds")
    return markdown(
        head,
        [
            [
                *[row["gpu"], row["shape"], f"{row['bpw']:g}", row["activation"], str(row["tokens"])],
                " + ".join(row["tiles"]),
                " + ".join("x".join(map(str, grid)) for grid in row["grids"]),
                *[str(row["launches"]), str(row["mmas"]), f"{row['used']:.0%}"],
                *(f"{row[key] / 2**20:.1f}" for key in sizes),
                *(f"{row[key] * 1e6:.1f}" for key in times),
                f"{row['dense_seconds'] / row['seconds']:.1f}x",
                f"{row['unpack_seconds'] / row['seconds']:.2f}x",
                row["backend"],
            ]
            for row in found
        ],
    )
