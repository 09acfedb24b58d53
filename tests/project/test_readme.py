"""Every command of README.md runs, in its order, from the files that a reader has.

Commands are taken from the page. One that is new there is run too, and must work; one that no test can run is
in ``NOT_RUN``, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import pytest

from tests.train.builders import write_teacher, write_text

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")

#: What no test can run, by how it begins, and why.
NOT_RUN = {
    "y = out_scale * ": "a formula",
    "pip install ": "brings packages, which `make` has installed (.ci/wheel.py tries a wheel without them)",
    "LB2_CUDA=on ": "compiles for minutes with nvcc (tests/kernels/test_cuda_build.py does)",
    "make wheels": "builds everything again (.ci/run does)",
    "make demo": "brings a model (tests/benchmarks/quality/test_demo.py runs it on a tiny one)",
    "make test": "runs this test",
    "vllm serve ": "needs vLLM (`make test-serving` does)",
    "python -m benchmarks ": "takes an hour and 20 GB (tests/benchmarks runs it on small shapes)",
}

#: Options that make a command quick on a tiny model, by how it begins.
QUICK = {
    "littlebit2 quantize ": "--minutes 0.01 --held-out 2 --length 32 --admm-iterations 2",
    "littlebit2 write-text ": "--tokens 64 --length 16",
    "littlebit2 finetune ": "--steps 1 --block 32 --log-steps 1 --save-steps 1 --no-tensorboard",
    "littlebit2 evaluate ": "--max-tokens 256",
    "littlebit2 generate ": "--max-new-tokens 4",
}

#: What is run a second time in the root of a clone: the quick ones, which might find modules not built there.
ALSO_IN_CLONE = (
    "littlebit2 doctor",
    "littlebit2 plan ",
    "littlebit2 generate ",
    "python -m littlebit2_kernels",
)

_PROGRAM = r"(?:\w+=\S+ )*(?:littlebit2|python3?|pip|make|vllm|torchrun|cmake|git|bash|sh|\.\S*/\S+) "
#: Python in running text that works on what the commands have made.
_CALL = r"[\w.]+\(\"OUT\"\)"
_IMPORTS = "import littlebit2\nfrom transformers import AutoModelForCausalLM\n"


@dataclass(frozen=True)
class Command:
    """A command of the page: a line for the shell, or Python."""

    text: str
    is_python: bool = False

    def begins(self, table: Iterable[str]) -> str | None:
        """Return the entry of a table that the command begins with."""
        return next((start for start in table if self.text.startswith(start)), None)

    def arguments(self) -> list[str]:
        if self.is_python:
            return ["python", "-c", self.text]
        quick = self.begins(QUICK)
        return ["bash", "-c", self.text if quick is None else f"{self.text} {QUICK[quick]}"]


def commands(page: str) -> Iterator[Command]:
    """The commands of a page, in order: code in fences, indented lines, and code in running text."""
    code = r"^```(\w*)\n([\s\S]*?)^```$|^    (\S.*)$|`([^`]+)`"
    for language, fenced, indented, inline in re.findall(code, page, re.MULTILINE):
        if language == "python":
            yield Command(fenced, is_python=True)
        for line in [*fenced.splitlines(), indented] if language != "python" else []:
            if command := re.sub(r"\s+# .*", "", line).strip():
                yield Command(command)
        flat = " ".join(inline.split())
        if re.fullmatch(_CALL, flat):
            yield Command(_IMPORTS + flat, is_python=True)
        elif re.match(_PROGRAM, flat):
            yield Command(flat)


@dataclass(frozen=True)
class Reader:
    """Who follows the page, in a folder of their own."""

    folder: Path

    def runs(self, command: Command, where: Path) -> None:
        done = subprocess.run(
            command.arguments(),
            cwd=where,
            # The programs of the environment that this test runs in: activated, as it were. An editable
            # install is in no folder of the path, where a clone looks for an installed package; a wheel is.
            env={
                **os.environ,
                "PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"])),
                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "python"))),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert "Traceback" not in done.stderr, f"{command.text}\n{done.stderr[-4000:]}"


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """With a model, and text, under the names of the page."""
    folder = tmp_path / "reader"
    (folder / "texts").mkdir(parents=True)
    write_teacher(folder / "MODEL_DIR", num_key_value_heads=2)
    write_text(folder / "texts" / "one.txt", 2000)
    write_text(folder / "texts" / "two.md", 2000, seed=1)
    write_text(folder / "held_out.txt", 500, seed=2)
    return Reader(folder)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The Python of a clone from which the package was installed elsewhere: there, nothing was compiled."""
    folder = tmp_path / "clone"
    unbuilt = shutil.ignore_patterns("lib", "include", "__pycache__", "*.egg-info")
    for name in ("littlebit2_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=unbuilt)
    return folder


def in_sessions(found: Iterable[Command]) -> Iterator[Command]:
    """The same commands, with Python that follows Python in one process: a third of the time is imports."""
    for is_python, together in groupby(found, key=lambda command: command.is_python):
        if is_python:
            yield Command("\n".join(command.text for command in together), is_python=True)
        else:
            yield from together


def test_every_command_runs(reader: Reader, clone: Path) -> None:
    todo = [command for command in dict.fromkeys(commands(README)) if not command.begins(NOT_RUN)]
    for command in in_sessions(todo):
        reader.runs(command, reader.folder)
    again = [Command("littlebit2 --version"), *(one for one in todo if one.begins(ALSO_IN_CLONE))]
    there = [replace(one, text=re.sub(r"\bOUT\b", str(reader.folder / "OUT"), one.text)) for one in again]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda command: reader.runs(command, clone), there):
            pass


def test_tables_are_current() -> None:
    found = list(commands(README))
    for table in (NOT_RUN, QUICK, ALSO_IN_CLONE):
        unused = [start for start in table if not any(command.text.startswith(start) for command in found)]
        assert not unused, f"no command of README.md begins with {unused}"
    assert all(reason for reason in NOT_RUN.values())


def test_commands_are_found_wherever_they_stand() -> None:
    page = """
```python
import torch
```

```bash
littlebit2 doctor
```

    littlebit2 plan X --bpw 0.1      # `not this`

Or `X=1 python -m
littlebit2 --version`, `make it`, `load("OUT")`, not `make` or `--head`.
"""
    assert list(commands(page)) == [
        Command("import torch\n", is_python=True),
        Command("littlebit2 doctor"),
        Command("littlebit2 plan X --bpw 0.1"),
        Command("X=1 python -m littlebit2 --version"),
        Command("make it"),
        Command(_IMPORTS + 'load("OUT")', is_python=True),
    ]
