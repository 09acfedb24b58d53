"""Directories that appear whole or not at all, and what may be replaced by them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from littlebit2.disk import StagedDirectory, check_apart, check_replaceable, locks, move_into_place


def checkpoint(path: Path, text: str = "old") -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    (path / "model.safetensors").touch()
    return path


def test_a_directory_replaces_a_checkpoint_or_nothing(tmp_path: Path) -> None:
    new, out = tmp_path / "new", tmp_path / "out"
    for folder, text in ((new, "new"), (out, "old")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="out must be a new or empty directory"):
        move_into_place(new, out, overwrite=False)
    assert (new / "config.json").read_text() == "new"
    move_into_place(new, out, overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_that_cannot_be_moved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "missing", out, overwrite=True)
    assert (out / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupt_between_the_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, out = checkpoint(tmp_path / "new", "new"), checkpoint(tmp_path / "out")
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            move_into_place(new, out, overwrite=True)
    assert (out / "config.json").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [new, out]


def test_what_somebody_else_put_there_meanwhile_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, out = checkpoint(tmp_path / "new", "new"), checkpoint(tmp_path / "out")
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        rename(source, target)
        if source == out:
            checkpoint(out, "another")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", overtaken)
        with pytest.raises(OSError, match="not empty"):
            move_into_place(new, out, overwrite=True)
    assert (out / "config.json").read_text() == "another"
    (aside,) = tmp_path.glob(".out.old-*/out")
    assert (aside / "config.json").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["thesis.tex", "data.bin", "results.csv", ".notes", "sub/a", "tokenizer.json~"]
)
def test_what_belongs_to_no_checkpoint_is_not_deleted(tmp_path: Path, name: str) -> None:
    out = checkpoint(tmp_path / "out")
    for ours in ("tokenizer.json", "generation_config.json", "quantization_report.json", "own.txt"):
        (out / ours).touch()
    check_replaceable(out, overwrite=True, replaces=["own.txt"])
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(
        FileExistsError, match=rf"got .*out, which also holds {name}: move or remove it first"
    ):
        check_replaceable(out, overwrite=True, replaces=["own.txt"])
    with pytest.raises(FileExistsError, match=rf"which also holds .*{name}"):
        move_into_place(checkpoint(tmp_path / "new"), out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_other_weights_make_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "data.bin", "embeddings.safetensors"):
        (out / name).touch()
    with pytest.raises(FileExistsError, match=r"checkpoint to be overwritten, got .*, which is none"):
        check_replaceable(out, overwrite=True)


def test_results_lie_apart_from_what_they_are_made_of(tmp_path: Path) -> None:
    model = tmp_path / "w.partial"
    check_apart(tmp_path / "w", tmp_path / "x.partial", model_dir=model)
    for output in (model, model / "inside", tmp_path):
        with pytest.raises(
            ValueError, match=r"out must lie apart from the model, .* got model_dir=.*w\.partial"
        ):
            check_apart(tmp_path / "w", output, model_dir=model)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EMFILE])
def test_a_directory_that_cannot_be_locked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    opened = os.open

    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    def no_more(path: Path, flags: int, *rest: int) -> int:
        if ".out.partial-" in str(path) and code == errno.EMFILE:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *rest)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(locks.fcntl, "flock", flock)
        patch.setattr(os, "open", no_more)
        with pytest.raises(OSError, match=r"\.out\.partial-") as caught:
            StagedDirectory(tmp_path / "out")
    assert caught.value.errno == code
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before
