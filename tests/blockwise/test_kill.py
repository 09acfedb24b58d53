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

#: Kills itself, time and again, while ranks are measured.
WHILE_RANKS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from littlebit2.blockwise.ranking import settle
from littlebit2.quantize import QuantConfig
from tests.blockwise.builders import run
from tests.harness.killing import changes_of
from tests.offline.builders import contents

model, data, base = map(Path, sys.argv[1:])
CONFIG = QuantConfig(bpw=2.0, budget="kl", method="admm", admm_iterations=5, refine_rounds=1)

def quantize(out):
    run(model, out, data, config=CONFIG, changes={"steps": 2})

def until_ranks(out):
    def stop(*_):
        raise InterruptedError
    settle.measure_kl = stop
    try:
        quantize(out)
    except InterruptedError:
        pass

before = changes_of(until_ranks, base / "short")
changes_of(quantize, base / "whole")
expected = contents(base / "whole")
found = set()
for more in (4, 7):
    out = base / f"killed{more}"
    assert changes_of(quantize, out, kill_before=before + more) is None, more
    found |= {path.name for path in out.with_name(f"{out.name}.partial").iterdir()}
    quantize(out)
    assert contents(out) == expected, more
    assert [path.name for path in base.iterdir() if path.name.startswith(f"{out.name}.")] == [], more
print(*sorted(found))
"""


def outcome(script: str, folder: Path) -> str:
    model, data = write_model(folder / "dense"), write_data(folder / "text.txt")
    base = folder / "runs"
    base.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", script, str(model), str(data), str(base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_killed_runs_go_on(tmp_path: Path) -> None:
    # Files of layers and blocks, hidden states, the checkpoint and its reports.
    assert int(outcome(SOME_CHANGES, tmp_path)) > 40


def test_killed_while_ranks_are_measured(tmp_path: Path) -> None:
    assert {"trials.states.new", "ranks.json"} <= set(outcome(WHILE_RANKS, tmp_path).split())
