"""The authors' layout as a target, and conversion between the two layouts."""

from __future__ import annotations

from pathlib import Path

from .reader import Checkpoint

__all__ = ["convert", "export_upstream"]


def export_upstream(checkpoint: Checkpoint, out: str | Path) -> None:
    """Write a checkpoint in the layout of the LittleBit authors' code."""
    raise NotImplementedError


def convert(source: str | Path, out: str | Path, to: str) -> None:
    """Convert a checkpoint directory to ``"littlebit2"`` or ``"littlebit"``."""
    raise NotImplementedError
