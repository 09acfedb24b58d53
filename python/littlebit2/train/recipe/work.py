"""The folder of a run: what it was asked, its data as tokens, its checkpoints and its metrics."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from littlebit2.disk import RunDirectory

from .checkpoints import latest_checkpoint

__all__ = ["FinetuneDirectory", "describe_files"]

#: Settings that the files of tokens, and the checkpoint to start from, are made of.
_OF_TOKENS = frozenset({"teacher", "data", "eval_data", "text_field", "max_tokens"})
_OF_START = frozenset({"teacher", "quantization", "patterns", "device"})


class FinetuneDirectory(RunDirectory):
    """``<out>.finetune``, locked while a process works in it.

    Args:
        out: directory that the run is to make.

    Attributes:
        path: the folder.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out.with_name(out.name + ".finetune"))

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
        """Take the folder for this process; return whether it continues an earlier run.

        Raises:
            RunError: another process works in it, or it holds checkpoints of a run with other settings.
        """
        self.take()
        if not resume:
            self.clear()
        found = self.settings() is not None
        differing = self.differing(settings) if found else {}
        if found and not differing:
            return True
        if differing:
            if latest_checkpoint(self.checkpoints) is not None:
                raise self.refuse(differing)
            self._discard_stale(differing)
        self.write_settings(settings)
        return False

    def _discard_stale(self, differing: Iterable[str]) -> None:
        """Remove what a run that never came to a checkpoint made from other settings."""
        stale = [self.teacher, self.checkpoints, self.logs]
        names = set(differing)
        if not _OF_TOKENS.isdisjoint(names):
            stale += [file for split in ("train", "eval") for file in self.path.glob(f"{split}.tokens*")]
        if not _OF_START.isdisjoint(names):
            stale += list(self.path.glob("start*"))
        for path in stale:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def describe_files(files: Sequence[Path]) -> list[list[Any]]:
    """Return name and size of every file, or a digest of them where there are many."""
    listed = [[str(file.resolve()), file.stat().st_size] for file in files]
    if len(listed) <= 100:
        return listed
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return [[f"{len(listed)} files, sha256 of names and sizes {digest}", sum(size for _, size in listed)]]
