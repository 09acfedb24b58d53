"""Locks on files and directories, held by one process at a time until it closes the descriptor or ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

__all__ = ["is_at", "lock"]

_HELD = (errno.EACCES, errno.EAGAIN)


def lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Lock what is open; return whether it is ours now.

    Args:
        descriptor: of a file or directory.
        path: under which it was opened, for messages.
        wait: whether to wait for another process, instead of returning ``False``.

    Raises:
        OSError: it cannot be locked, as on a file system without ``flock``; the message names the path.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait and error.errno in _HELD:
            return False
        better = OSError(error.errno, f"cannot lock {path} (flock): {os.strerror(error.errno or 0)}")
        better.explained = True  # type: ignore[attr-defined]  # an outer call has nothing to add
        raise better from error
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what is open still lies at ``path``: somebody may have removed it, or put another there."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
