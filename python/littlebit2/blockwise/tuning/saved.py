"""The state of a long tuning in a file, replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from littlebit2.disk import check_space, sync
from littlebit2.offline.work import keep_layers

__all__ = ["SavedState"]


class SavedState:
    """Keeps the last state of :func:`.tune`.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(f"{path.name}.new")

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, ``None`` if nothing was."""
        if not self._path.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, UnpicklingError, EOFError):
            return None  # damaged: begin anew
        return found

    def done(self) -> int:
        """Return the number of steps of what was saved last."""
        found = self.load()
        return 0 if found is None else int(found["done"])

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state instead of the last one.

        Raises:
            RunError: the disk has no room for it; the last state is still there.
        """
        self._new.unlink(missing_ok=True)
        check_space(self._path.parent, _bytes(state))
        with keep_layers():
            torch.save(dict(state), self._new)
            sync(self._new)
        self._new.replace(self._path)
        sync(self._path.parent)

    def remove(self) -> None:
        """Remove what was saved."""
        self._new.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


def _bytes(state: Any) -> int:
    """Return the size of all tensors."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(_bytes(value) for value in state.values())
    return sum(_bytes(value) for value in state) if isinstance(state, (list, tuple)) else 0
