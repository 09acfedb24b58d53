"""A loaded model that was pickled runs in a process that never loaded one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import littlebit2

_CODE = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    print(model.config._attn_implementation, tuple(model(torch.tensor([[5, 6, 7]])).logits.shape[:2]))
"""


def test_pickled_model_in_another_process(path: Path, tmp_path: Path) -> None:
    model = littlebit2.load(path)
    assert model.config._attn_implementation == "littlebit2"
    file = tmp_path / "model.pt"
    torch.save(model, file)
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(file)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split(maxsplit=1) == ["littlebit2", "(1, 3)\n"], done.stderr
