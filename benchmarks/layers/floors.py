"""Measure what the machine can do: GB/s of reading and copying memory, GMAC/s of matrix products."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import PROCESSORS
from benchmarks.caches import default_cold_bytes
from benchmarks.layers.rows import Floor, floors_table
from benchmarks.options import add_json, cpu_threads, positive, usable_device
from benchmarks.records import environment, write_result
from benchmarks.timing import Timer, Timing, time_interleaved

if TYPE_CHECKING:
    import torch

__all__ = ["add_arguments", "measure_floors", "run"]

#: Least bytes of the stream.
LEAST_BYTES = 512 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--threads", nargs="+", type=positive(int), help="default: 1 and all")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--mib",
        type=positive(float),
        help="size of the stream (default: 8 times the last cache, 512 or more)",
    )
    parser.add_argument("--size", type=positive(int), default=2048, help="rows of the square matrices")
    add_json(parser)


def run(options: Namespace) -> int:
    """Print the floors."""
    from benchmarks.problems import parse_dtype
    from benchmarks.timing_cuda import timer_for

    device = usable_device(options.device)
    wanted = options.threads or sorted({1, len(PROCESSORS)})
    threads = cpu_threads(wanted) if device.type == "cpu" else [0]
    floors = measure_floors(
        threads,
        device=device,
        timer=timer_for(device),
        dtypes=[parse_dtype(text) for text in options.dtypes],
        nbytes=None if options.mib is None else int(options.mib * 2**20),
        size=options.size,
    )
    print(floors_table(floors))
    if options.json is not None:
        write_result(options.json, options, environment(device, threads), floors=floors)
    return 0


def _readers(values: torch.Tensor) -> dict[str, Callable[[], object]]:
    import torch

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
    dtypes: Sequence[torch.dtype] | None = None,
    nbytes: int | None = None,
    size: int = 2048,
    repetitions: int = 5,
) -> list[Floor]:
    """Measure the limits, for each number of threads.

    Args:
        threads: numbers of threads; ``[0]`` on a GPU.
        device: the device.
        timer: what measures.
        dtypes: dtypes of the matrix products; float32 by default.
        nbytes: bytes of the stream; by default 8 times the last cache, at least 512 MiB.
        size: rows and columns of the square matrices.
        repetitions: turns of each measurement.
    """
    import torch

    if nbytes is None:
        nbytes = max(LEAST_BYTES, default_cold_bytes(device))
    values = torch.empty(nbytes // 8 * 2, device=device).uniform_(-1, 1)
    target = torch.empty_like(values)
    candidates = {**_readers(values), "copy": lambda: target.copy_(values)}
    for dtype in (torch.float32,) if dtypes is None else dtypes:
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
