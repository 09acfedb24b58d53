"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

from .errors import explain_errors
from .files import sync, sync_tree

__all__ = ["StagedDirectory", "check_replaceable", "move_into_place"]


class StagedDirectory:
    """A temporary sibling of a directory to be, renamed to it by :meth:`publish`; a context manager.

    A process that is killed leaves its sibling behind, hidden and unlocked; the next writer of the same
    directory removes it. A sibling that another live process writes is locked and left alone.

    Args:
        out: the directory to be.
        overwrite: whether a checkpoint that is there may be replaced.
        replaces: as for :func:`check_replaceable`; what :attr:`path` holds in the end may always go.

    Attributes:
        path: where to write until then.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced, or is no checkpoint.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, replaces: Collection[str] = ()) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        check_replaceable(self.out, overwrite=overwrite, replaces=replaces)
        with explain_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
        with explain_errors(self.out):
            self.path, self._lock = self._make()

    def __enter__(self) -> StagedDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def publish(self) -> None:
        """Bring everything to the disk and move it to ``out``.

        Raises:
            FileExistsError: ``out`` has come into being since, and may not be replaced.
            RuntimeError: it was published or discarded before.
        """
        self.check_open()
        with explain_errors(self.out):
            sync_tree(self.path)
        move_into_place(self.path, self.out, overwrite=self.overwrite)
        self._release()

    def check_open(self) -> None:
        """Raise ``RuntimeError`` if the directory was published or discarded."""
        if self._lock is None:
            raise RuntimeError(f"{self.out} was already finished or discarded")

    def discard(self) -> None:
        """Remove what was written, unless it was published."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _stem(self) -> str:
        return f".{self.out.name}.partial-"

    def _make(self) -> tuple[Path, int | None]:
        while True:
            path = self.out.parent / (self._stem() + secrets.token_hex(4))
            path.mkdir()
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
                # Another writer may have taken the still unlocked directory for a dead one's.
                if path.exists():
                    return path, lock
                os.close(lock)

    def _remove_stale(self) -> None:
        for path in self.out.parent.glob(f"{_escaped(self._stem())}*"):
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)


def move_into_place(path: Path, out: Path, *, overwrite: bool) -> None:
    """Rename a finished directory, which is on disk, to ``out``.

    A checkpoint that is there is set aside in a hidden sibling (``.NAME.old-...``) and removed once the new
    one is in place. A kill between these two renames leaves it there.

    Args:
        path: the directory, on the file system of ``out``.
        out: its new name.
        overwrite: whether ``out`` may be a checkpoint.

    Raises:
        FileExistsError: ``out`` may not be replaced.
        OSError: it cannot be renamed.
    """
    check_replaceable(out, overwrite=overwrite, replaces=_in_folders(path))
    with explain_errors(out):
        old: Path | None = None
        if out.exists() and any(out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent)) / out.name
            os.rename(out, old)
        try:
            os.rename(path, out)
        except OSError:
            if old is not None:
                os.rename(old, out)
                old.parent.rmdir()
            raise
        sync(out.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)


def check_replaceable(out: Path, *, overwrite: bool, replaces: Collection[str] = ()) -> None:
    """Raise ``FileExistsError`` unless ``out`` may be put in place: nothing is there, or an empty directory.

    With ``overwrite`` also a directory that holds a checkpoint and nothing in folders but files that the new
    one has too: what else a user may have there is not ours to delete.

    Args:
        out: the directory to be.
        overwrite: whether it may be a checkpoint.
        replaces: files in folders that may go, relative to ``out``, with ``/`` between folders.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise FileExistsError(f"out must be a new directory, got {out}, which is no directory")
    present = list(out.iterdir())
    if not present:
        return
    if not overwrite:
        raise FileExistsError(
            f"out must be a new or empty directory, got {out}; "
            "overwrite=True (--overwrite) replaces a checkpoint"
        )
    names = [item.name for item in present]
    weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    if not weights or "config.json" not in names:
        raise FileExistsError(f"out must be a checkpoint to be overwritten, got {out}, which is none")
    others = sorted(_in_folders(out) - set(replaces))
    if others:
        raise FileExistsError(
            f"out must be a checkpoint to be overwritten, got {out}, in folders of which there is more "
            f"({', '.join(others[:5])}): remove it first"
        )


def _in_folders(directory: Path) -> set[str]:
    """Files, links and empty folders inside the folders of a directory."""
    inside = (item for folder in directory.iterdir() if folder.is_dir() for item in _leaves(folder))
    return {item.relative_to(directory).as_posix() for item in inside}


def _leaves(folder: Path) -> Iterator[Path]:
    present = [] if folder.is_symlink() else list(folder.iterdir())
    if not present:
        yield folder
    for item in present:
        if item.is_dir():
            yield from _leaves(item)
        else:
            yield item


def _escaped(stem: str) -> str:
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in stem)
