"""What calls do, by pure functions: methods, configurations, the backend; no GPU, no Triton."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from littlebit2_kernels import BackendUnavailableError, dispatch, explain
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.gpu import GPUS, GpuProperties, gpu_properties
from littlebit2_kernels.testing import make_packed
from littlebit2_kernels.triton import backend as triton_backend
from littlebit2_kernels.triton import plan
from littlebit2_kernels.triton.plan import (
    StageShape,
    choose_method,
    decode_config,
    fused_config,
    gemm_config,
    gemv_config,
    xnor_config,
)
from littlebit2_kernels.warming import WARMUP_TOKENS

AMD = GpuProperties(94, 304, 65536, 64, "amd")
#: AMD's GPUs for desktops have warps of 32 lanes.
RDNA = GpuProperties(103, 60, 65536, 32, "amd")


@pytest.mark.parametrize(
    ("tokens", "activation", "float32", "expected"),
    [
        (1, "auto", False, ("gemv", "exact")),
        (4, "auto", True, ("gemv", "exact")),
        (5, "auto", True, ("gemm", "exact")),
        (5, "auto", False, ("gemm", "float16")),
        (5, "exact", False, ("gemm", "exact")),
        (1, "float16", False, ("gemm", "float16")),
        (1, "int8", True, ("gemm", "int8")),
        (8, "sign", True, ("xnor", "sign")),
        (9, "sign", True, ("gemm", "sign")),
    ],
)
def test_methods(tokens: int, activation: str, float32: bool, expected: tuple[str, str]) -> None:
    method = choose_method(tokens, activation, float32)
    assert (method.kernel, method.activation) == expected
    assert method.kind in plan.CHUNK_WORDS


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(
        ValueError, match="activation must be one of auto, exact, float16, int8, sign, got 'int4'"
    ):
        choose_method(1, "int4", float32=False)


def stages() -> list[StageShape]:
    sizes = (8, 80, 592, 1024, 4096, 11008, 28672)
    return [
        StageShape((rows,) * paths, (cols,) * paths, last)
        for rows in sizes
        for cols in sizes
        for paths in (1, 2)
        for last in (False, True)
    ]


@pytest.mark.parametrize("gpu", [*GPUS.values(), AMD, RDNA, plan.DEFAULT_GPU], ids=str)
def test_configurations_are_valid_for_every_shape(gpu: GpuProperties) -> None:
    for shape in stages():
        gemv = gemv_config(shape, gpu)
        assert gemv.block_rows * gemv.block_words <= 1024
        assert gemv.block_rows >= 16
        # Else the bits of a word lie across lanes, which costs five shuffles for each.
        assert gemv.block_rows * gemv.block_words >= gemv.num_warps * gpu.warp_lanes
        assert 1 <= gemv.splits <= max(1, -(-shape.words // gemv.block_words))
        assert not shape.last or gemv.splits == 1
        for kind in ("float16", "exact", "int8", "sign"):
            for tokens in (1, 16, 17, 100, 4096):
                gemm = gemm_config(kind, shape, tokens, gpu)
                assert gemm.block_tokens in (16, 32, 64, 128)
                assert gemm.block_tokens < 2 * max(tokens, 16)
                assert not shape.last or gemm.splits == 1
                assert shared_bytes(kind, gemm) <= gpu.shared_bytes
                assert gemm.splits <= -(-shape.words // plan.CHUNK_WORDS[kind])
        assert xnor_config(shape, gpu).splits >= 1


def shared_bytes(kind: str, config: plan.GemmConfig) -> int:
    """Of the loads in flight: a chunk of signs, and its activations or those of one step."""
    element_bytes, terms = (1 if kind in ("int8", "sign") else 2), (2 if kind == "exact" else 1)
    columns = 32 * plan.CHUNK_WORDS[kind] * config.unroll // (8 * element_bytes)
    signs = 4 * plan.CHUNK_WORDS[kind] * config.block_rows
    return config.num_stages * (columns * config.block_tokens * element_bytes * terms + signs)


def test_bits_of_the_gemv_depend_on_layer_and_gpu_alone() -> None:
    asked = []

    def lookup(kernel: str, shape: StageShape, tokens: int) -> None:
        asked.append((kernel, tokens))

    gemv_config(StageShape((592,), (8192,), last=False), GPUS["H200"], lookup)
    assert asked == [("gemv", 1)]


def test_few_rows_are_split_until_the_gpu_is_busy() -> None:
    shape = StageShape((80, 80), (8192, 8192), last=False)
    config = gemv_config(shape, GPUS["H200"])
    assert config.splits == 8
    wide = StageShape((28672, 28672), (8192, 8192), last=False)
    assert gemv_config(wide, GPUS["H200"]).splits == 1
    assert gemm_config("float16", shape, 16, GPUS["H200"]).splits > 1
    assert gemm_config("float16", shape, 65536, GPUS["H200"]).splits == 1


def test_numbers_of_tokens_fall_into_few_classes() -> None:
    """Each is a graph of its own to torch.compile, which makes eight of a function at most."""
    shape = StageShape((80, 80), (28672, 28672), last=False)
    for gpu in (*GPUS.values(), AMD):
        for float32, activation in ((False, "auto"), (True, "auto"), (False, "int8"), (False, "sign")):
            classes = set()
            for tokens in range(1, 5000):
                method = choose_method(tokens, activation, float32)
                classes.add((method, plan.stage_config(method, shape, tokens, gpu)))
            assert len(classes) <= 7


@pytest.mark.parametrize("gpu", [*GPUS.values(), AMD], ids=str)
def test_warm_up_reaches_every_configuration(gpu: GpuProperties) -> None:
    for shape in stages():
        for float32, activation in ((False, "auto"), (True, "auto"), (False, "int8"), (False, "sign")):

            def found(counts: Iterable[int], *call: Any) -> set[Any]:
                methods = [(tokens, choose_method(tokens, *call[1:])) for tokens in counts]
                return {
                    (method, plan.stage_config(method, call[0], tokens, gpu)) for tokens, method in methods
                }

            call = shape, activation, float32
            missed = found([*range(1, 140), 512, 513, 4096], *call) - found(WARMUP_TOKENS, *call)
            assert not missed


def layer_stages(k: int, n: int, ranks: list[int]) -> tuple[StageShape, StageShape]:
    count = len(ranks)
    return StageShape(tuple(ranks), (k,) * count, last=False), StageShape(
        (n,) * count, tuple(ranks), last=True
    )


def test_one_launch_is_planned_where_its_work_costs_less_than_a_launch() -> None:
    gpu = GPUS["H200"]
    for k, n, ranks, count in (
        (1024, 1024, [8, 8], 1),
        (1024, 1024, [32, 32], 1),
        (1024, 1024, [40, 40], 2),  # two words for each latent vector
        (2048, 2048, [32], 1),
        (384, 1536, [80], 1),
        (384, 100000, [80], 2),  # many programs, one after another
        (4096, 4096, [80, 80], 2),
        (4096, 1024, [24, 24], 2),
        (8192, 28672, [296, 296], 2),
    ):
        stages = layer_stages(k, n, ranks)
        assert decode_config(*stages, gpu).launches == count, (k, n, ranks)
        assert (fused_config(*stages, gpu) is None) == (count == 2)


def test_a_thread_has_as_many_words_in_one_launch_as_in_two() -> None:
    for gpu in (*GPUS.values(), AMD):
        for k, n, ranks in ((1024, 1024, [32, 32]), (384, 1536, [80]), (2048, 2048, [16]), (100, 64, [8])):
            first, last = layer_stages(k, n, ranks)
            both = fused_config(
                first, last, gpu, lambda kernel, *_: {"launches": 1} if kernel == "decode" else None
            )
            assert both is not None
            own, other = gemv_config(first, gpu), gemv_config(last, gpu)
            assert (both.col_words, both.splits, both.rank_words) == (
                own.block_words,
                own.splits,
                other.block_words,
            )
            assert 32 / both.num_warps == own.block_rows / own.num_warps
            assert both.block_rows / both.num_warps == other.block_rows / other.num_warps
            assert both.num_warps * gpu.warp_lanes <= 1024


def test_more_paths_than_slots_take_two_launches_whatever_is_tuned() -> None:
    stages = layer_stages(64, 64, [8] * 5)
    assert fused_config(*stages, GPUS["H200"], lambda *_: {"launches": 1}) is None


def test_blackwell_keeps_a_loop_of_steps_and_ampere_small_blocks() -> None:
    shape = StageShape((28672,), (592,), last=True)
    assert gemm_config("float16", shape, 512, GPUS["B200"]).unroll == 1
    assert gemm_config("int8", shape, 512, GPUS["B200"]).unroll == 8
    assert gemm_config("float16", shape, 512, GPUS["H200"]) == plan.GemmConfig(64, 128, 1, 4, 3, 16)
    assert gemm_config("float16", shape, 512, GPUS["A100"]).block_tokens == 64
    assert gemm_config("exact", shape, 512, GPUS["A100"]).block_tokens == 32
    assert gemm_config("float16", shape, 512, AMD).block_tokens < 64
    # The number of Blackwell, which has tensor memory.
    assert gemm_config("float16", shape, 512, GPUS["B200"]).unroll == 1
    assert gemm_config("float16", shape, 512, RDNA).unroll == 16


@pytest.mark.parametrize(("version", "maker", "generation"), [(None, "nvidia", 9), ("7.0", "amd", 0)])
def test_makers_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, version: str | None, maker: str, generation: int
) -> None:
    found = SimpleNamespace(
        major=9, minor=0, multi_processor_count=104, shared_memory_per_block=65536, warp_size=64
    )
    monkeypatch.setattr(torch.version, "hip", version)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    gpu = gpu_properties(torch.device("cuda", 0))
    assert gpu == GpuProperties(90, 104, 65536, 64, maker)
    assert gpu.generation == generation


def test_launches_of_a_layer() -> None:
    first = StageShape((80, 80), (4096, 4096), last=False)
    last = StageShape((4096,) * 2, (80,) * 2, last=True)
    gpu = GPUS["H200"]
    assert [name for name, _ in plan.layer_launches(plan.Method("gemv", "exact"), first, last, 1, gpu)] == [
        "gemv",
        "gemv",
    ]
    names = [name for name, _ in plan.layer_launches(plan.Method("gemm", "int8"), first, last, 9, gpu)]
    assert names == ["operand", "gemm", "operand", "gemm"]
    small = layer_stages(1024, 1024, [32, 32])
    launches = plan.layer_launches(plan.Method("gemv", "exact"), *small, 1, gpu)
    assert launches == [("fused", fused_config(*small, gpu))]
    many = StageShape((4096,) * 6, (80,) * 6, last=True)
    assert len(plan.layer_launches(plan.Method("gemv", "exact"), None, many, 1, gpu)) == 2


def test_paths_that_pass_the_same_tensors_share_a_first_stage() -> None:
    a, b, c = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    assert plan.distinct_first_stages([a, a, b, a], [c, c, c, b]) == [0, 0, 2, 3]


# --- the backend -------------------------------------------------------------------------------------


@pytest.fixture
def reasons(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why neither backend can run, to be changed by the test."""
    found: dict[str, str | None] = {"cuda": "no nvcc", "triton": "no triton"}
    monkeypatch.setattr(dispatch, "no_cuda_reason", lambda: found["cuda"])
    monkeypatch.setattr(dispatch, "no_triton_reason", lambda device_type: found["triton"])
    return found


