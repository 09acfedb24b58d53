"""The folder of a run: what it was asked, its data as tokens, its checkpoints and its metrics."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoints import latest_checkpoint
from .settings import FinetuneError

__all__ = ["RunDirectory", "describe_files"]

_SETTINGS = "settings.json"
#: Settings that the files of tokens, and the checkpoint to start from, are made of.
_OF_TOKENS = frozenset({"teacher", "data", "eval_data", "text_field", "max_tokens"})
_OF_START = frozenset({"teacher", "quantisation", "patterns", "device"})


class RunDirectory:
    """``<out>.finetune``, locked while a process works in it.

    Args:
        out: directory that the run is to make.

    Attributes:
        path: of the folder.
    """

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + ".finetune")
        self._lock: int | None = None

    @property
    def start(self) -> Path:
        """The packed checkpoint that training starts from."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """TensorBoard's files."""
        return self.path / "logs"

    @property
    def teacher(self) -> Path:
        """A stored teacher."""
        return self.path / "teacher"

    def tokens(self, split: str) -> Path:
        """Token ids of ``"train"`` or ``"eval"``."""
        return self.path / f"{split}.tokens"

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> bool:
        """Take the folder for this process; return whether it goes on with an earlier run.

        Raises:
            FinetuneError: another process works in it, or it is of a run with other settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        file = self.path / _SETTINGS
        wanted = json.loads(json.dumps(settings))
        if file.is_file() and not resume:
            self.clear()
        if file.is_file():
            try:
                found = json.loads(file.read_text("utf-8"))
            except json.JSONDecodeError as error:
                raise FinetuneError(f"{file} must be JSON, got {error}: resume=False starts anew") from error
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if not differing:
                return True
            if latest_checkpoint(self.checkpoints) is not None:
                listed = ", ".join(
                    f"{key} ({found.get(key)!s:.200} before, now {wanted.get(key)!s:.200})"
                    for key in differing
                )
                raise FinetuneError(
                    f"{self.path} must be of a run with the same settings, got other values of {listed}; "
                    "use those, another OUT, or resume=False (--restart), which discards that run"
                )
            self._discard_stale(differing)
        temporary = self.path / f"{_SETTINGS}.partial"
        temporary.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")
        os.replace(temporary, file)
        return False

    def _discard_stale(self, differing: Sequence[str]) -> None:
        """Remove what a run that never came to a checkpoint made from other settings."""
        stale = [self.teacher, self.checkpoints, self.logs]
        if not _OF_TOKENS.isdisjoint(differing):
            stale += [file for split in ("train", "eval") for file in self.path.glob(f"{split}.tokens*")]
        if not _OF_START.isdisjoint(differing):
            stale += list(self.path.glob("start*"))
        for path in stale:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clear(self, *, keep_logs: bool = False) -> None:
        """Remove what the run made, the folder itself excepted."""
        for path in self.path.iterdir():
            if keep_logs and path == self.logs:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove_if_empty(self) -> None:
        """Remove the folder where nothing is left in it."""
        if [path.name for path in self.path.iterdir()] == ["lock"]:
            (self.path / "lock").unlink()
            self.path.rmdir()

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise FinetuneError(f"{self.path} is in use by another process") from error
        self._lock = descriptor


def describe_files(files: Sequence[Path]) -> list[list[Any]]:
    """Return name and size of every file, or a digest of them where there are many."""
    listed = [[str(file.resolve()), file.stat().st_size] for file in files]
    if len(listed) <= 100:
        return listed
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return [[f"{len(listed)} files, sha256 of names and sizes {digest}", sum(size for _, size in listed)]]
