"""Importing the package does no work: no CUDA, no compiling, no files read, nothing printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# torch is imported before watching starts: what it does itself is not ours to judge.
WATCHED_IMPORT = """
import importlib, json, sys, warnings
import numpy, torch
before = set(sys.modules)
events = []

def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        events.append(event)
    elif event == "ctypes.dlopen":
        events.append(f"{event} {args[0]}")
    elif event == "open" and isinstance(args[0], str) and not args[0].endswith((".py", ".pyc", ".so")):
        events.append(f"{event} {args[0]}")

warnings.simplefilter("error")
sys.addaudithook(watch)
importlib.import_module(sys.argv[1])
seen = list(events)
print(json.dumps({
    "events": seen,
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def watched_import(module: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT, module], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    (line,) = run.stdout.splitlines()  # anything more was printed by the import
    return json.loads(line)


def test_import_is_free() -> None:
    report = watched_import("littlebit2_kernels")
    assert report["cuda"] is False
    assert report["events"] == []
    # Dynamo and Inductor take about a second to import and bring sympy along.
    assert not {name for name in report["new"] if name.startswith(("torch._dynamo", "torch._inductor"))}
    tops = {name.partition(".")[0] for name in report["new"]}
    assert tops - sys.stdlib_module_names <= {"littlebit2_kernels", "torch", "numpy"}


def test_the_watch_sees_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuning.json").write_text("{}")
    (tmp_path / "busy_package.py").write_text(
        "import subprocess, pathlib, sys\n"
        "pathlib.Path(__file__).with_name('tuning.json').read_text()\n"
        "subprocess.run([sys.executable, '-c', ''], check=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    report = watched_import("busy_package")
    assert "busy_package" in report["new"]
    assert f"open {tmp_path / 'tuning.json'}" in report["events"]
    assert "subprocess.Popen" in report["events"]
