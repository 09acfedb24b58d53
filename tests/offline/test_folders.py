"""Whose folders a run takes, clears and removes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from littlebit2.architecture.parts import Whole
from littlebit2.architecture.tensors import LayerSource
from littlebit2.disk import RunError
from littlebit2.offline import quantize_checkpoint
from littlebit2.offline.jobs import Job
from littlebit2.offline.work import WorkDirectory
from littlebit2.offline.workers import run_jobs
from littlebit2.quantize import QuantConfig, quantize_weight
from tests.offline.builders import QUICK, contents


def run(model_dir: Path, out: Path, **options: object):
    return quantize_checkpoint(
        model_dir, out, QuantConfig(**QUICK), **{"workers": 1, "progress": False, **options}
    )


def jobs(count: int) -> list[Job]:
    config = QuantConfig(ranks=(8,), method="dual-svid", seed=1)
    return [Job(i, LayerSource(f"a{i}", 16, 16, Whole(f"a{i}.weight"), None), config) for i in range(count)]


def test_a_folder_of_the_user_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    mine = tmp_path / "q.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    for resume in (True, False):
        with pytest.raises(RunError, match=r"q\.partial must be .* got a folder with thesis\.tex"):
            run(model_dir, tmp_path / "q", resume=resume)
    assert contents(mine) == {"thesis.tex": b"mine"}


def test_the_work_folder_lies_apart_from_the_model(model_dir: Path, tmp_path: Path) -> None:
    source = model_dir.rename(tmp_path / "w.partial")
    before = contents(source)
    with pytest.raises(ValueError, match=r"out must lie apart from the model, .*model_dir=.*w\.partial"):
        run(source, tmp_path / "w")
    assert contents(source) == before
    assert not (tmp_path / "w").exists()


def test_a_finished_run_leaves_the_folder_of_another_one(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = run(model_dir, out).settings
    other = WorkDirectory(out, {"bpw": 0.3})
    other.open(resume=True)
    layer = other.path / "000000.safetensors"
    layer.write_bytes(b"hours of work")
    assert run(model_dir, out).settings == settings  # while the other one lives
    assert layer.exists()
    other.close()
    assert run(model_dir, out).settings == settings  # after it was interrupted
    assert layer.exists()
    other.take()
    other.remove()
    own = WorkDirectory(out, settings)
    own.open(resume=True)
    own.close()
    run(model_dir, out)
    assert not own.path.exists()


def test_a_change_anywhere_in_the_source_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    first = run(model_dir, tmp_path / "out").settings
    file = model_dir / "model-00001-of-00002.safetensors"
    raw, at = bytearray(file.read_bytes()), -1500  # in the middle of a tensor
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FileExistsError, match="is not the finished result of this command"):
        run(model_dir, tmp_path / "out")
    changed = run(model_dir, tmp_path / "out", overwrite=True).settings
    assert {name for name in first if first[name] != changed[name]} == {"source"}


@pytest.mark.parametrize("how", ["removed", "cut", "no configuration"])
def test_a_report_without_its_files_is_not_a_finished_run(model_dir: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    run(model_dir, out)
    weights = out / "model.safetensors"
    if how == "removed":
        weights.unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        (out / "config.json").unlink()
    with pytest.raises(FileExistsError, match="is not the finished result of this command"):
        run(model_dir, out)


def test_layers_of_other_settings_are_not_finished(tmp_path: Path, rng: torch.Generator) -> None:
    (job,) = jobs(1)
    packed = quantize_weight(torch.randn(16, 16, generator=rng), config=job.config).packed
    first, second = (WorkDirectory(tmp_path / "out", {"method": method}) for method in "ab")
    first.open(resume=True)
    first.write_layer(job, packed, {}, 0.0)
    assert first.finished(job) == ({}, 0.0)
    assert second.finished(job) is None


def test_nothing_is_written_into_a_closed_folder(tmp_path: Path, rng: torch.Generator) -> None:
    (job,) = jobs(1)
    packed = quantize_weight(torch.randn(16, 16, generator=rng), config=job.config).packed
    work = WorkDirectory(tmp_path / "out", {})
    work.open(resume=True)
    work.close()
    with pytest.raises(RunError, match=r"out\.partial must be open to write a0"):
        work.write_layer(job, packed, {}, 0.0)
    assert not work.layer_path(job).exists()


def test_an_interrupt_waits_for_the_layers_in_work() -> None:
    interrupted = threading.Event()
    begun, ended = [], []

    def do(batch: Sequence[Job]) -> None:
        begun.append(batch[0].index)
        if batch[0].index:
            interrupted.wait()
            time.sleep(0.2)
        ended.append(batch[0].index)

    def done(batch: Sequence[Job]) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([(job,) for job in jobs(2)], do, done, workers=2, threads=1)
    assert sorted(begun) == sorted(ended)
