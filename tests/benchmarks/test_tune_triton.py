from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune_triton
from benchmarks.problems import SHAPES, Problem
from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.triton.configs import load_table, store_table
from littlebit2_kernels.triton.plan import GemmConfig, Method, StageShape, fits_shared, stage_config

GPU = GPUS["H200"]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "method",
    [Method("gemv", "exact"), Method("gemm", "float16"), Method("gemm", "int8"), Method("xnor", "sign")],
)
def test_the_curated_sets_are_small_and_begin_with_the_default(method: Method, last: bool) -> None:
    shape = StageShape((1024, 1024), (4096, 4096), last)
    found = list(tune_triton.curated(method, shape, 64, GPU))
    assert found[0] == stage_config(method, shape, 64, GPU)
    assert len(set(found)) == len(found) <= 30
    for config in found:
        assert not last or config.splits == 1
        if isinstance(config, GemmConfig):
            assert fits_shared(method.kind, config, GPU)


def test_what_beats_the_default_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(SHAPES["llama2-7b-qo"], 0.1, 2, torch.device("cpu"))

    def measure(method: Method, problem: Problem, tokens: int, last: bool, config: Any) -> float:
        return 1.0 if last and isinstance(config, GemmConfig) and config.num_warps == 8 else 2.0

    entries = tune_triton.tune([problem], [1, 64], ["auto"], GPU, measure)
    assert [(kernel, shape.last, tokens) for kernel, shape, tokens, _ in entries] == [
        ("gemm float16", True, 64)
    ]
    store_table("GPU", entries)
    assert load_table("GPU")[0]["config"]["num_warps"] == 8


def test_dry_run_counts_and_without_a_gpu_nothing_is_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--shapes", "llama2-7b-qo", "--bpw", "0.1", "--tokens", "1", "64"]
    assert tune_triton.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" measurements")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune_triton.main(arguments)
    assert "there is no GPU to tune for" in capsys.readouterr().err
