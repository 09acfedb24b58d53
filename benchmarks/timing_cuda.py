"""Timing on a CUDA device: events around replays of a captured graph, the L2 cache flushed in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.timing import Call, CpuTimer, Setup, Timer, Turn

__all__ = ["CALLS_PER_GRAPH", "CudaTimer", "timer_for"]

#: Calls captured in one graph. Enough to make the launch of the graph small beside them.
CALLS_PER_GRAPH = 64
#: Runs before capture, which must find everything compiled, tuned and allocated.
WARM_UPS = 3


class CudaTimer:
    """Times graphs of :data:`CALLS_PER_GRAPH` calls.

    Cold: the graph goes through distinct copies, round and round where fewer of them exceed the L2 cache
    together; before every replay a buffer of twice the cache is written, so that no copy is found there. Hot:
    the graph repeats one copy, and nothing is flushed.

    Args:
        device: the CUDA device.
        graphs: whether to capture; without, calls are launched one by one.
        flush_bytes: bytes written between cold replays, by default twice the L2 cache.
        cuda: stands in for ``torch.cuda`` in tests.
    """

    def __init__(
        self, device: torch.device, *, graphs: bool = True, flush_bytes: int | None = None, cuda: Any = None
    ) -> None:
        self._cuda = torch.cuda if cuda is None else cuda
        self._graphs = graphs
        if flush_bytes is None:
            flush_bytes = 2 * int(self._cuda.get_device_properties(device).L2_cache_size)
        self._flushed = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        """See :class:`Timer`."""
        # As many calls for every candidate: what starting a graph costs is then the same share of each.
        used = runs if cold else runs[:1]
        sequence = [used[i % len(used)] for i in range(CALLS_PER_GRAPH)]
        if setup is not None:
            setup()
        launch = self._launcher(sequence)
        estimate = self._elapsed(launch, 1, cold=cold)
        replays = min(1000, max(1, math.ceil(seconds / max(estimate, 1e-6))))

        def turn() -> float:
            if setup is not None:
                setup()
            return self._elapsed(launch, replays, cold=cold) / (replays * len(sequence))

        return turn

    def _launcher(self, sequence: Sequence[Call]) -> Callable[[], object]:
        cuda = self._cuda
        # Capture wants work that already ran on a stream other than the default one.
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(WARM_UPS):
                for run in dict.fromkeys(sequence):
                    run()
        cuda.current_stream().wait_stream(stream)
        cuda.synchronize()
        if not self._graphs:

            def launch_all() -> None:
                for run in sequence:
                    run()

            return launch_all
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for run in sequence:
                run()
        return graph.replay

    def _elapsed(self, launch: Callable[[], object], replays: int, *, cold: bool) -> float:
        """Seconds of ``replays`` launches, flushes not counted."""
        cuda = self._cuda
        # An untimed launch first: the device is then busy while the host queues what is timed.
        launch()
        events = []
        for _ in range(replays):
            if cold:
                self._flushed.zero_()
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            launch()
            end.record()
            events.append((start, end))
        cuda.synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in events)
        return milliseconds / 1e3


def timer_for(device: torch.device, *, graphs: bool = True) -> Timer:
    """The timer for a device.

    Raises:
        ValueError: nothing here can time the device.
    """
    if device.type == "cpu":
        return CpuTimer()
    if device.type == "cuda":
        return CudaTimer(device, graphs=graphs)
    raise ValueError(f"device must be cpu or cuda, got {device}")
