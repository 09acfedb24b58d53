"""Hidden states on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from littlebit2.blockwise.states import States
from littlebit2.disk import RunError
from tests.disk.limits import files_up_to


def test_states_come_back(tmp_path: Path, rng: torch.Generator) -> None:
    path, values = tmp_path / "a", torch.randn(3, 4, 5, generator=rng)
    path.with_name("a.new").write_bytes(b"torn")
    states = States(path, (3, 4, 5), create=True)
    states.write([0, 2], values[[0, 2]])
    states.write([1], values[[1]])
    assert not path.exists()
    states.finish()
    assert torch.equal(States(path, (3, 4, 5)).read([2, 1, 0]), values.flip(0))
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_their_space_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            RunError, match=r"cannot write .*/a\.new \(0\.004 MB\): No space .* free; free some and run"
        ):
            States(tmp_path / "a", (10, 10, 10), create=True)
    with files_up_to(1000), pytest.raises(OSError, match=r"cannot write .*/a\.new \(0\.004 MB\)"):
        States(tmp_path / "a", (10, 10, 10), create=True)
    assert not list(tmp_path.iterdir())
