"""Writing to disk: whole files, whole directories, errors with path and sizes, the folder of a run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from littlebit2.disk import (
    RunDirectory,
    RunError,
    check_new_file,
    check_space,
    move_into_place,
    new_file,
    write_file,
    write_json,
)


def fail_with(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)


def test_file_and_folder_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a.json", []

    def fsync(descriptor: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, {"b": "ü", "a": [1]})
    assert json.loads(path.read_text("utf-8")) == {"b": "ü", "a": [1]}
    (temporary, before), (folder, after) = seen
    assert temporary.endswith(".tmp")
    assert not before
    assert (folder, after) == (tmp_path.name, True)


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")

    def write_half() -> None:
        with new_file(path) as file:
            file.write(b"new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_path_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fail_with(monkeypatch, code)
    with pytest.raises(OSError, match=r"cannot write .*/a \(0\.002 MB\): .*, .* [GM]B free") as caught:
        write_file(tmp_path / "a", bytes(2000))
    assert caught.value.errno == code
    assert not list(tmp_path.iterdir())


def test_a_missing_permission_names_path_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError, match=r"cannot write .*/a \(0\.002 MB\): Permission denied"):
        write_file(tmp_path / "a", bytes(2000))


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "a", b"")


def test_a_new_file_may_not_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"out must be a file, got .*, which is a directory"):
        check_new_file(tmp_path, overwrite=True)
    (tmp_path / "a").touch()
    check_new_file(tmp_path / "a", overwrite=True)
    with pytest.raises(FileExistsError, match="out must be a new file"):
        check_new_file(tmp_path / "a", overwrite=False)


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


def test_one_process_holds_the_folder_of_a_run(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.take()
    with pytest.raises(RunError, match="run is in use by another process"):
        second.take()
    first.close()
    (tmp_path / "run" / "torn.tmp").touch()
    second.take()
    assert not (tmp_path / "run" / "torn.tmp").exists()
    second.remove()
    assert not (tmp_path / "run").exists()


def test_settings_of_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.take()
    assert run.settings() is None
    run.write_settings({"seed": 1, "ranks": [8]})
    assert run.differing({"seed": 1, "ranks": (8,)}) == {}
    differing = run.differing({"seed": 2, "ranks": (8,), "new": "x"})
    assert differing == {"seed": "seed = 1 there, 2 here", "new": "new = None there, 'x' here"}
    assert "run with other settings: seed = 1 there, 2 here, new" in str(run.refuse(differing))
    (tmp_path / "run" / "kept").mkdir()
    (tmp_path / "run" / "removed").mkdir()
    run.clear(tmp_path / "run" / "kept")
    assert sorted(path.name for path in run.path.iterdir()) == ["kept", "lock"]
    run.close()


@pytest.mark.parametrize(("text", "expected"), [("{", "must be JSON"), ("[]", "must hold a JSON object")])
def test_damaged_settings_are_named(tmp_path: Path, text: str, expected: str) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(RunError, match=rf"settings\.json {expected}"):
        run.settings()


def test_an_emptied_folder_is_removed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.take()
    (run.path / "logs").mkdir()
    run.remove_if_empty()
    assert run.path.is_dir()
    (run.path / "logs").rmdir()
    run.remove_if_empty()
    assert not run.path.exists()


def test_too_little_space_is_named(tmp_path: Path) -> None:
    check_space(tmp_path, 0)
    with pytest.raises(RunError, match=r"needs about \d+\.00 GB free, has .* [GM]B; free some"):
        check_space(tmp_path, 10**18)
