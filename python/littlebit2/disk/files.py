"""Files that appear under their name whole and on disk, whatever happens: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import explain_errors

__all__ = [
    "TEMPORARY",
    "check_new_file",
    "new_file",
    "read_json",
    "reserve",
    "sync",
    "sync_tree",
    "write_file",
    "write_json",
]

#: Ending of temporary names. A killed process leaves such files behind; they are never read.
TEMPORARY = ".tmp"


@contextmanager
def new_file(path: Path, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name ``path`` when the ``with`` block ends without an error.

    Args:
        path: where to write; an earlier file is replaced.
        nbytes: bytes to write, where they are known, for messages.

    Raises:
        OSError: it cannot be written; the message names the path and, on a full disk, what is free.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with explain_errors(path, nbytes):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file, as :func:`new_file` does."""
    with new_file(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, as :func:`new_file` does."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the value that :func:`write_json` wrote, ``None`` where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def reserve(path: Path, nbytes: int) -> None:
    """Give a file its size and its blocks on disk: what is then written through a mapping finds them there.

    A write through a mapping to a full disk kills the process instead of raising an error.

    Args:
        path: the file; made if there is none. Removed if there is too little space.
        nbytes: its size.

    Raises:
        OSError: there is too little space; the message names the path and the sizes.
    """
    with explain_errors(path, nbytes):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if nbytes:
                os.posix_fallocate(descriptor, 0, nbytes)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def check_new_file(out: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` unless a file may be put at ``out``: none is there, or ``overwrite``."""
    if out.is_dir():
        raise FileExistsError(f"out must be a file, got {out}, which is a directory")
    if not overwrite and os.path.lexists(out):
        raise FileExistsError(f"out must be a new file, got {out}; overwrite=True (--overwrite) replaces it")


def sync(path: Path) -> None:
    """Put a file, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Put a directory and everything in it on disk."""
    for file in path.rglob("*"):
        sync(file)
    sync(path)
