"""Errors of writing, with the path and the sizes in the message."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FULL", "RunError", "explain_errors", "free_text", "size_text"]

#: A full disk, and a full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunError(RuntimeError):
    """A run cannot start, continue or be resumed; the message says why and what would help."""


@contextmanager
def explain_errors(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Name ``path`` and the sizes in the message of a full disk, a missing permission, or one without a path.

    Args:
        path: what is being written.
        nbytes: bytes to write, where they are known.

    Raises:
        OSError: as the body raised it, of the same class and ``errno``.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and error.errno not in (*FULL, *_REFUSED)
        if named or error.errno is None or getattr(error, "explained", False):
            raise
        what = f"{path} ({size_text(nbytes)})" if nbytes is not None else str(path)
        free = f", {free_text(path)}" if error.errno in FULL else ""
        better = OSError(error.errno, f"cannot write {what}: {os.strerror(error.errno)}{free}")
        better.explained = True  # type: ignore[attr-defined]  # an outer call has nothing to add
        raise better from error


def size_text(nbytes: int) -> str:
    """Format a number of bytes in GB (1e9) or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3f} MB"


def free_text(path: Path) -> str:
    """Say how much is free on the disk of ``path``, which need not exist."""
    folder = next(one for one in (path, *path.absolute().parents) if one.is_dir())
    return f"{size_text(shutil.disk_usage(folder).free)} free"
