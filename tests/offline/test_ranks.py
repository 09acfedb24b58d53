"""Ranks that depend on the weights, and importance, in the streamed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from littlebit2.checkpoint import open_checkpoint
from littlebit2.disk import RunError
from littlebit2.offline import pipeline, quantize_checkpoint, ranks
from littlebit2.quantize import Importance, QuantConfig
from tests.offline.builders import contents

SPECTRAL = QuantConfig(bpw=3.0, budget="spectral", method="joint-itq", paths=1, itq_iterations=2)
LAYER = "model.layers.0.mlp.up_proj"


def run(model_dir: Path, out: Path, config: QuantConfig = SPECTRAL, **options: object):
    return quantize_checkpoint(model_dir, out, config, **{"workers": 1, "progress": False, **options})


def test_bits_follow_the_spectra_within_the_budget(model_dir: Path, tmp_path: Path) -> None:
    uniform = run(model_dir, tmp_path / "uniform", QuantConfig(bpw=3.0, method="joint-itq", paths=1))
    report = run(model_dir, tmp_path / "out")
    assert report.totals()["counted_bpw"] <= uniform.totals()["counted_bpw"]
    assert [layer["ranks"] for layer in report.layers] != [layer["ranks"] for layer in uniform.layers]
    assert all(0 < layer["predicted_error"] < 1 for layer in report.layers)
    assert "mean_predicted_error" in report.totals()
    assert "mean_predicted_error" not in uniform.totals()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert [list(spec.shape.ranks or ()) for spec in checkpoint.layers.values()] == [
            layer["ranks"] for layer in report.layers
        ]
    run(model_dir, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_energy_decides_ranks(model_dir: Path, tmp_path: Path) -> None:
    few, many = (
        run(model_dir, tmp_path / str(energy), QuantConfig(energy=energy, method="dual-svid", paths=1))
        for energy in (0.5, 0.95)
    )
    for less, more in zip(few.layers, many.layers, strict=True):
        assert less["ranks"] < more["ranks"]


def test_a_run_that_goes_on_does_not_measure_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model_dir, tmp_path / "whole")

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_together", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            run(model_dir, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "spectrum_of", fail)
        run(model_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_importance_reaches_its_layers_and_is_part_of_the_settings(
    model_dir: Path, tmp_path: Path, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = {LAYER: Importance(torch.rand(32, generator=rng))}
    config = QuantConfig(ranks=(8,), method="dual-svid")
    report = run(model_dir, tmp_path / "out", config, importance=importance)
    weighted = {layer["name"] for layer in report.layers if layer["weighted_error"] is not None}
    assert weighted == {LAYER}
    assert report.settings["importance"] is not None

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_together", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            run(model_dir, tmp_path / "other", config, importance=importance)
    with pytest.raises(RunError, match="holds a run with other settings: importance = "):
        run(model_dir, tmp_path / "other", config)


def test_importance_of_no_layer_is_an_error(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"importance must hold at least one selected layer, such as 'model"):
        run(model_dir, tmp_path / "out", importance={"a": Importance(torch.ones(3))})
    with pytest.raises(TypeError, match="importance must be a mapping by module name, got list"):
        run(model_dir, tmp_path / "out", importance=[])


def test_a_layer_that_cannot_be_measured_is_named(model_dir: Path, tmp_path: Path) -> None:
    importance = {LAYER: Importance(torch.ones(3))}
    with pytest.raises(ValueError, match=rf"layer '{LAYER}': importance\.inputs must have shape \[32\]"):
        run(model_dir, tmp_path / "out", importance=importance)
