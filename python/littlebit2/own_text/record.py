"""What a file of text was written with, kept beside it: the same call finds that nothing is left to do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from littlebit2.disk import check_new_file, differences, write_json
from littlebit2.offline.work import difference

__all__ = ["check_target", "finished_counts", "write_record"]


def _record_path(out: Path) -> Path:
    # No kind of text: where a folder is given as text, it is passed over.
    return out.with_name(f"{out.name}.report.json")


def write_record(
    out: Path, text: bytes, settings: Mapping[str, Any], counts: Mapping[str, int], *, dtype: str
) -> None:
    """Write the record of a text, before the text itself: where there is a text, its record is there.

    Args:
        out: file of the text.
        text: that it is going to hold.
        settings: JSON values by name.
        counts: of what is in the text.
        dtype: in which the model wrote it, whatever the settings ask for.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "sha256": hashlib.sha256(text).hexdigest(),
        "counts": dict(counts),
        "dtype": dtype,
        "settings": dict(settings),
    }
    write_json(_record_path(out), content)


def check_target(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise ``FileExistsError`` for a file in the way that is no finished text, nor the record of one."""
    ours = _read(out) is not None
    if not (resume and ours and out.is_file()):
        check_new_file(out, overwrite=overwrite)
    if not ours:
        check_new_file(_record_path(out), overwrite=overwrite)


def finished_counts(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> dict[str, int] | None:
    """Return the counts of a text that was finished with these settings, ``None`` if it is to be written.

    Raises:
        FileExistsError: there is another file, and ``overwrite`` is off; the message says in what it differs.
    """
    content = _read(out) if os.path.lexists(out) else None
    if content is None:
        return None
    differing = differences(content["settings"], settings, difference)
    if not differing and hashlib.sha256(out.read_bytes()).hexdigest() == content["sha256"]:
        return dict(content["counts"])
    try:
        check_new_file(out, overwrite=overwrite)
    except FileExistsError as error:
        why = ", ".join(differing.values()) or "what is in it was changed"
        raise FileExistsError(f"{error}; it is not what this call would write: {why}") from None
    return None


def _read(out: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(_record_path(out).read_text("utf-8"))
        known = isinstance(content["settings"], dict) and isinstance(content["sha256"], str)
        return content if known and set(content["counts"]) == {"texts", "chats", "tokens"} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
