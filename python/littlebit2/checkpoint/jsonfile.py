"""Parse untrusted JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError

__all__ = ["parse_object", "read_object"]

#: Larger than the index of any model; keeps a wrong file from being parsed for minutes.
MAX_JSON_BYTES = 256 * 2**20


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        CheckpointError: the file cannot be read, is too large, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: JSON must be at most {MAX_JSON_BYTES} bytes, got {size}")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return parse_object(raw, str(path))


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse bytes that must be one JSON object in UTF-8 without repeated keys.

    Args:
        raw: the text.
        where: what the text is, for messages.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: must be JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is repeated")
            seen.add(key)
    return value
