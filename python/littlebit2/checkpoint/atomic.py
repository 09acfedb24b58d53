"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

__all__ = ["StagedDirectory", "check_new_file", "check_replaceable", "sync_path"]


class StagedDirectory:
    """A temporary sibling of a directory to be, renamed to it by :meth:`publish`; a context manager.

    A process that is killed leaves its sibling behind, hidden and unlocked; the next writer of the same
    directory removes it. A sibling that another live process writes is locked and left alone.

    Args:
        out: the directory to be.
        overwrite: whether a checkpoint that is there may be replaced.

    Attributes:
        path: where to write until then.

    Raises:
        FileExistsError: ``out`` exists and may not be replaced, or is no checkpoint.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self._check_out()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._remove_stale()
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
        for file in self.path.rglob("*"):
            sync_path(file)
        sync_path(self.path)
        self._check_out()
        old: Path | None = None
        if self.out.exists() and any(self.out.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.old-", dir=self.out.parent)) / self.out.name
            os.rename(self.out, old)
        try:
            os.rename(self.path, self.out)
        except OSError:
            if old is not None:
                os.rename(old, self.out)
                old.parent.rmdir()
            raise
        self._release()
        sync_path(self.out.parent)
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)

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

    def _check_out(self) -> None:
        check_replaceable(self.out, overwrite=self.overwrite)

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


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` unless ``out`` may be put in place: nothing is there, or an empty directory.

    With ``overwrite`` also a directory that holds a checkpoint and nothing in folders: what else a user may
    have there is not ours to delete.
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
    if not weights or "config.json" not in names or any(item.is_dir() for item in present):
        raise FileExistsError(f"out must be a checkpoint to be overwritten, got {out}, which is none")


def check_new_file(out: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` unless a file may be put at ``out``: none is there, or ``overwrite``."""
    if out.is_dir():
        raise FileExistsError(f"out must be a file, got {out}, which is a directory")
    if not overwrite and os.path.lexists(out):
        raise FileExistsError(f"out must be a new file, got {out}; overwrite=True (--overwrite) replaces it")


def _escaped(stem: str) -> str:
    return "".join(f"[{mark}]" if mark in "*?[" else mark for mark in stem)


def sync_path(path: Path) -> None:
    """Put a file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
