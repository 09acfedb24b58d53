"""Compare the results of C++ tests on two machines: ``digests.py FOLDER FOLDER``.

Each folder is one of CMake in which ctest has left ``results.xml``. Tests of random problems print the
instruction sets that they ran, which agreed to the bit, and a digest of their results. The exit status is 0
if both folders have the same digests.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree


def read(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Digests by test, and the instruction sets that ran.

    Raises:
        SystemExit: there are no results, or no digests in them.
    """
    path = folder / "results.xml"
    if not path.exists():
        raise SystemExit(f"error: {path} was not found; ctest writes it with --output-junit results.xml")
    digests, sets = {}, []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        output = case.findtext("system-out") or ""
        if found := re.findall(r"^digest (\w+ of \d+ problems)$", output, re.MULTILINE):
            digests[str(case.get("name"))] = found
            sets += re.findall(r"instruction sets (.+)$", output, re.MULTILINE)
    if not digests:
        raise SystemExit(f"error: no test in {path} printed a digest")
    return digests, list(dict.fromkeys(sets))


def main(arguments: Sequence[str]) -> int:
    """Print what differs, or what agreed."""
    if len(arguments) != 2:
        raise SystemExit(f"usage: digests.py FOLDER FOLDER, got {len(arguments)} arguments")
    (first, first_sets), (second, second_sets) = (read(Path(folder)) for folder in arguments)
    differing = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    for name in sorted(differing):
        print(f"{name}: {first.get(name)} in {arguments[0]}, {second.get(name)} in {arguments[1]}")
    if differing:
        return 1
    problems = sum(int(line.split()[2]) for lines in first.values() for line in lines)
    sets = "; ".join([*first_sets, *second_sets])
    print(f"the same bits in {problems} problems of {len(first)} tests on {sets}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
