"""A clone that was not built makes way for the installed package of its version.

Python looks into the current folder first. In the root of a clone it finds this package's sources, which have
no compiled libraries unless they were built there, although another copy, complete, is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["package_folder"]


def package_folder(here: str) -> str:
    """Return the folder that the package's modules come from.

    Args:
        here: folder of the sources that Python has found.

    Returns:
        ``here`` where libraries were built into it, or into no other package of this version; otherwise the
        folder of the installed package.
    """
    own = Path(here)
    if (own / "lib").is_dir():
        return here
    for entry in sys.path:
        other = Path(entry or ".") / own.name
        if (other / "lib").is_dir() and _version(other) == _version(own):
            return str(other.resolve())
    return here


def _version(folder: Path) -> str | None:
    file = folder / "version.py"
    return file.read_text("utf-8") if file.is_file() else None
