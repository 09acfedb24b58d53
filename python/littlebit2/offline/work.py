"""The work directory of a run: finished layers, one file each, safe against a kill at any moment.

A file appears under its name only when it is whole and on disk. The settings of the run are in it, so that
layers of different runs are never mixed, and a lock keeps a second process from working in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from littlebit2.disk import FULL, RunDirectory, RunError, write_file
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.state import packed_from_state, packed_to_state

from .jobs import Job

__all__ = ["WorkDirectory", "difference", "keep_layers", "reason_of", "work_path"]

#: The one metadata key of a layer file: with several, their order in the file would not be fixed.
_ENTRY = "littlebit2"


class WorkDirectory(RunDirectory):
    """The directory beside ``out`` that holds a run until it is assembled.

    Args:
        out: the directory that the run will make.
        settings: everything that its bytes depend on, JSON values by name.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(work_path(out))
        self.assembled = self.path / "assembled"
        self.wanted = dict(settings)
        self._digest = hashlib.sha256(json.dumps(self.of_layers, sort_keys=True).encode()).hexdigest()

    @property
    def of_layers(self) -> dict[str, Any]:
        """The settings that finished layers depend on: a run with others does not go on from them."""
        return self.wanted

    def open(self, *, resume: bool) -> None:
        """Make the directory or continue in it; the caller then holds its lock.

        Raises:
            RunError: another process works in it, it belongs to a run with other settings, or it holds
                something and is no work directory.
            OSError: it cannot be made or written.
        """
        self.begin(self.of_layers, resume=resume, describe=difference)
        shutil.rmtree(self.assembled, ignore_errors=True)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """See :class:`.RunDirectory`; a full disk is told as for layers."""
        with keep_layers():
            super().write_settings(settings)

    def layer_path(self, job: Job) -> Path:
        """Where the file of a finished layer lies."""
        return self.path / f"{job.index:06d}.safetensors"

    def write_layer(self, job: Job, packed: PackedLinear, entry: dict[str, Any], seconds: float) -> None:
        """Write a finished layer.

        Raises:
            RunError: the disk is full, or the directory was closed.
            OSError: it cannot be written.
        """
        if self.closed:
            # A thread that has outlived its run; the folder may be another run's by now.
            raise RunError(f"{self.path} must be open to write {job.source.name} into it, got a closed one")
        with keep_layers():
            self.write_layer_to(self.layer_path(job), job, packed, entry, seconds)

    def write_layer_to(
        self, path: Path, job: Job, packed: PackedLinear, entry: dict[str, Any], seconds: float
    ) -> None:
        """Write a finished layer to a file.

        Raises:
            OSError: it cannot be written.
        """
        state = {name: tensor.cpu().contiguous() for name, tensor in packed_to_state(packed).items()}
        metadata = {_ENTRY: json.dumps({"job": self._identity(job), "entry": entry, "seconds": seconds})}
        write_file(path, save(state, metadata))

    def finished(self, job: Job) -> tuple[dict[str, Any], float] | None:
        """Return the report entry and the seconds of a finished layer, ``None`` if it is to be done.

        A file that cannot be read, or is of another job, counts as not there: the layer is done again.
        """
        try:
            with safe_open(self.layer_path(job), "pt") as file:
                content = json.loads((file.metadata() or {})[_ENTRY])
            if content["job"] == self._identity(job):
                return content["entry"], content["seconds"]
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            pass
        return None

    def _identity(self, job: Job) -> dict[str, Any]:
        assert job.config.ranks is not None
        return {
            "name": job.source.name,
            "ranks": list(job.config.ranks),
            "seed": job.config.seed,
            "run": self._digest,
        }

    def load_layer(self, job: Job) -> PackedLinear:
        """Read a finished layer back, checked.

        Raises:
            RunError: the file was damaged; the message names it.
        """
        path = self.layer_path(job)
        try:
            with safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return packed_from_state(state)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: is damaged ({reason_of(error)}); remove it and run again") from error


def work_path(out: Path) -> Path:
    """Where the work directory of ``out`` lies."""
    return out.with_name(out.name + ".partial")


def difference(name: str, found: Any, wanted: Any) -> str:
    """Say how a setting differs, for :meth:`.RunDirectory.differing`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        return ", ".join(difference(key, found.get(key), wanted.get(key)) for key in names)
    return "other source weights" if name == "source" else f"{name} = {found!r} there, {wanted!r} here"


@contextmanager
def keep_layers() -> Iterator[None]:
    """Turn a full disk (or quota) into a :class:`.RunError` that says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"{error.strerror}; free some and run the same command again: finished layers are kept"
        ) from error


def reason_of(error: BaseException) -> str:
    """One line for an error that is quoted inside another."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__
