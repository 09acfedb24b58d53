"""Hidden states of all sequences in a file, read and written a few sequences at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from littlebit2.disk import reserve, sync
from littlebit2.offline.work import keep_layers

__all__ = ["States"]


class States:
    """Hidden states float32 ``[S, T, D]`` in a memory-mapped file.

    Args:
        path: of the file.
        shape: S, T and D.
        create: whether to make the file, under a temporary name until :meth:`finish`.

    Raises:
        RunError: the disk is too full for it; the message has the sizes.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, create: bool = False) -> None:
        self.path = path
        self.shape = shape
        self._at = path.with_name(path.name + ".new") if create else path
        if create:
            self._at.unlink(missing_ok=True)
            with keep_layers():
                reserve(self._at, 4 * math.prod(shape))
        self._array = np.memmap(self._at, np.float32, "r+" if create else "r", shape=shape)

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the states of some sequences, ``[B, T, D]``."""
        return torch.from_numpy(self._array[list(rows)])

    def write(self, rows: Sequence[int], values: torch.Tensor) -> None:
        """Store the states of some sequences."""
        self._array[list(rows)] = values.detach().float().cpu().numpy()

    def finish(self) -> None:
        """Bring the file to the disk and give it its name."""
        self._array.flush()
        sync(self._at)
        self._at.replace(self.path)
        sync(self.path.parent)

    def discard(self) -> None:
        """Remove the file."""
        self._at.unlink(missing_ok=True)
