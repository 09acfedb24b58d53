"""The folder of a run: one process at a time, and nobody else's folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from littlebit2.disk import RunDirectory, RunError, locks


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
    assert sorted(path.name for path in run.path.iterdir()) == ["kept", "littlebit2.lock"]
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


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "q.partial"
    (mine / "sub").mkdir(parents=True)
    (mine / "thesis.tex").write_text("mine")
    (mine / "settings.json").write_text("{}")
    (mine / "torn.tmp").write_text("mine")
    with pytest.raises(
        RunError, match=r"q\.partial must be the folder of an earlier run or empty, got .*sub"
    ):
        RunDirectory(mine).take()
    assert sorted(path.name for path in mine.iterdir()) == ["settings.json", "sub", "thesis.tex", "torn.tmp"]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RunError, match=r"file must be the folder of a run, got a file"):
        RunDirectory(file).take()


def test_the_lock_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    run.take()
    run.write_settings({})
    (run.path / "a").write_bytes(b"")
    removed: list[str] = []
    original = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        original(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    run.remove()
    assert removed == ["settings.json", "a", "littlebit2.lock"]
    assert run.closed
    assert not run.path.exists()


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process ends, and the next begins, between a third one's opening and locking of the file."""
    ending, beginning, late = (RunDirectory(tmp_path / "run") for _ in range(3))
    ending.take()
    original = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.setattr(locks.fcntl, "flock", original)
        ending.remove()
        beginning.take()
        original(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(RunError, match="run is in use by another process"):
        late.take()
    beginning.remove()
    late.take()
    late.remove()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot lock .*run/littlebit2\.lock \(flock\): No locks available"):
        RunDirectory(tmp_path / "run").take()
