"""Writing to disk: whole files, errors with path and sizes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from littlebit2.disk import (
    RunError,
    check_new_file,
    check_space,
    new_file,
    reserve,
    write_file,
    write_json,
)
from tests.disk.limits import files_up_to


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


def test_an_error_without_a_path_gets_one(tmp_path: Path) -> None:
    with (
        files_up_to(1000),
        pytest.raises(OSError, match=r"cannot write .*/a \(0\.002 MB\): File too large") as caught,
    ):
        write_file(tmp_path / "a", bytes(2000))
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_reserved_space_is_there_or_an_error(tmp_path: Path) -> None:
    reserve(tmp_path / "a", 100_000)
    found = (tmp_path / "a").stat()
    assert found.st_size == 100_000
    assert 512 * found.st_blocks >= 100_000
    reserve(tmp_path / "none", 0)
    with files_up_to(1000), pytest.raises(OSError, match=r"cannot write .*/b \(0\.002 MB\): File too large"):
        reserve(tmp_path / "b", 2000)
    assert not (tmp_path / "b").exists()


def test_a_new_file_may_not_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"out must be a file, got .*, which is a directory"):
        check_new_file(tmp_path, overwrite=True)
    (tmp_path / "a").touch()
    check_new_file(tmp_path / "a", overwrite=True)
    with pytest.raises(FileExistsError, match="out must be a new file"):
        check_new_file(tmp_path / "a", overwrite=False)


def test_too_little_space_is_named(tmp_path: Path) -> None:
    check_space(tmp_path, 0)
    with pytest.raises(RunError, match=r"needs about \d+\.00 GB free, has .* [GM]B; free some"):
        check_space(tmp_path, 10**18)
