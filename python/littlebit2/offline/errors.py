"""The one exception of this room."""

from __future__ import annotations

__all__ = ["StreamError"]


class StreamError(RuntimeError):
    """A run cannot start, go on or be resumed; the message says why and what would help."""
