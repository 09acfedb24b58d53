"""kill -9 before a chosen change of the file system, in a fork of a process that has everything imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
_WRITING = os.O_WRONLY | os.O_RDWR


def changes_of(run: Callable[[Path], object], out: Path, *, kill_before: int = 0) -> int | None:
    """Run ``run(out)`` in a fork, and count its changes of the file system.

    Args:
        run: what is run.
        out: files opened for writing count if this stands in their path.
        kill_before: number of the change before which the fork kills itself; 0: it runs to its end.

    Returns:
        The number of changes, ``None`` if the fork killed itself.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            opened = event == "open" and str(out) in str(args[0]) and args[2] & _WRITING
            if event in _CHANGES or opened:
                count += 1
                if count == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            run(out)
            os.write(writing, str(count).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if told else -signal.SIGKILL), status
    return int(told) if told else None
