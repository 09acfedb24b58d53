"""Whole models by steps, and what they are predicted to take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.estimates.predict import RATES
from benchmarks.estimates.predict_models import main as predict_main
from benchmarks.estimates.predict_models import predict_group, predict_model
from benchmarks.models.llama import LLAMA_SHAPES, linear_macs
from benchmarks.models.model_steps import main

SMALL = ["--shape", "tiny", "--device", "cpu", "--prompt", "5", "--tokens", "3", "--repetitions", "2"]


def test_every_model_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    arguments = [*SMALL, "--bpw", "0.5", "1", "--unfused", "--steps", "eager", "graph", "--dtype", "bfloat16"]
    assert main([*arguments, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    models = [
        "packed 0.5 bpw",
        "packed 0.5 bpw, unfused",
        "packed 1 bpw",
        "packed 1 bpw, unfused",
        "dense bfloat16",
    ]
    assert list(rows) == [f"{model}, eager" for model in models]
    assert list(content["unavailable"]) == [f"{model}, graph" for model in models]
    assert "needs a model on a CUDA device" in content["unavailable"]["dense bfloat16, graph"]
    for row in rows.values():
        assert (len(row["samples"]), len(row["prefill"])) == (2, 2)
        assert min(row["samples"]) > 0
        assert set(row["speedups"]) == (set() if row["bpw"] is None else {"dense bfloat16, eager"})
    sizes = [rows[f"{model}, eager"]["weight_bytes"] for model in models]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < sizes[4]
    printed = capsys.readouterr().out
    assert "| packed 0.5 bpw, unfused | eager" in printed


def test_without_anything_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--bpw", "1", "--steps", "graph", "--no-dense"]) == 1
    assert "packed 1 bpw, graph: ValueError" in capsys.readouterr().err


def test_prediction_of_a_group() -> None:
    layers = [(4096, [144, 144]), (1024, [80])]
    together = predict_group(4096, layers, "H200")
    alone = [predict_group(4096, [layer], "H200") for layer in layers]
    assert (together.launches, [one.launches for one in alone]) == (2, [2, 2])
    assert together.nbytes == sum(one.nbytes for one in alone)
    assert together.seconds < sum(one.seconds for one in alone)
    words = (144 * 2 + 80) * 128 + 4096 * 5 * 2 + 1024 * 3
    assert together.nbytes == 4 * (words + 3 * 4096 + 2 * (144 + 4096) + 80 + 1024)
    with pytest.raises(ValueError, match="gpu must be one of A100, 4090, H100, H200, got 'B200'"):
        predict_group(4096, layers, "B200")


def test_prediction_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    shape = LLAMA_SHAPES["llama3-8b"]
    fused, alone = (predict_model(shape, 0.1, "A100", fused=fused) for fused in (True, False))
    assert (fused.launches, alone.launches) == (32 * 4 * 2, 32 * 7 * 2)
    assert fused.nbytes == alone.nbytes
    assert fused.seconds < alone.seconds
    macs = 32 * 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    assert linear_macs(shape, 32) == macs
    assert fused.dense_seconds == 2 * macs / RATES["A100"].memory
    assert predict_main(["--shapes", "llama2-7b", "--bpw", "1"]) == 0
    assert "| H200 | llama2-7b | 1 " in capsys.readouterr().out
