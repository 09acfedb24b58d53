"""What is in a checkpoint, as numbers: ranks, bits per weight, bytes."""

from __future__ import annotations

from typing import Any

from .reader import Checkpoint

__all__ = ["describe"]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a JSON-able summary of an opened checkpoint."""
    raise NotImplementedError
