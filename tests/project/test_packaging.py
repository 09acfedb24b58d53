"""What is put into a source distribution."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources
    assert sources <= inside
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    packages = {
        "python/littlebit2_kernels/linear.py",
        "python/littlebit2_kernels/py.typed",
        "python/littlebit2/quantize/config.py",
        "python/_littlebit2_autoregister.py",
        "python/littlebit2_autoregister.pth",
        "cmake/littlebit2-config.cmake.in",
        "examples/cpp/CMakeLists.txt",
    }
    assert needed | packages <= inside
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]