def chosen(
    backend: str, device_type: str, tokens: int = 1, activation: str = "auto", compiling: bool = False
) -> str:
    shape = LayerShape(512, 512, (64,))
    device = torch.device(device_type)
    call = dispatch.Call(shape, tokens, torch.float16, device, backend, activation, compiling=compiling)
    return dispatch.choose(call).backend


def test_auto_takes_cuda_then_triton_then_says_what_is_missing(reasons: dict[str, str | None]) -> None:
    with pytest.raises(BackendUnavailableError, match=r"cuda: no nvcc; triton: no triton\. Move the layer"):
        chosen("auto", "cuda")
    reasons["triton"] = None
    assert chosen("auto", "cuda") == "triton"
    reasons["cuda"] = None
    assert chosen("auto", "cuda") == "cuda"
    assert chosen("triton", "cuda") == "triton"
    assert chosen("auto", "cpu") == "cpu"
    reasons["triton"] = "no triton"
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run: no triton"):
        chosen("triton", "cuda")


def test_auto_compares_estimates_for_many_tokens(
    reasons: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons.update(cuda=None, triton=None)
    few = dispatch.FEW_TOKENS

    for best in ("blas", "cuda", "triton"):
        monkeypatch.setattr(dispatch, "prefill_backend", lambda *_, best=best: best)
        assert (chosen("auto", "cuda", few), chosen("auto", "cuda", few + 1)) == ("cuda", best)
        # A mode that is named is the same bits for any number of tokens; a backend that is named is that one;
        # and what is compiled is one graph for every number of tokens.
        assert chosen("auto", "cuda", few + 1, activation="exact") == "cuda"
        assert chosen("cuda", "cuda", few + 1) == "cuda"
        assert chosen("triton", "cuda", few + 1) == "triton"
        assert chosen("auto", "cuda", few + 1, compiling=True) == "cuda"
    assert chosen("auto", "cpu", few + 1) == "cpu"
    reasons["triton"] = "no triton"
    assert chosen("auto", "cuda", few + 1) == "cuda"
    monkeypatch.setattr(dispatch, "prefill_backend", lambda *_: "blas")
    assert chosen("auto", "cuda", few + 1) == "blas"
    # It dequantizes by a CUDA kernel.
    reasons.update(cuda="no nvcc", triton=None)
    assert chosen("auto", "cuda", few + 1) == "triton"
    with pytest.raises(BackendUnavailableError, match="backend='blas' cannot run: no nvcc"):
        chosen("blas", "cuda", few + 1)


def test_one_choice_for_several_layers(
    reasons: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons.update(cuda=None, triton=None)
    small, large = LayerShape(512, 512, (64,)), LayerShape(512, 4096, (64,))
    monkeypatch.setattr(dispatch, "prefill_backend", lambda shape, *_: "cuda" if shape == small else "blas")
    call = dispatch.Call(small, 17, torch.float16, torch.device("cuda"))
    found = [dispatch.choose_for_all(call, shapes) for shapes in ([small, small], [small, large])]
    assert found == [dispatch.choose(call), None]
    few = dispatch.choose_for_all(call._replace(tokens=16), [small, large])
    assert few is not None
    assert few.backend == "cuda"
    named = dispatch.choose_for_all(call._replace(backend="cuda"), [small, large])
    assert named is not None
    assert named.reason == "asked for by name ('cuda')"
    call = call._replace(device=torch.device("cpu"))
    assert dispatch.choose_for_all(call, [small, large]) == dispatch.choose(call)


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({}, "exact"),
        # The plan of the call resolves it: with AMX kernels it depends on the tokens.
        ({"prepacked": True}, "auto"),
        ({"prepacked": True, "dtype": torch.float32}, "auto"),
        ({"prepacked": True, "activation": "sign"}, "sign"),
        ({"prepacked": True, "compiling": True}, "auto"),
        ({"backend": "reference"}, "exact"),
        ({"backend": "blas"}, "auto"),
    ],
    ids=str,
)
def test_auto_is_resolved_on_the_cpu(options: dict[str, Any], activation: str) -> None:
    call = dispatch.Call(LayerShape(64, 64, (8,)), 100, torch.bfloat16, torch.device("cpu"))
    assert dispatch.choose(call._replace(**options)).activation == activation


