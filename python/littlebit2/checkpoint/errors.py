"""The exception for checkpoints that cannot be read or written."""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint on disk is malformed, incomplete, or of a kind that cannot be read or written.

    The message names the file, the tensor or field, what was expected and what was found. What it quotes from
    a file is escaped where it is not printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(mark if mark.isprintable() else ascii(mark)[1:-1] for mark in message))
