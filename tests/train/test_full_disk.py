"""A full disk while a model is trained: what could not be written, and what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from littlebit2.disk import RunError
from littlebit2.train.recipe.checkpoints import saving
from littlebit2.train.teacher import store_teacher
from tests.disk.limits import files_up_to


@pytest.mark.parametrize("how", ["torch", "safetensors", "file"])
def test_a_training_checkpoint_is_named(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    value = torch.ones(1000)

    def write() -> None:
        if how == "torch":
            torch.save(value, folder / "optimizer.pt")
        elif how == "safetensors":
            save_file({"a": value}, folder / "model.safetensors")
        else:
            (folder / "trainer_state.json").write_bytes(bytes(4000))

    with (
        files_up_to(1000),
        pytest.raises(RunError, match=r"checkpoint .*/checkpoint-4: .* [GM]B free\. Free some and run"),
        saving(folder),
    ):
        write()


def test_other_errors_while_saving_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA error"), saving(Path("checkpoint-4")):
        raise RuntimeError("CUDA error")


class Blocks:
    length, start = 16, 0

    def __len__(self) -> int:
        return 10


def test_a_stored_teacher_finds_its_space_before_it_is_computed(tmp_path: Path) -> None:
    with files_up_to(1000), pytest.raises(OSError, match=r"cannot write .*teacher: File too large"):
        store_teacher(nn.Module(), Blocks(), tmp_path / "teacher", k=8)  # type: ignore[arg-type]
    assert not (tmp_path / "teacher" / "teacher.json").exists()
