"""A clone that was not built makes way for the package that is installed.

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
        ``here`` where libraries were built into it, or nowhere else; otherwise that of the installed package.
    """
    own = Path(here)
    if (own / "lib").is_dir():
        return here
    for entry in sys.path:
        other = Path(entry or ".") / own.name
        if (other / "lib").is_dir() and (other / "__init__.py").is_file():
            return str(other.resolve())
    return here
