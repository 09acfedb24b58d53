"""The packer and unpacker agree with committed bytes that a separate plain-Python packer made."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from littlebit2_kernels.format import pack_signs_reference, unpack_signs_reference, words_per_row

DATA = Path(__file__).parents[1] / "data"
SIGNS = DATA / "format_v1_signs.txt"
WORDS = DATA / "format_v1_words.bin"


def golden() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every golden matrix as (signs, words)."""
    stream = torch.from_numpy(np.frombuffer(WORDS.read_bytes(), "<i4").astype(np.int32))
    cases = []
    for block in SIGNS.read_text("ascii").split("\n\n"):
        signs = torch.tensor([[-1.0 if sign == "-" else 1.0 for sign in row] for row in block.split()])
        shape = (signs.shape[0], words_per_row(signs.shape[1]))
        words, stream = stream[: shape[0] * shape[1]].view(shape), stream[shape[0] * shape[1] :]
        cases.append((signs, words))
    assert stream.numel() == 0
    return cases


CASES = golden()
IDS = ["x".join(map(str, signs.shape)) for signs, _ in CASES]


@pytest.mark.parametrize(("signs", "words"), CASES, ids=IDS)
def test_pack_gives_the_golden_words(signs: torch.Tensor, words: torch.Tensor) -> None:
    assert torch.equal(pack_signs_reference(signs), words)


@pytest.mark.parametrize(("signs", "words"), CASES, ids=IDS)
def test_unpack_gives_the_golden_signs(signs: torch.Tensor, words: torch.Tensor) -> None:
    assert torch.equal(unpack_signs_reference(words, signs.shape[1]), signs)


def test_golden_covers_both_signs_of_every_bit() -> None:
    seen = torch.zeros(2, 32, dtype=torch.bool)
    for signs, _ in CASES:
        columns = torch.arange(signs.shape[1]).expand_as(signs)
        seen[(signs < 0).long(), columns % 32] = True
    assert seen.all()


def test_script_makes_the_committed_files(tmp_path: Path) -> None:
    script = Path(shutil.copy(DATA / "make_format_v1.py", tmp_path))
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    names = runpy.run_path(str(script))
    assert (tmp_path / names["SIGNS_NAME"]).read_bytes() == SIGNS.read_bytes()
    assert (tmp_path / names["WORDS_NAME"]).read_bytes() == WORDS.read_bytes()
