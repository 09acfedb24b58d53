"""A checksum for every file of weights, in the file's own metadata: bits that flip on a disk are found.

It is the SHA-256 of one line for each tensor, in the order of the names: name, dtype, shape and the SHA-256
of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from .errors import CheckpointError
from .headers import TensorEntry, read_header

__all__ = ["CHECKSUM", "combined", "line_of", "matches"]

#: Key in ``__metadata__``.
CHECKSUM = "sha256"
_CHUNK = 2**24


def line_of(name: str, dtype: torch.dtype, shape: tuple[int, ...], digest: str) -> str:
    """Return the line of one tensor; ``digest`` is the SHA-256 of its bytes in hexadecimal."""
    return f"{name} {dtype} {list(shape)} {digest}\n"


def combined(lines: Iterable[str]) -> str:
    """Return the checksum of a file in hexadecimal."""
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def matches(file: Path) -> bool | None:
    """Whether a safetensors file is what was written; ``None`` if it holds no checksum.

    Raises:
        CheckpointError: it cannot be read, or its header is malformed.
    """
    entries, metadata = read_header(file)
    if CHECKSUM not in metadata:
        return None
    lines = [line_of(name, e.dtype, e.shape, _digest(file, e)) for name, e in entries.items()]
    return combined(lines) == metadata[CHECKSUM]


def _digest(file: Path, entry: TensorEntry) -> str:
    assert entry.begin is not None
    digest, left = hashlib.sha256(), entry.nbytes
    try:
        with file.open("rb") as stream:
            stream.seek(entry.begin)
            while left:
                part = stream.read(min(left, _CHUNK))
                if not part:
                    raise CheckpointError(f"{file}: tensor {entry.name}: the file ended early")
                digest.update(part)
                left -= len(part)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return digest.hexdigest()