def test_reasons_say_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    reason = triton_backend.no_triton_reason("cuda")
    assert reason is not None
    assert "triton is not installed" in reason
    assert "pip install" in reason
    monkeypatch.setattr(triton_backend, "_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "not on cpu" in str(triton_backend.no_triton_reason("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.no_triton_reason("cpu") is None
    assert triton_backend.no_triton_reason("meta") is None
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without CUDA or ROCm" in str(triton_backend.no_triton_reason("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_backend.no_triton_reason("cuda") == "torch finds no usable GPU or driver"


def test_explain_names_kernel_and_configuration() -> None:
    packed = make_packed(4096, 11008, [80, 80], bias=True)
    found = explain((1, 4096), packed, "triton", dtype=torch.float16, gpu="H200")
    assert (found.backend, found.kernels, found.activation) == ("triton", "gemv", "exact")
    assert (found.first_stages, found.gpu) == (2, GPUS["H200"])
    assert [launch.kernel for launch in found.launches] == ["gemv", "gemv"]
    assert found.launches[0].config["splits"] > 1
    assert "launch 1" in str(found)
    assert "block_words" in str(found)
    small = explain((1, 1024), make_packed(1024, 1024, [32]), "triton", dtype=torch.float16, gpu="H200")
    assert (small.kernels, small.activation) == ("fused", "exact")
    assert [launch.kernel for launch in small.launches] == ["fused"]
    prompt = explain((512, 4096), packed, "triton", "int8", gpu="H200")
    assert (prompt.kernels, prompt.activation) == ("gemm", "int8")
    assert [launch.kernel for launch in prompt.launches] == ["operand", "gemm"] * 2
    with pytest.raises(
        ValueError, match="backend must be 'auto', 'blas', 'cuda' or 'triton' where gpu is given"
    ):
        explain((1, 4096), packed, "cpu", gpu="H200")
    with pytest.raises(ValueError, match="activation='int16' is not served by backend='triton'"):
        explain((1, 4096), packed, "triton", "int16", gpu="H200")
