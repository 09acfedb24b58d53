"""Print what pyproject.toml requires, one requirement per line: ``requirements.py [EXTRA ...]``.

``make`` installs dependencies before the package itself can be built (the build needs torch and CMake
present), and the pip of a stock Python 3.11 has no way to ask for that. The build requirements
and the runtime dependencies are always printed; extras that refer to other extras of the project are
expanded.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def expand(extra: str, extras: dict[str, list[str]], project: str) -> list[str]:
    """Return the requirements of ``extra`` with references to the project's other extras resolved."""
    if extra not in extras:
        raise SystemExit(f"extra must be one of {sorted(extras)}, got {extra!r}")
    found: list[str] = []
    for requirement in extras[extra]:
        reference = re.fullmatch(rf"{re.escape(project)}\[([\w\s,-]+)\]", requirement)
        if reference is None:
            found.append(requirement)
        else:
            for name in reference[1].split(","):
                found += expand(name.strip(), extras, project)
    return found


def main(names: list[str]) -> None:
    """Print the requirements."""
    tables = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    project = tables["project"]
    requirements = tables["build-system"]["requires"] + project["dependencies"]
    for name in names:
        requirements += expand(name, project["optional-dependencies"], project["name"])
    print("\n".join(dict.fromkeys(requirements)))


if __name__ == "__main__":
    main(sys.argv[1:])
