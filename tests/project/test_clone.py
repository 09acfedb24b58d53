"""A clone that was not built, in whose root Python is started, uses the package that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "import littlebit2_kernels as k; k.get_include(); print(k.__path__[0], k.get_library_dir(), sep='\\n')"


def copied(folder: Path, *, built: bool) -> Path:
    source = ROOT / "littlebit2_kernels"
    unbuilt = shutil.ignore_patterns("lib", "include", "__pycache__")
    target = shutil.copytree(source, folder / "littlebit2_kernels", ignore=unbuilt)
    if built:
        (target / "lib").symlink_to(source / "lib")
    return target


def test_a_clone_of_another_version_stays_itself(tmp_path: Path) -> None:
    mine, other = copied(tmp_path / "clone", built=False), copied(tmp_path / "installed", built=True)
    (other / "version.py").write_text('__version__ = "0.0.1"\n')
    found = where(mine.parent, other.parent)
    assert found == [str(mine), str(mine / "lib")]


def where(clone: Path, *installed: Path) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, installed)), "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.parametrize("built", [False, True])
def test_a_clone_makes_way_unless_it_was_built(built: bool, tmp_path: Path) -> None:
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    mine, other = copied(clone, built=built), copied(installed, built=True)
    home = mine if built else other
    assert where(clone, installed) == [str(home), str(home / "lib")]


def test_a_clone_by_itself_says_that_it_was_not_built(tmp_path: Path) -> None:
    mine = copied(tmp_path / "clone", built=False)
    # -S and -I would hide torch; an empty folder in front of it does not.
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if not (__import__('pathlib').Path(p or '.') / "
        f"'littlebit2_kernels' / 'lib').is_dir()]; sys.path.insert(0, {str(mine.parent)!r})\n"
        "import littlebit2_kernels\nfrom littlebit2_kernels import _native\n"
        "assert littlebit2_kernels.__path__[0].startswith(sys.path[0]), littlebit2_kernels.__path__\n"
        "try:\n    _native.core()\n"
        "except littlebit2_kernels.NativeLibraryError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "cannot be loaded" in run.stdout
    assert "in a checkout, `pip install .`" in run.stdout
