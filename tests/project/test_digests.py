"""What `make test-arm` compares: digests of two builds, in the files that ctest writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "digests.py"


def compare(*folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def write(tmp_path: Path):
    def write_results(name: str, **outputs: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        cases = "".join(
            f'<testcase name="{test}"><system-out>{output}</system-out></testcase>'
            for test, output in outputs.items()
        )
        (folder / "results.xml").write_text(f"<testsuite>{cases}</testsuite>", "utf-8")
        return folder

    return write_results


def printed(digest: str, sets: str) -> str:
    return f"seed 1, instruction sets {sets}\ndigest {digest} of 30 problems\n"


def test_equal_digests_pass_and_say_what_ran(write) -> None:
    first = write("x86", sweep=printed("ab", "scalar avx2"), abi="")
    second = write("arm", sweep=printed("ab", "scalar neon"), refused="error")
    done = compare(first, second)
    assert done.returncode == 0
    assert done.stdout == "the same bits in 30 problems of 1 tests on scalar avx2; scalar neon\n"


def test_a_digest_that_differs_or_lacks_fails_with_its_name(write) -> None:
    first = write("x86", sweep=printed("ab", "scalar"), fused=printed("cd", "scalar"))
    other, fewer = (
        write("other", sweep=printed("ab", "scalar"), fused=printed("ce", "scalar")),
        write("fewer", sweep=printed("ab", "scalar")),
    )
    for second in (other, fewer):
        for pair in ((first, second), (second, first)):
            done = compare(*pair)
            assert done.returncode == 1
            assert done.stdout.startswith("fused: ")


def test_nothing_to_compare_is_an_error(write, tmp_path: Path) -> None:
    good, empty = write("x86", sweep=printed("ab", "scalar")), write("empty", abi="passed")
    assert "no test in" in compare(good, empty).stderr
    assert "results.xml was not found" in compare(tmp_path / "none", good).stderr
    assert "usage" in compare(good).stderr
