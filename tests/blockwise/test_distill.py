"""The distillation of the whole model: what it starts from, goes on from, and is given."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from littlebit2 import load
from littlebit2.blockwise.tuning import block, distill
from littlebit2.blockwise.tuning.saved import SavedState
from littlebit2.blockwise.tuning.tune import tune
from littlebit2.integrations.modules import layers_of
from littlebit2.train.magnitudes import LATENTS, magnitudes, set_magnitudes
from littlebit2.train.model import packed_layers
from littlebit2.train.recipe.settings import Recipe
from littlebit2.train.recipe.student import build_student
from tests.blockwise.builders import run, write_data, write_model
from tests.offline.builders import contents

DISTILL: dict[str, Any] = {"samples": 40, "distill_steps": 40, "distill_lr": 2e-4, "distill_scale_lr": 1e-2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("distill")
    return write_model(folder / "dense"), write_data(folder / "text.txt")


def test_another_distillation_goes_on_from_the_finished_blocks(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    out = tmp_path / "out"
    plain = run(model, out, data, changes={**DISTILL, "distill_steps": 0}, keep_work=True)
    expected = run(model, tmp_path / "whole", data, changes=DISTILL)
    monkeypatch.setattr("littlebit2.blockwise.tuning.block.BlockRunner.run", None)  # no block is done again
    options = {"keep_work": True, "overwrite": True}
    found = run(model, out, data, changes=DISTILL, **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert found.perplexity == expected.perplexity
    assert found.perplexity["tuned"] == plain.final
    other = run(model, out, data, changes={**DISTILL, "distill_steps": 5}, **options)
    assert other.distillation["steps"] == 5
    assert other.perplexity["distilled"] != found.perplexity["distilled"]


def test_minutes_choose_its_steps(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    none = {**DISTILL, "distill_steps": 0}
    short = run(model, tmp_path / "a", data, changes={**none, "distill_minutes": 1e-9}, keep_work=True)
    assert short.distillation["steps"] == 1
    assert json.loads((tmp_path / "a.partial" / "chosen.json").read_text())["distill_steps"] == 1
    # With time in plenty, a few passes over the text.
    most = {**none, "distill_minutes": 1e6, "distill_samples": 12, "patience": 99}
    assert run(model, tmp_path / "b", data, changes=most).distillation["steps"] == 12
    assert run(model, tmp_path / "c", data, changes={**none, "distill_minutes": 0.0}).distillation is None


def test_it_is_left_out_where_the_blocks_take_the_time(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    monkeypatch.setattr("littlebit2.blockwise.tuning.minutes.LEAST", 3)
    monkeypatch.setattr("littlebit2.blockwise.tuning.minutes.MOST", 6)
    monkeypatch.setattr("littlebit2.blockwise.run.MOST", 6)
    options = {"keep_work": True, "overwrite": True}
    short = run(model, tmp_path / "a", data, changes={"minutes": 1e-9}, **options)
    assert short.distillation is None
    assert set(short.perplexity) == {"dense", "tuned"}
    assert json.loads((tmp_path / "a.partial" / "chosen.json").read_text())["distill_steps"] == 0
    # A run that goes on does not ask the clock again.
    monkeypatch.setattr("littlebit2.blockwise.run.is_worth_distilling", None)
    shutil.rmtree(tmp_path / "a")
    assert run(model, tmp_path / "a", data, changes={"minutes": 1e-9}, **options).distillation is None
    monkeypatch.undo()
    monkeypatch.setattr("littlebit2.blockwise.tuning.minutes.MOST", 6)
    monkeypatch.setattr("littlebit2.blockwise.run.MOST", 6)
    long = run(model, tmp_path / "b", data, changes={"minutes": 1e6, "distill_samples": 12})
    assert long.distillation["steps"] > 0


def test_few_steps_leave_signs_as_they_are(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    signs = []
    for name, steps in (("plain", 0), ("few", distill.SIGNS_FROM - 1), ("more", distill.SIGNS_FROM)):
        found = run(model, tmp_path / name, data, changes={**DISTILL, "distill_steps": steps})
        if found.distillation is not None:
            assert found.distillation["after"] < found.distillation["before"]
        layers = layers_of(load(tmp_path / name, backend="reference")).values()
        signs.append([path for layer in layers for path in layer.packed.paths])
    plain, few, more = signs
    assert all(torch.equal(a.u, b.u) and torch.equal(a.v, b.v) for a, b in zip(plain, few, strict=True))
    assert not all(torch.equal(a.in_scale, b.in_scale) for a, b in zip(plain, few, strict=True))
    assert not all(torch.equal(a.u, b.u) for a, b in zip(plain, more, strict=True))


def test_products_in_bfloat16(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    found, plain = (
        run(model, tmp_path / precision, data, changes={**DISTILL, "precision": precision})
        for precision in ("bfloat16", "float32")
    )
    entry = found.distillation
    assert entry["after"] < entry["before"]
    # The measure is in float32, of the dense model's own weights.
    assert entry["before"] == pytest.approx(plain.distillation["before"], rel=0.1)
    assert entry["after"] != plain.distillation["after"]
    assert found.perplexity["dense"] == plain.perplexity["dense"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_measured_precision_stays_that_of_the_run(
    finished: bool, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    out = tmp_path / "out"
    monkeypatch.setattr("littlebit2.blockwise.run.resolve_precision", lambda *_: "bfloat16")
    if not finished:
        monkeypatch.setattr("littlebit2.blockwise.run._Run.finish", _kill)
    with nullcontext() if finished else pytest.raises(_Killed):
        run(model, out, data)
    monkeypatch.undo()
    monkeypatch.setattr("littlebit2.blockwise.run.resolve_precision", lambda *_: "float32")
    assert run(model, out, data).settings["precision"] == "bfloat16"
    assert run(model, out, data, overwrite=True, resume=False).settings["precision"] == "float32"


def test_another_run_measures_its_own_precision(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    for seed, measured in enumerate(("bfloat16", "float32")):
        monkeypatch.setattr("littlebit2.blockwise.run.resolve_precision", lambda *_, found=measured: found)
        made = run(model, tmp_path / "out", data, changes={"seed": seed}, overwrite=True)
        assert made.settings["precision"] == measured


class _Killed(Exception):
    pass


def _kill(*_: Any) -> None:
    raise _Killed


def test_it_goes_on_from_its_saved_state(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    expected = run(model, tmp_path / "whole", data, changes=DISTILL)
    steps: list[int] = []
    loss = distill.Distillation.loss

    def counted(self: distill.Distillation, rows: Any) -> torch.Tensor:
        steps.append(len(rows))
        if len(steps) == 14:
            raise _Killed
        return loss(self, rows)

    monkeypatch.setattr(distill.Distillation, "loss", counted)
    with pytest.raises(_Killed):
        run(model, tmp_path / "out", data, changes=DISTILL)
    found = run(model, tmp_path / "out", data, changes=DISTILL)
    # A state is kept every fourth step; 13 steps were done.
    assert len(steps) == 14 + 40 - 12
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert found.distillation == expected.distillation


def test_it_starts_from_the_tuned_latents(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = inputs
    tuned: dict[str, torch.Tensor] = {}
    started: dict[str, torch.Tensor] = {}

    def kept(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        found = magnitudes(module, prefix)
        tuned.update(found)
        return found

    def given(module: torch.nn.Module, values: dict[str, torch.Tensor], prefix: str) -> None:
        set_magnitudes(module, values, prefix)
        started.update(magnitudes(module, prefix))

    monkeypatch.setattr(block, "magnitudes", kept)
    monkeypatch.setattr(distill, "set_magnitudes", given)
    run(model, tmp_path / "out", data, changes={**DISTILL, "distill_steps": 1})
    assert tuned
    assert tuned.keys() == started.keys()
    assert all(torch.equal(tuned[name], started[name]) for name in tuned)


def test_a_damaged_state_is_not_there(tmp_path: Path) -> None:
    saved = SavedState(tmp_path / "a.state")
    assert saved.load() is None
    saved.save({"done": 3, "state": [torch.ones(2)]})
    assert saved.done() == 3
    (tmp_path / "a.state").write_bytes((tmp_path / "a.state").read_bytes()[:100])
    assert saved.load() is None
    assert saved.done() == 0
    saved.remove()
    assert not list(tmp_path.iterdir())


def test_tuning_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def tuned(saved: SavedState | None, most: int) -> tuple[float, Any]:
        parameter = torch.nn.Parameter(torch.zeros(3))

        def loss(step: int) -> torch.Tensor:
            if step >= most:
                raise _Killed
            return (parameter - torch.tensor([1.0, 2.0, step / 7])).square().sum()

        found = tune(
            loss,
            lambda: float((parameter.detach() - 1).square().sum()),
            [([parameter], 0.1)],
            {},
            steps=24,
            warmup=0.1,
            evaluations=8,
            patience=8,
            saved=saved,
        )
        return parameter.tolist(), found

    saved = SavedState(tmp_path / "a.state")
    with pytest.raises(_Killed):
        tuned(saved, 17)
    assert saved.done() == 15
    assert tuned(saved, 24) == tuned(None, 24)


@pytest.mark.parametrize("steps", [0, 3])
def test_training_goes_on_from_kept_latents(steps: int, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    out = tmp_path / "out"
    changes = {**DISTILL, "distill_steps": steps}
    plain = run(model, out, data, changes=changes, keep_work=True)
    without = magnitudes(build_student(model, out, Recipe(dense="norms")))
    # The same run with them, which finds everything else finished.
    options = {"keep_latents": True, "keep_work": True, "overwrite": True}
    assert run(model, out, data, changes=changes, **options).perplexity == plain.perplexity
    kept = {name: value for path in (out / LATENTS).iterdir() for name, value in load_file(path).items()}
    student = build_student(model, out, Recipe(dense="norms"))
    found = magnitudes(student)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in found)
    assert any(not torch.equal(found[name], without[name]) for name in found)
    # Signs are those of the checkpoint.
    packed = layers_of(load(out, backend="reference"))
    for name, layer in packed_layers(student):
        for one, other in zip(layer.paths, packed[name].packed.paths, strict=True):
            assert torch.equal(one.u, other.u)
            assert torch.equal(one.v, other.v)


def test_latents_of_another_shape_are_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = inputs
    run(model, tmp_path / "out", data, keep_latents=True)
    file = tmp_path / "out" / "latents" / "latents-0000.safetensors"
    values = load_file(file)
    name = next(iter(values))
    save_file({**values, name: torch.zeros(1, 1, dtype=torch.float16)}, file)
    with pytest.raises(ValueError, match=rf"latent {name} must have shape .* got \[1, 1\]"):
        build_student(model, tmp_path / "out", Recipe(dense="norms"))
