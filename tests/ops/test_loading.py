"""Loading the native library: lazily, once, and with errors that help."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

PRELUDE = "import sys, torch, littlebit2_kernels as lb; from littlebit2_kernels import _native"

#: Prints the error of its body, or "loaded".
GUARD = """
try:
    {body}
except lb.NativeLibraryError as error:
    print(error)
else:
    print('loaded')
"""

NO_CORE = "sys.modules['littlebit2_kernels._native.abi'] = None"


def run(*lines: str) -> str:
    """Run the lines in a process of their own and return what they print."""
    script = "\n".join((PRELUDE, *lines))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_loads_nothing() -> None:
    out = run(
        "print('littlebit2_kernels._native.abi' in sys.modules, hasattr(torch.ops.littlebit2, 'linear'))"
    )
    assert out.split() == ["False", "False"]


def test_load_is_idempotent() -> None:
    out = run("lb.load(); lb.load(); _native.load_ops()", "print(torch.ops.littlebit2.linear.default)")
    assert out.strip() == "littlebit2.linear.default"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # Another copy of the operators in the process, as a second installation would put there.
        ("torch.ops.load_library(_native.ops_library_path())", "defined already by another copy"),
        (
            "from pathlib import Path; _native.ops_library_path = lambda: Path('nowhere/lib.so')",
            "nowhere/lib.so does not exist. Reinstall",
        ),
        (
            "_native.ops_library_path = lambda: __import__('pathlib').Path(__import__('os').__file__)",
            "cannot be loaded under torch",
        ),
        ("_native.__version__ = '9.9'", "is of version .*, the Python package of 9.9: the build is stale"),
        (NO_CORE, "the core library cannot be loaded"),
    ],
    ids=["second-copy", "missing", "not-a-library", "stale", "no-core"],
)
def test_failures_say_what_is_wrong(spoil: str, message: str) -> None:
    assert re.search(message, run(spoil, GUARD.format(body="lb.load()")))


def test_packing_works_without_the_native_module() -> None:
    assert run(NO_CORE, "print(lb.pack_signs(torch.tensor([1.0, -1.0])).tolist())").strip() == "[2]"
    native = GUARD.format(body="lb.pack_signs(torch.ones(1), backend='native')")
    assert "the core library cannot be loaded" in run(NO_CORE, native)
