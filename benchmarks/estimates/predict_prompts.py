"""What a prompt should cost on a GPU, counted, not measured: MMAs, bytes, launches, and a time from them.

As :mod:`benchmarks.estimates.predict`, for calls that take the GEMM or the kernel of both stages. A launch of these is
expected to take the planner's estimate of its cycles at boost clock, or what it reads from memory if that is
longer; a conversion
what it reads and writes at the rate of the memory. Peers get 0.7 of the tensor cores' nominal rate, or their
bytes from memory; scales, which the low-rank peers leave out, cost them nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.estimates.predict import LAUNCH, RATES, Rates
from littlebit2_kernels import PackedLinear, explain
from littlebit2_kernels.explanation import Explanation

__all__ = ["PromptPrediction", "predict_prompt"]

#: Of the nominal rate, that cuBLAS reaches.
PEER_RATE = 0.7
#: Columns of the least part of a slice that is left out where a term ends, of a slice; rows and tokens of an
#: MMA (csrc/cuda/gemm/sizes.h).
INDEX, SLICE, TILE_ROWS, GROUP = 128, 512, 16, 8
#: MMAs of 16 rows, 8 tokens and an index, and bytes that an activation is converted to.
INDEX_MMAS = {"float16": 8, "exact": 16, "int8": 4}
CONVERTED = {"float16": 2, "exact": 4, "int8": 1}


@dataclass
class Counts:
    """What the launches of a call do.

    Attributes:
        mmas: MMAs, of warps: m16n8k16 or, in int8, m16n8k32.
        converted_bytes: read and written by conversions that are launches of their own.
        copied_bytes: activations that blocks of the GEMM copy to shared memory, from the L2 cache.
        sign_bytes: signs that blocks read, likewise.
        seconds: of all launches.
    """

    mmas: int = 0
    converted_bytes: int = 0
    copied_bytes: int = 0
    sign_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PromptPrediction:
    """One call.

    Attributes:
        explanation: what is launched, for each round of ``token_block`` tokens.
        launches: of all rounds.
        counts: of all rounds.
        used: part of the MMAs' multiply-adds that are the layer's; the others are padding.
        dense_seconds, low_rank_seconds, unpack_seconds: of the peers.
        backend: which ``auto`` would take, of layers whose factors fit float16.
    """

    explanation: Explanation
    launches: int
    counts: Counts
    used: float
    dense_seconds: float
    low_rank_seconds: float
    unpack_seconds: float
    backend: str


def predict_prompt(packed: PackedLinear, gpu: str, tokens: int, activation: str = "auto") -> PromptPrediction:
    """Count ``tokens`` float16 tokens through ``packed`` on a GPU of :data:`benchmarks.estimates.predict.RATES`.

    Raises:
        ValueError: the GPU or the activation is unknown, or such a call takes neither kernel.
    """
    if gpu not in RATES:
        raise ValueError(f"gpu must be one of {', '.join(RATES)}, got {gpu!r}")
    rates = RATES[gpu]
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
    factors = 2 * sum(packed.ranks) * (packed.in_features + packed.out_features)
    size = packed.in_features * packed.out_features
    moved = 2 * tokens * (packed.in_features + packed.out_features)
    low_rank = 2 * LAUNCH + max(macs / peer, (factors + moved) / rates.memory)
    mma_macs = TILE_ROWS * GROUP * (32 if mode == "int8" else 16) // (2 if mode == "exact" else 1)
    return PromptPrediction(
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
    first = [(packed.ranks[p], packed.in_features) for p in sorted(set(packed.leaders))]
    last = [(packed.out_features, rank) for rank in packed.ranks]
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
