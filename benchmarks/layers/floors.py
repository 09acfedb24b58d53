"""What the machine itself can do: reading memory as a stream, copying it, multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.caches import default_cold_bytes
from benchmarks.markdown import markdown
from benchmarks.timing import Timer, Timing, time_interleaved

__all__ = ["Floor", "floor_fraction", "floors_table", "measure_floors"]

#: Least bytes of the stream.
LEAST_BYTES = 512 * 2**20
DEFAULT_SIZE = 2048


@dataclass(frozen=True)
class Floor:
    """Measured limits for one number of threads.

    Attributes:
        threads: threads of torch's pool; 0 on a GPU.
        read_gbs: GB/s of the fastest reduction over a tensor that no cache holds.
        copy_gbs: GB/s of a copy of it, bytes read plus bytes written.
        matmul_gmacs: 1e9 multiply-accumulates a second of a square matrix product, by dtype.
    """

    threads: int
    read_gbs: float
    copy_gbs: float
    matmul_gmacs: dict[str, float]


def _readers(values: torch.Tensor) -> dict[str, Callable[[], object]]:
    # No single reduction is the fastest everywhere.
    return {
        "read sum int64": lambda: values.view(torch.int64).sum(),
        "read sum float32": values.sum,
        "read max float32": values.amax,
        "read dot float32": lambda: torch.dot(values, values),
    }


def measure_floors(
    threads: Sequence[int],
    *,
    device: torch.device,
    timer: Timer,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    nbytes: int | None = None,
    size: int = DEFAULT_SIZE,
    repetitions: int = 5,
) -> list[Floor]:
    """Measure the limits, for each number of threads.

    Args:
        threads: numbers of threads; ``[0]`` on a GPU.
        device: which machine.
        timer: what measures.
        dtypes: of the matrix products.
        nbytes: bytes of the stream; by default 8 times the last cache, at least 512 MiB.
        size: rows and columns of the square matrices.
        repetitions: turns of each measurement.
    """
    if nbytes is None:
        nbytes = max(LEAST_BYTES, default_cold_bytes(device))
    values = torch.empty(nbytes // 8 * 2, device=device).uniform_(-1, 1)
    target = torch.empty_like(values)
    candidates = {**_readers(values), "copy": lambda: target.copy_(values)}
    for dtype in dtypes:
        a, b = (torch.empty(size, size, device=device).uniform_(-1, 1).to(dtype) for _ in range(2))
        candidates[f"matmul {dtype}"] = partial(torch.matmul, a, b)
    before = torch.get_num_threads()
    floors = []
    try:
        for count in threads:
            if count:
                torch.set_num_threads(count)
            with torch.inference_mode():
                timings = time_interleaved(candidates, repetitions=repetitions, timer=timer, cold=True)
            floors.append(_floor(count, timings, nbytes=values.nbytes, macs=size**3))
    finally:
        torch.set_num_threads(before)
    return floors


def _floor(threads: int, timings: Mapping[str, Timing], *, nbytes: int, macs: int) -> Floor:
    fastest_read = min(timing.median for name, timing in timings.items() if name.startswith("read "))
    return Floor(
        threads=threads,
        read_gbs=nbytes / fastest_read / 1e9,
        copy_gbs=2 * nbytes / timings["copy"].median / 1e9,
        matmul_gmacs={
            name.removeprefix("matmul torch."): macs / timing.median / 1e9
            for name, timing in timings.items()
            if name.startswith("matmul ")
        },
    )


def floor_fraction(nbytes: int, seconds: float, floor: Floor) -> float:
    """The time that reading ``nbytes`` takes at the measured floor, as a share of ``seconds``."""
    return nbytes / (floor.read_gbs * 1e9) / seconds


def floors_table(floors: Iterable[Floor]) -> str:
    """The floors as a markdown table."""
    floors = list(floors)
    dtypes = list(dict.fromkeys(dtype for floor in floors for dtype in floor.matmul_gmacs))
    return markdown(
        ["threads", "read GB/s", "copy GB/s", *(f"matmul {dtype} GMAC/s" for dtype in dtypes)],
        [
            [
                str(floor.threads or "-"),
                f"{floor.read_gbs:.1f}",
                f"{floor.copy_gbs:.1f}",
                *(f"{floor.matmul_gmacs[d]:.0f}" if d in floor.matmul_gmacs else "" for d in dtypes),
            ]
            for floor in floors
        ],
    )
