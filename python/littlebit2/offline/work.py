"""The work directory of a run: finished layers, one file each, safe against a kill at any moment.

A file appears under its name only when it is whole and on disk (temporary name, fsync, rename). A manifest
holds the settings of the run, so that layers of different runs are never mixed, and a lock keeps a second
process from working in the same directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from littlebit2.checkpoint.atomic import sync_path
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.state import packed_from_state, packed_to_state

from .errors import StreamError
from .jobs import Job

__all__ = ["WorkDirectory", "explain_full_disk", "reason_of", "write_atomically"]

T = TypeVar("T")

_MANIFEST = "manifest.json"
_LOCK = "lock"
_TEMPORARY = ".tmp"
#: The one metadata key of a layer file: with several, their order in the file would not be fixed.
_ENTRY = "littlebit2"


class WorkDirectory:
    """The directory beside ``out`` that holds a run until it is assembled.

    Args:
        out: the directory that the run will make.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".partial")
        self.assembled = self.path / "assembled"
        self._lock: IO[str] | None = None

    def open(self, settings: dict[str, Any], *, resume: bool) -> None:
        """Make the directory or go on in it; the caller then holds its lock.

        Raises:
            StreamError: another process works in it, or it belongs to a run with other settings.
            OSError: it cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / _LOCK).open("w", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise StreamError(
                f"{self.path}: another process is working in it; wait for it, or give another output"
            ) from error
        self._lock = lock
        manifest = self.path / _MANIFEST
        if not resume:
            self._clear()
        if manifest.exists():
            self._check_manifest(manifest, settings)
        else:
            self._clear()  # left by a run that was killed before its manifest was written, or by remove()
            write_atomically(manifest, json.dumps(settings, indent=2).encode())
        for leftover in self.path.glob(f"*{_TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(self.assembled, ignore_errors=True)

    def _check_manifest(self, manifest: Path, settings: dict[str, Any]) -> None:
        try:
            found = json.loads(manifest.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StreamError(f"{manifest}: is not JSON: {error}; remove {self.path}") from error
        if found != settings:
            raise StreamError(
                f"{self.path} holds a run with other settings: {describe_difference(found, settings)}; "
                "finish it with those settings, start over (resume=False, --restart), or give another output"
            )

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Remove the directory; the manifest goes first, so that a rest of it is never resumed from."""
        (self.path / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def layer_path(self, job: Job) -> Path:
        """Where the file of a finished layer lies."""
        return self.path / f"{job.index:06d}.safetensors"

    def write_layer(self, job: Job, packed: PackedLinear, entry: dict[str, Any], seconds: float) -> None:
        """Write a finished layer.

        Raises:
            StreamError: the disk is full.
            OSError: it cannot be written.
        """
        state = {name: tensor.cpu().contiguous() for name, tensor in packed_to_state(packed).items()}
        metadata = {_ENTRY: json.dumps({"job": _identity(job), "entry": entry, "seconds": seconds})}
        write_atomically(self.layer_path(job), save(state, metadata))

    def finished(self, job: Job) -> tuple[dict[str, Any], float] | None:
        """Return the report entry and the seconds of a finished layer, ``None`` if it is to be done.

        A file that cannot be read, or is of another job, counts as not there: the layer is done again.
        """
        try:
            with safe_open(self.layer_path(job), "pt") as file:
                content = json.loads((file.metadata() or {})[_ENTRY])
            if content["job"] == _identity(job):
                return content["entry"], content["seconds"]
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            pass
        return None

    def load_layer(self, job: Job) -> PackedLinear:
        """Read a finished layer back, checked.

        Raises:
            StreamError: the file was damaged; the message names it.
        """
        path = self.layer_path(job)
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return packed_from_state(state)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StreamError(f"{path}: is damaged ({reason_of(error)}); remove it and run again") from error


def _identity(job: Job) -> dict[str, Any]:
    assert job.config.ranks is not None
    return {"name": job.source.name, "ranks": list(job.config.ranks), "seed": job.config.seed}


def describe_difference(found: Any, wanted: dict[str, Any]) -> str:
    """Name the settings that differ, with both values."""
    if not isinstance(found, dict):
        return "it has no settings"
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(
        "other source weights"
        if name == "source"
        else f"{name} = {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in differing
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens.

    Raises:
        StreamError: the disk is full.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")

    def write() -> None:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)

    try:
        explain_full_disk(path, write)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def explain_full_disk(path: Path, action: Callable[[], T]) -> T:
    """Run ``action``; a full disk (or quota) becomes a :class:`StreamError` that says how to go on."""
    try:
        return action()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StreamError(
            f"no space left to write {path} ({error.strerror}); free some and run the same command again: "
            "finished layers are kept"
        ) from error


def reason_of(error: BaseException) -> str:
    """One line for an error that is quoted inside another."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__
