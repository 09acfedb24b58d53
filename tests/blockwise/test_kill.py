"""kill -9 at any moment: the same call finishes, byte for byte the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.blockwise.builders import write_data, write_model

#: Kills itself before the k-th change of the file system, for some k, each time in a fork.
SOME_CHANGES = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.blockwise.builders import run
from tests.offline.builders import contents

model, data, base = map(Path, sys.argv[1:])
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
SHORT = {"distill_steps": 2}
WRITING = os.O_WRONLY | os.O_RDWR

def watched(out, number, tell):
    count = 0

    def watch(event, args):
        nonlocal count
        if event in CHANGES or (event == "open" and str(out) in str(args[0]) and args[2] & WRITING):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(watch)
        run(model, out, data, changes=SHORT)
        tell.write_text(str(count))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert watched(base / "whole", 0, base / "count") == 0
total = int((base / "count").read_text())
expected = contents(base / "whole")
for number in (2, total // 3, 2 * total // 3, total - 12):
    out = base / str(number)
    assert watched(out, number, base / "count") == -signal.SIGKILL, number
    run(model, out, data, changes=SHORT)
    assert contents(out) == expected, number
    left = [path.name for path in base.iterdir() if path.name.startswith((f"{number}.", f".{number}."))]
    assert left == [], left
print(total)
"""


def test_killed_runs_go_on(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "dense"), write_data(tmp_path / "text.txt")
    base = tmp_path / "runs"
    base.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", SOME_CHANGES, str(model), str(data), str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Files of layers and blocks, hidden states, the checkpoint and its reports.
    assert int(result.stdout) > 40
