from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.layers import triton_tuning
from benchmarks.problems import Problem
from benchmarks.shapes import SHAPES
from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.testing import make_packed
from littlebit2_kernels.triton.configs import load_table, store_table
from littlebit2_kernels.triton.plan import (
    DecodeConfig,
    GemmConfig,
    GemvConfig,
    Method,
    StageShape,
    choose_method,
    fits_shared,
    stage_config,
)

GPU = GPUS["H200"]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "method",
    [Method("gemv", "exact"), Method("gemm", "float16"), Method("gemm", "int8"), Method("xnor", "sign")],
)
def test_the_curated_sets_are_small_and_begin_with_the_default(method: Method, last: bool) -> None:
    shape = StageShape((1024, 1024), (4096, 4096), last)
    found = list(triton_tuning.curated(method, shape, 64, GPU))
    assert found[0] == stage_config(method, shape, 64, GPU)
    assert len(set(found)) == len(found) <= 30
    for config in found:
        assert not last or config.splits == 1
        if isinstance(config, GemmConfig):
            assert fits_shared(method.kind, config, GPU)


def test_the_best_is_stored_and_so_is_a_default_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(SHAPES["llama2-7b-qo"], 0.1, 2, torch.device("cpu"))

    def measure(method: Method, problem: Problem, tokens: int, last: bool, config: Any) -> float:
        if isinstance(config, DecodeConfig):
            return float(config.launches)
        return 1.0 if last and isinstance(config, GemmConfig) and config.num_warps == 8 else 2.0

    entries = triton_tuning.tune([problem], [1, 64], ["auto"], GPU, measure)
    assert [(kernel, shape.last, tokens) for kernel, shape, tokens, _ in entries] == [
        ("decode", True, 1),
        ("gemv", False, 1),
        ("gemv", True, 1),
        ("gemm float16", False, 64),
        ("gemm float16", True, 64),
    ]
    for (kernel, shape, tokens, config), better in zip(
        entries, (True, False, False, False, True), strict=True
    ):
        if kernel == "decode":
            assert config == DecodeConfig(1)
            continue
        default = stage_config(Method(kernel.split()[0], "float16"), shape, tokens, GPU)
        assert (config != default) == better
    store_table("GPU", entries)
    stored = load_table("GPU")
    assert len(stored) == 5
    assert stored[-1]["config"]["num_warps"] == 8
    only = triton_tuning.tune([problem], [1], ["auto"], GPU, measure, ["decode"])
    assert [kernel for kernel, *_ in only] == ["decode"]


@pytest.mark.parametrize(
    ("tokens", "last", "config"),
    [
        (1, False, GemvConfig(64, 8, 2, 4)),
        (1, True, GemvConfig(128, 8, 1, 4)),
        (1, True, DecodeConfig(1)),
        (1, True, DecodeConfig(2)),
        (64, True, GemmConfig(128, 32, 1, 8, 2, 1)),
    ],
    ids=str,
)
def test_what_is_measured_is_what_was_chosen(
    monkeypatch: pytest.MonkeyPatch, tokens: int, last: bool, config: Any
) -> None:
    pytest.importorskip("triton")
    from littlebit2_kernels.triton import forward as calls
    from littlebit2_kernels.triton import fused, gemm, gemv, operand

    launched = []

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.fn.__name__

        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **options: launched.append((self.name, options))

    for module in (fused, gemm, gemv, operand):
        monkeypatch.setattr(module, "wrap_triton", Launcher)
    packed = make_packed(512, 512, [32]).to("meta")
    layer = calls.Layer(*(tensors or [] for tensors in packed.operands))
    x = torch.empty(tokens, 512, dtype=torch.float16, device="meta")
    method = choose_method(tokens, "auto", float32=False)
    with triton_tuning.chosen(last, config):
        calls.forward(x, layer, None, x.new_empty(tokens, 512), method)
    if isinstance(config, DecodeConfig):
        names = ["fused_kernel"] if config.launches == 1 else ["gemv_kernel"] * 2
        assert [name for name, _ in launched] == names
        return
    (options,) = [options for _, options in launched if options.get("LAST") == last]
    assert options["BLOCK_ROWS"] == config.block_rows
    assert options["num_warps"] == config.num_warps


def test_dry_run_counts_and_without_a_gpu_nothing_is_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tune-triton", "--shapes", "llama2-7b-qo", "--bpw", "0.1", "--tokens", "1", "64"]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" measurements")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 2
    assert "device 'cuda' cannot be used: torch finds no usable GPU" in capsys.readouterr().err
