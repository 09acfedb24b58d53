"""Statistics and turn-taking of the timers, with clocks and devices that the tests control."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.timing import CpuTimer, Timing, spread_of, time_interleaved
from benchmarks.timing_cuda import CALLS_PER_GRAPH, WARM_UPS, CudaTimer, timer_for


class Clock:
    """Time that passes only when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += seconds

        return call


def test_spread() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert spread_of([7.0]).low == spread_of([7.0]).high == 7.0
    with pytest.raises(ValueError, match="values must hold at least one number, got none"):
        spread_of([])


def test_ratios_are_formed_within_repetitions() -> None:
    ours, peer = Timing((1.0, 2.0, 4.0)), Timing((10.0, 40.0, 60.0))
    assert ours.median == 2.0
    assert ours.ratios_over(peer) == (10.0, 20.0, 15.0)
    # The ratio of the medians would be 20.
    assert ours.speedup_over(peer) == ours.speedup_spread(peer).median == 15.0
    assert (ours.speedup_spread(peer).low, ours.speedup_spread(peer).high) == (12.5, 17.5)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ours.ratios_over(Timing((1.0,)))


def test_order_rotates_and_samples_pair_up() -> None:
    clock = Clock()
    candidates = {name: clock.run(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    timings = time_interleaved(candidates, repetitions=4, seconds=0.5, timer=CpuTimer(clock))
    assert {name: timing.samples for name, timing in timings.items()} == {
        "a": (1.0,) * 4,
        "b": (2.0,) * 4,
        "c": (3.0,) * 4,
    }
    # Two calls each to estimate the length of a turn, then the rounds.
    assert "".join(clock.log) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_turns_fill_their_time_after_an_untimed_call() -> None:
    clock = Clock()
    time_interleaved({"a": clock.run("a", 0.1)}, repetitions=2, seconds=1.0, timer=CpuTimer(clock))
    assert len(clock.log) == 2 + 2 * (1 + 10)


def test_turns_last_their_time_at_least() -> None:
    clock = Clock()
    time_interleaved({"a": clock.run("a", 0.75)}, repetitions=1, seconds=1.0, timer=CpuTimer(clock))
    assert len(clock.log) == 2 + (1 + 2)


def test_long_calls_run_once_to_warm_up() -> None:
    clock = Clock()
    time_interleaved({"a": clock.run("a", 50.0)}, repetitions=3, seconds=1.0, timer=CpuTimer(clock))
    assert len(clock.log) == 1 + 3


def test_copies_are_used_in_turn_across_turns() -> None:
    clock = Clock()
    copies = [clock.run(name, 1.0) for name in "abcd"]
    time_interleaved({"x": copies}, repetitions=3, seconds=2.0, cold=True, timer=CpuTimer(clock))
    assert "".join(clock.log) == ("abcd" * 4)[: len(clock.log)]


def test_setup_runs_before_every_turn_untimed() -> None:
    clock = Clock()
    timings = time_interleaved(
        {"a": clock.run("a", 1.0), "b": clock.run("b", 1.0)},
        repetitions=2,
        seconds=0.1,
        timer=CpuTimer(clock),
        setups={"a": clock.run("s", 100.0)},
    )
    assert timings["a"].samples == timings["b"].samples == (1.0, 1.0)
    assert "".join(clock.log) == "sabsab" + "bsa"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
        time_interleaved({}, repetitions=0)
    with pytest.raises(ValueError, match=r"candidates\['x'\] must hold at least one call, got none"):
        time_interleaved({"x": []})
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        timer_for(torch.device("meta"))
    assert isinstance(timer_for(torch.device("cpu")), CpuTimer)


class FakeCuda:
    """Stands in for ``torch.cuda``: calls inside a capture are recorded, replayed, and take 2 ms each."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.capturing: list[str] | None = None

    def call(self, name: str) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is not None:
                self.capturing.append(name)
            else:
                self.log.append(name)
                self.now += 2.0

        return run

    def get_device_properties(self, device: torch.device) -> Any:
        return types.SimpleNamespace(L2_cache_size=100)

    def Stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        self.log.append("sync")

    def CUDAGraph(self) -> Any:
        captured: list[str] = []

        def replay() -> None:
            self.log.append("graph:" + "".join(captured))
            self.now += 2.0 * len(captured)

        return types.SimpleNamespace(replay=replay, captured=captured)

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Any:
        self.capturing = graph.captured
        yield
        self.capturing = None

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = types.SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: end.at - event.at
        return event


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


def cuda_timer(fake: FakeCuda, *, graphs: bool = True) -> CudaTimer:
    timer = CudaTimer(torch.device("cpu"), graphs=graphs, cuda=fake)
    flushed = timer._flushed
    assert flushed.numel() == 200

    def zero() -> None:
        fake.log.append("flush")
        fake.now += 1000.0

    timer._flushed = types.SimpleNamespace(zero_=zero)  # type: ignore[assignment]
    return timer


def test_cuda_cold_goes_through_the_copies_and_flushes_untimed(fake: FakeCuda) -> None:
    runs = [fake.call(name) for name in "abc"]
    timings = time_interleaved(
        {"x": runs}, repetitions=1, seconds=0.004 * CALLS_PER_GRAPH, cold=True, timer=cuda_timer(fake)
    )
    # 2 ms a call, whatever the flushes take.
    assert timings["x"].samples == pytest.approx([0.002])
    warm_up = [*"abc"] * WARM_UPS + ["sync"]
    graph = "graph:" + ("abc" * CALLS_PER_GRAPH)[:CALLS_PER_GRAPH]
    estimate = [graph, "flush", graph, "sync"]
    turn = [graph, *["flush", graph] * 2, "sync"]
    assert fake.log == warm_up + estimate + turn


def test_cuda_hot_repeats_one_copy_without_flushing(fake: FakeCuda) -> None:
    timings = time_interleaved({"x": [fake.call("a")]}, repetitions=2, seconds=0.01, timer=cuda_timer(fake))
    assert timings["x"].samples == pytest.approx([0.002, 0.002])
    assert "flush" not in fake.log
    assert "graph:" + "a" * CALLS_PER_GRAPH in fake.log


def test_cuda_without_graphs_launches_every_call(fake: FakeCuda) -> None:
    timer = cuda_timer(fake, graphs=False)
    timings = time_interleaved(
        {"x": [fake.call("a"), fake.call("b")]}, repetitions=1, seconds=0.001, cold=True, timer=timer
    )
    assert timings["x"].samples == pytest.approx([0.002])
    assert not any(entry.startswith("graph") for entry in fake.log)


def test_cuda_timer_on_a_device(requires_cuda: torch.device) -> None:
    x = torch.ones(64, 64, device=requires_cuda)
    runs = [lambda: x @ x, lambda: x + x]
    for cold in (False, True):
        for graphs in (False, True):
            timings = time_interleaved(
                {"x": runs},
                repetitions=2,
                seconds=1e-4,
                cold=cold,
                timer=timer_for(requires_cuda, graphs=graphs),
            )
            assert all(sample > 0 for sample in timings["x"].samples)
