"""kill -9 at any moment: the same call finishes, byte for byte the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.blockwise.builders import write_data, write_model

#: Kills itself before the k-th change of the file system, for some k, each time in a fork.
SOME_CHANGES = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.blockwise.builders import run
from tests.harness.killing import changes_of
from tests.offline.builders import contents

model, data, base = map(Path, sys.argv[1:])
SHORT = {"distill_steps": 2}

def quantize(out):
    run(model, out, data, changes=SHORT)

total = changes_of(quantize, base / "whole")
expected = contents(base / "whole")
for number in (2, total // 3, 2 * total // 3, total - 12):
    out = base / str(number)
    assert changes_of(quantize, out, kill_before=number) is None, number
    quantize(out)
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
