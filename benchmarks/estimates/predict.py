"""What a decode call should cost on a GPU, counted, not measured: bytes, instructions, and a time from them.

Bytes and instructions follow from the layer and from the launches that the planner chooses. A stage is then
expected to take its launch and the longer of the planner's estimate of its cycles (one token) and of reading
its signs and scales from memory. The rates below are the vendors' (clock: boost), memory at 0.9 of the
nominal rate, as an H200 reached in a copy; the time of a launch within a graph is assumed. To be read beside
a measurement, not in its place.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch

from benchmarks.markdown import markdown
from benchmarks.problems import Problem, parse_shape
from littlebit2_kernels import PackedLinear, explain
from littlebit2_kernels.explanation import Explanation, Launch
from littlebit2_kernels.testing import make_packed

__all__ = ["LAUNCH", "RATES", "Prediction", "Rates", "predict", "run"]

SLICE = 512
TILE_ROWS = 16
#: MMAs of 16 rows and one slice, and 16-byte loads of shared memory beside them, for one token.
MMAS = {"int16": 4, "int8": 2, "sign": 2, "float16": 32, "exact": 32}
SHARED_LOADS = {"int16": 2, "int8": 1, "sign": 1, "float16": 16, "exact": 16}


#: Assumed seconds from the end of a kernel to the start of the next one in a graph, and to a chained one's.
LAUNCH, CHAINED_LAUNCH = 1.0e-6, 0.3e-6


@dataclass(frozen=True)
class Rates:
    """Clock in Hz, bytes per second from memory, and nominal float16 FLOP per second (dense, fp32 sums)."""

    clock: float
    memory: float
    tensor: float

    def seconds(self, *, chained: bool, nbytes: float, cycles: float = 0.0) -> float:
        """What a launch takes: its start, and the longer of its cycles and of its bytes from memory."""
        start = CHAINED_LAUNCH if chained else LAUNCH
        return start + max(cycles / self.clock, nbytes / self.memory)


#: By the names of :data:`littlebit2_kernels.gpu.GPUS`.
RATES = {
    "A100": Rates(1.41e9, 0.9 * 2.04e12, 312e12),
    "4090": Rates(2.52e9, 0.9 * 1.01e12, 165e12),
    "H100": Rates(1.98e9, 0.9 * 3.35e12, 989e12),
    "H200": Rates(1.98e9, 0.9 * 4.8e12, 989e12),
}


@dataclass(frozen=True)
class Prediction:
    """One token through one layer.

    Attributes:
        explanation: what is launched.
        nbytes: signs (row padding included) and scales that each launch reads.
        sign_loads: loads of signs, of warps: of 16 bytes where rows start at multiples of that, as those of
            ``LittleBitLinear`` on a GPU do.
        shared_loads: 16-byte loads of activations from shared memory beside the MMAs, of warps.
        mmas: MMAs, of warps.
        staged: slices staged, by all blocks together.
        seconds: of each launch.
        dense_seconds: reading the float16 weight once, the least that a dense product can take.
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
    """Count one float16 token through ``packed`` on a GPU of :data:`RATES`.

    Raises:
        ValueError: the GPU or the activation is unknown.
    """
    if gpu not in RATES:
        raise ValueError(f"gpu must be one of {', '.join(RATES)}, got {gpu!r}")
    rates = RATES[gpu]
    shape = (1, packed.in_features)
    explanation = explain(shape, packed, "cuda", activation, dtype=torch.float16, gpu=gpu)
    mode = str(explanation.activation)
    leaders = sorted(set(packed.leaders))
    # (rows, columns) of the signs of each launch.
    first = [(packed.ranks[p], packed.in_features) for p in leaders]
    last = [(packed.out_features, rank) for rank in packed.ranks]
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


def run(options: Namespace) -> int:
    """Print predictions as a markdown table."""
    if options.tokens:
        return _run_prompts(options)
    head = ["GPU", "shape", "bpw", "mode", "grid", "KiB", "MMAs", "LDG.128", "LDS.128", "staged slices"]
    head += ["us by stage", "us", "dense at least us", "ratio"]
    rows = []
    for gpu in options.gpu:
        for name in options.shapes:
            for bpw in options.bpw:
                problem = Problem(parse_shape(name), bpw)
                sizes = (problem.shape.in_features, problem.shape.out_features)
                prediction = predict(make_packed(*sizes, problem.ranks), gpu, options.activation)
                rows.append([gpu, problem.shape.label, f"{bpw:g}", *_cells(prediction)])
    print(markdown(head, rows))
    return 0


def _run_prompts(options: Namespace) -> int:
    from benchmarks.estimates.predict_prompts import predict_prompt

    head = ["GPU", "shape", "bpw", "mode", "M", "tiles", "grids", "launches", "MMAs", "used", "converted MiB"]
    head += ["copied MiB", "signs MiB", "us", "dense us", "low-rank us", "unpack us", "vs dense", "vs unpack"]
    head.append("auto")
    rows = []
    for gpu in options.gpu:
        for name in options.shapes:
            for bpw in options.bpw:
                problem = Problem(parse_shape(name), bpw)
                packed = make_packed(problem.shape.in_features, problem.shape.out_features, problem.ranks)
                for tokens in options.tokens:
                    p = predict_prompt(packed, gpu, tokens, options.activation)
                    kernels = [launch for launch in p.explanation.launches if launch.kind != "convert"]
                    counts = p.counts
                    sizes = (counts.converted_bytes, counts.copied_bytes, counts.sign_bytes)
                    times = [counts.seconds, p.dense_seconds, p.low_rank_seconds, p.unpack_seconds]
                    rows.append(
                        [
                            *[gpu, problem.shape.label, f"{bpw:g}", str(p.explanation.activation)],
                            str(tokens),
                            " + ".join(_tile(launch) for launch in kernels),
                            " + ".join("x".join(map(str, launch.grid)) for launch in kernels),
                            *[str(p.launches), str(counts.mmas), f"{p.used:.0%}"],
                            *(f"{n / 2**20:.1f}" for n in sizes),
                            *(f"{seconds * 1e6:.1f}" for seconds in times),
                            f"{p.dense_seconds / counts.seconds:.1f}x",
                            f"{p.unpack_seconds / counts.seconds:.2f}x",
                            p.backend,
                        ]
                    )
    print(markdown(head, rows))
    return 0


def _tile(launch: Launch) -> str:
    return (
        f"both x{launch.token_tile}" if launch.kind == "fused" else f"{launch.row_tile}x{launch.token_tile}"
    )


def _cells(prediction: Prediction) -> list[str]:
    launches = prediction.explanation.launches
    total = sum(prediction.seconds)
    return [
        str(prediction.explanation.activation),
        " + ".join(f"{launch.grid[0]}x{launch.grid[1]}" for launch in launches),
        f"{sum(prediction.nbytes) / 1024:.0f}",
        str(prediction.mmas),
        str(prediction.sign_loads),
        str(prediction.shared_loads),
        str(prediction.staged),
        " + ".join(f"{seconds * 1e6:.2f}" for seconds in prediction.seconds),
        f"{total * 1e6:.2f}",
        f"{prediction.dense_seconds * 1e6:.1f}",
        f"{prediction.dense_seconds / total:.1f}x",
    ]
