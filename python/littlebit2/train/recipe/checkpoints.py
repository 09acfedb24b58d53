"""Which training checkpoints are whole.

``Trainer`` writes a checkpoint file by file into its final folder. A process that is killed meanwhile leaves
a folder that looks like a checkpoint. So the last thing written into one is a mark, once every file is on the
disk; folders without it are removed before training continues.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from littlebit2.disk import RunError, free_text, sync_tree, write_file

__all__ = ["latest_checkpoint", "mark_complete", "remove_incomplete", "saving"]

_MARK = "complete"
#: In the messages of torch.save's writer, whose errors have no class of their own.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint, and what is free, in the errors of the libraries that write its files.

    Raises:
        RunError: a file could not be written; the run continues from the checkpoint before.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save says that its writer is at another place than it should be.
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in _TORCH_WRITER):
            raise
        raise RunError(
            f"cannot write the training checkpoint {checkpoint}: {error}; {free_text(checkpoint)}. Free some "
            "and run the same command again: it continues from the checkpoint before"
        ) from error


def mark_complete(checkpoint: Path) -> None:
    """Bring all files of a checkpoint to the disk, then say that it is whole."""
    sync_tree(checkpoint)
    write_file(checkpoint / _MARK, b"")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the most steps, or ``None``."""
    whole = [(step, path) for step, path in _checkpoints(folder) if (path / _MARK).is_file()]
    return max(whole)[1] if whole else None


def remove_incomplete(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    for _, path in _checkpoints(folder):
        if not (path / _MARK).is_file():
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [(int(match[1]), path) for match, path in named if match]
