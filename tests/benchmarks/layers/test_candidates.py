"""Problems, candidates, sweeps, checks and floors; nothing here looks at a measured time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.caches import last_level_cache
from benchmarks.layers import floors as floors_module
from benchmarks.layers import sweeping as sweep_module
from benchmarks.layers.candidates import (
    Built,
    Candidate,
    Dense,
    LowRank,
    Module,
    Portable,
    Unpack,
    parse_candidate,
)
from benchmarks.layers.floors import measure_floors
from benchmarks.layers.refcheck import INT16_BOUND, error_bound, precision_of, torch_error
from benchmarks.layers.rows import Floor, floor_fraction, floors_table
from benchmarks.layers.sweeping import MAX_COPIES, Case, Entry, Settings, Sweep, available
from benchmarks.problems import Problem, parse_dtype, random_packed
from benchmarks.shapes import LARGE_SHAPES, SHAPES, Shape, parse_shape
from benchmarks.timing import CpuTimer, Timing
from benchmarks.timing_cuda import CALLS_PER_GRAPH
from littlebit2_kernels import LittleBitLinear, PackedLinear, PackedPath
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, relative_error

CPU = torch.device("cpu")
SMALL = Problem(Shape("small", 256, 192), 1.0)


def settings(**changes: Any) -> Settings:
    small = Settings(CPU, CpuTimer(), repetitions=1, seconds=1e-6, cold_bytes=20_000)
    return dataclasses.replace(small, **changes)


def test_shapes() -> None:
    assert parse_shape("llama2-70b-up") == Shape("llama2-70b-up", 8192, 28672)
    assert parse_shape("64,96") == Shape("64,96", 64, 96)
    assert [SHAPES[name].label for name in LARGE_SHAPES] == [
        "4096->11008",
        "11008->4096",
        "8192->28672",
        "28672->8192",
    ]
    for bad in ("llama", "64", "64,", "0,8", "-1,8", "1,2,3"):
        with pytest.raises(ValueError, match=f"shape must be K,N or one of .*, got '{bad}'"):
            parse_shape(bad)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got 'int8'"):
        parse_dtype("int8")


def test_problems_repeat_and_keep_their_budget() -> None:
    again = Problem(SMALL.shape, SMALL.bpw)
    for mine, other in zip(SMALL.packed.unique_tensors(), again.packed.unique_tensors(), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(SMALL.activations(3), again.activations(3))
    assert SMALL.packed.ranks == tuple(SMALL.ranks)
    assert LayerShape(256, 192, SMALL.ranks).counted_bpw <= 1.0
    assert SMALL.packed_macs == sum(rank * (256 + 192) for rank in SMALL.ranks)
    large = SMALL.activations(64, outliers=4).abs().amax(0) > 40
    assert int(large.sum()) == 4


@pytest.mark.parametrize(("k", "n", "ranks"), [(256, 704, [40, 40]), (100, 64, [24]), (64, 96, [32, 32, 32])])
def test_random_layers_have_ordinary_weights(k: int, n: int, ranks: list[int], rng: torch.Generator) -> None:
    layer = random_packed(k, n, ranks, std=0.02, generator=rng)
    weight = LittleBitLinear.from_packed(layer).dequantize()
    assert weight.shape == (n, k)
    assert 0.01 < weight.std() < 0.04
    assert abs(weight.mean()) < 0.005
    for path in layer.paths:
        # Pad bits are 0 in the format.
        assert k % 32 == 0 or not (path.v[:, -1] >> k % 32).any()


@pytest.mark.parametrize("features", [(256, 192), (100, 60)])
def test_unpack_is_the_low_rank_product(features: tuple[int, int]) -> None:
    problem = Problem(Shape("odd", *features), 1.0)
    x = problem.activations(3)
    low_rank = LowRank("low-rank", x.dtype).build(problem)
    unpack = Unpack("unpack", x.dtype).build(problem)
    assert torch.equal(unpack.bind(unpack.holder)(x), low_rank.bind(low_rank.holder)(x))
    assert unpack.nbytes < low_rank.nbytes / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_is_the_layer_without_its_scales(dtype: torch.dtype) -> None:
    built = LowRank("low-rank", dtype).build(SMALL)
    assert built.nbytes == LowRank("low-rank", dtype).planned_bytes(SMALL)
    ones = [
        PackedPath(
            v=p.v,
            in_scale=torch.ones(p.in_features),
            out_scale=torch.ones(p.out_features),
            u=p.u,
            latent_scale=torch.ones(p.rank),
        )
        for p in SMALL.packed.paths
    ]
    x = SMALL.activations(2).to(dtype)
    truth = linear_reference(x, PackedLinear(tuple(ones)))
    actual = built.bind(built.holder)(x)
    assert relative_error(actual, truth) < (1e-6 if dtype == torch.float32 else 2**-7)


def test_dense() -> None:
    built = Dense("dense", torch.float16).build(SMALL)
    assert built.nbytes == 2 * 256 * 192
    assert built.bind(built.holder)(SMALL.activations(2).half()).shape == (2, 192)


def test_copies_are_distinct_and_give_the_same_result() -> None:
    x = SMALL.activations(2)
    for candidate in (Portable("p", x.dtype), Dense("d", x.dtype), LowRank("l", x.dtype)):
        built = candidate.build(SMALL)
        first, second = built.forwards(2)
        assert torch.equal(first(x), second(x))
        if isinstance(candidate, Portable):
            built.holder.paths[0].out_scale.zero_()
            assert not torch.equal(first(x), second(x))


def test_candidate_names() -> None:
    module = parse_candidate("littlebit2:cpu:int16", torch.bfloat16)
    assert isinstance(module, Module)
    assert (module.backend, module.activation, module.label) == (
        "cpu",
        "int16",
        "littlebit2:cpu:int16 bfloat16",
    )
    assert isinstance(parse_candidate("littlebit2:portable", torch.float32), Portable)
    for bad in ("littlebit2", "littlebit2:cpu", "littlebit2:cpu:float", "littlebit2:gpu:auto", "fast"):
        with pytest.raises(ValueError, match=f"candidate must be one of .*; got '{bad}'"):
            parse_candidate(bad, torch.float32)


def test_unavailable_candidates_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gemlite = parse_candidate("gemlite", torch.float16)
    assert gemlite.unavailable(CPU) == "gemlite runs on CUDA tensors, not on cpu"
    cuda = parse_candidate("gemlite", torch.float32).unavailable(torch.device("cuda"))
    assert cuda == "gemlite takes 16-bit activations, not float32"
    for mode in ("exact", "float16", "int8", "sign"):
        triton = parse_candidate(f"littlebit2:triton:{mode}", torch.float16)
        assert "backend='triton' cannot run: " in str(triton.unavailable(CPU))
    assert "activation='int16' is not served" in str(
        parse_candidate("littlebit2:triton:int16", torch.float16).unavailable(CPU)
    )
    module = parse_candidate("littlebit2:cpu:exact", torch.float32)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not\nbuilt")

    monkeypatch.setattr(LittleBitLinear, "from_packed", refuse)
    assert module.unavailable(CPU) == "RuntimeError: not built"
    usable, reasons = available([gemlite, module, Dense("dense", torch.float32)], CPU)
    assert [c.label for c in usable] == ["dense float32"]
    assert set(reasons) == {"gemlite float16", "littlebit2:cpu:exact float32"}


class Layer:
    """What a ``LittleBitLinear`` looks like from here."""

    nbytes = 1234

    def __init__(self, activation: str) -> None:
        if activation == "sign":
            raise ValueError("activation must be\nknown")
        self.prepacked = False

    def prepack_(self) -> Layer:
        self.prepacked = True
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert self.prepacked
        return x


def test_modules_are_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LittleBitLinear,
        "from_packed",
        classmethod(lambda cls, packed, *, backend="auto", activation="auto": Layer(activation)),
    )
    built = parse_candidate("littlebit2:cpu:exact", torch.float32).build(SMALL)
    assert built.nbytes == 1234
    assert all(forward.prepacked for forward in built.forwards(3))  # type: ignore[attr-defined]
    assert parse_candidate("littlebit2:cpu:exact", torch.float32).unavailable(CPU) is None
    reason = parse_candidate("littlebit2:cpu:sign", torch.float32).unavailable(CPU)
    assert reason == "ValueError: activation must be known"


def test_bounds() -> None:
    x = SMALL.activations(2)
    truth = linear_reference(x, SMALL.packed)

    def bound(name: str, dtype: torch.dtype) -> float | None:
        return error_bound(parse_candidate(name, dtype), truth, x.to(dtype), SMALL.packed)

    assert bound("littlebit2:portable", torch.float32) == TOLERANCE[torch.float32]
    assert bound("littlebit2:cpu:exact", torch.float32) == TOLERANCE[torch.float32]
    assert bound("littlebit2:cpu:auto", torch.float32) == TOLERANCE[torch.float32]
    assert bound("littlebit2:cpu:int16", torch.float32) == INT16_BOUND
    assert bound("littlebit2:cpu:auto", torch.bfloat16) == INT16_BOUND + TOLERANCE[torch.bfloat16]
    assert bound("littlebit2:cpu:int8", torch.float32) is None
    assert precision_of(parse_candidate("littlebit2:cpu:sign", torch.float32)) == "sign"
    assert 1e-4 < torch_error(truth, x.bfloat16(), SMALL.packed) < 1e-1


class Counting(Candidate):
    """A dense-like peer that counts how often its weights are made, and notes its threads."""

    uses_signs = False

    def __init__(self) -> None:
        super().__init__("counting", torch.float32)
        self.made = 0
        self.threads: list[int] = []

    def planned_bytes(self, problem: Problem) -> int:
        return 10_000

    def build(self, problem: Problem) -> Built:
        self.made += 1

        def bind(holder: torch.Tensor) -> Any:
            def forward(x: torch.Tensor) -> torch.Tensor:
                self.threads.append(torch.get_num_threads())
                return x

            return forward

        return Built(torch.zeros(1), bind, 10_000)


def test_sweep_rows() -> None:
    peer, ours = Counting(), Portable("littlebit2:portable", torch.float32)
    sweep = Sweep(settings(refcheck=True), [Floor(1, 10.0, 10.0, {})])
    cases = [Case(2, mode, [Entry(ours, 1), Entry(peer, 1)]) for mode in ("cold", "hot")]
    rows = list(sweep.measure(SMALL, cases))
    assert [(r.candidate, r.mode) for r in rows] == [
        ("littlebit2:portable", "cold"),
        ("counting", "cold"),
        ("littlebit2:portable", "hot"),
        ("counting", "hot"),
    ]
    cold, peer_cold, hot, _ = rows
    assert cold.copies == sweep.copies(SMALL.packed.nbytes) > 1
    assert peer_cold.copies == 2
    assert hot.copies == 1
    assert cold.macs == 2 * SMALL.packed_macs
    assert cold.weight_bytes == SMALL.packed.nbytes
    assert cold.speedups.keys() == {"counting float32"}
    assert cold.speedups["counting float32"][0] == Timing(tuple(cold.samples)).speedup_over(
        Timing(tuple(peer_cold.samples))
    )
    assert cold.floor_fraction == pytest.approx(cold.weight_bytes / 1e10 / cold.median)
    assert hot.floor_fraction is None
    assert cold.error is not None
    assert cold.error_bound is not None
    assert cold.error <= cold.error_bound
    assert peer_cold.error is None


def test_sweep_keeps_weights_that_fit_the_next_problem() -> None:
    peer, sweep = Counting(), Sweep(settings())
    cases = [Case(1, "hot", [Entry(peer, 1)])]
    for bpw, made in ((1.0, 1), (0.5, 1)):
        list(sweep.measure(Problem(SMALL.shape, bpw), cases))
        assert peer.made == made
    list(sweep.measure(Problem(Shape("other", 128, 128), 1.0), cases))
    assert peer.made == 2


def test_sweep_sets_threads_for_a_turn_only() -> None:
    before = torch.get_num_threads()
    peer = Counting()
    rows = list(Sweep(settings()).measure(SMALL, [Case(1, "hot", [Entry(peer, 1), Entry(peer, 2)])]))
    assert {row.threads for row in rows} == set(peer.threads) == {1, 2}
    assert all(row.speedups == {} for row in rows)
    assert torch.get_num_threads() == before


def test_sweep_refuses_to_fill_the_memory() -> None:
    sweep = Sweep(settings(memory_bytes=5_000))
    with pytest.raises(ValueError, match=r"weights of small at 1 bpw must fit 0.0 GiB, they would take"):
        list(sweep.measure(SMALL, [Case(1, "cold", [Entry(Counting(), 1)])]))


def test_copies() -> None:
    sweep = Sweep(settings(cold_bytes=1000))
    assert [sweep.copies(nbytes) for nbytes in (2000, 1000, 999, 100)] == [1, 1, 2, 10]
    assert Sweep(settings(cold_bytes=2**30)).copies(1) == MAX_COPIES
    assert Sweep(settings(cold_bytes=2**30, device=torch.device("cuda"))).copies(1) == CALLS_PER_GRAPH


def test_too_few_copies_are_warm_and_have_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "MAX_COPIES", 2)
    ours, peer = Portable("littlebit2:portable", torch.float32), Counting()
    sweep = Sweep(settings(), [Floor(1, 10.0, 10.0, {})])
    assert SMALL.packed.nbytes * 2 < sweep.settings.cold_bytes
    mine, other = sweep.measure(SMALL, [Case(1, "cold", [Entry(ours, 1), Entry(peer, 1)])])
    assert (mine.mode, mine.copies, mine.floor_fraction, mine.speedups) == ("warm", 2, None, {})
    assert (other.mode, other.copies) == ("cold", 2)
    assert sweep.mode("hot", 1) == "hot"
    # There the caches are flushed, however few the copies.
    assert Sweep(settings(device=torch.device("cuda"))).mode("cold", 1) == "cold"


def test_last_level_cache(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    for index, size in enumerate(("48K", "32K", "1024K", "32M", "what")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n", "utf-8")
    assert last_level_cache(tmp_path) == 32 * 2**20


def test_the_stream_of_the_floors_grows_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def timed(candidates: dict[str, Any], **_: Any) -> dict[str, Timing]:
        return dict.fromkeys(candidates, Timing((1.0,)))

    def empty(count: int, **_: Any) -> torch.Tensor:
        sizes.append(4 * count)
        return torch.zeros(2)

    monkeypatch.setattr(floors_module, "time_interleaved", timed)
    monkeypatch.setattr(torch, "empty", empty)
    for cold, expected in ((2**28, 2**29), (3 * 2**30, 3 * 2**30)):
        monkeypatch.setattr(floors_module, "default_cold_bytes", lambda device, cold=cold: cold)
        measure_floors([1], device=CPU, timer=CpuTimer(), dtypes=[])
        assert sizes.pop() == expected


def test_floors_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(candidates: dict[str, Any], **_: Any) -> dict[str, Timing]:
        for run in candidates.values():
            run()
        seconds = {"read sum float32": 1e-3, "copy": 4e-3}
        return {name: Timing((seconds.get(name, 2e-3),)) for name in candidates}

    monkeypatch.setattr(floors_module, "time_interleaved", timed)
    before = torch.get_num_threads()
    (floor,) = measure_floors(
        [1], device=CPU, timer=CpuTimer(), dtypes=[torch.float32, torch.bfloat16], nbytes=80_000, size=20
    )
    assert torch.get_num_threads() == before
    assert floor.read_gbs == pytest.approx(0.08)
    assert floor.copy_gbs == pytest.approx(0.04)
    assert floor.matmul_gmacs == {
        "float32": pytest.approx(8000 / 2e-3 / 1e9),
        "bfloat16": pytest.approx(8000 / 2e-3 / 1e9),
    }
    assert floor_fraction(8_000_000, 0.2, floor) == pytest.approx(0.5)
    table = floors_table([floor, Floor(0, 1.0, 1.0, {})]).splitlines()
    assert len(table) == 4
    assert "matmul bfloat16 GMAC/s" in table[0]
