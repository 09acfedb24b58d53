"""Tuned configurations: where they are kept, what is believed of a file, and which entry a shape gets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.triton import configs
from littlebit2_kernels.triton.configs import cache_path, load_table, lookup_in, store_table
from littlebit2_kernels.triton.plan import (
    GemmConfig,
    GemvConfig,
    StageShape,
    XnorConfig,
    gemm_config,
    gemv_config,
)

FIRST = StageShape((512, 512), (4096, 4096), last=False)
LAST = StageShape((11008, 11008), (512, 512), last=True)
ENTRIES = [
    ("gemv", FIRST, 1, GemvConfig(32, 32, 4, 4)),
    ("gemm float16", LAST, 64, GemmConfig(64, 64, 1, 4, 2, 16)),
    ("gemm float16", LAST, 1024, GemmConfig(128, 128, 1, 8, 2, 16)),
    ("xnor", LAST, 1, XnorConfig(32, 1, 2)),
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_cache_is_the_users_and_versioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_path("NVIDIA H200 (141 GB)")
    assert path == tmp_path / "littlebit2" / f"triton-v{configs.CACHE_VERSION}" / "nvidia-h200-141-gb.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_path("x").is_relative_to(tmp_path / "home" / ".cache")


def test_round_trip(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_table("GPU") == []  # no file, no warning
        path = store_table("GPU", ENTRIES)
        table = load_table("GPU")
    assert len(table) == len(ENTRIES)
    assert path.stat().st_size < 4096
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    assert gemv_config(FIRST, GPUS["H200"], lambda *ask: lookup_in(table, *ask)) == ENTRIES[0][3]
    assert (
        gemm_config("float16", LAST, 64, GPUS["H200"], lambda *ask: lookup_in(table, *ask)) == ENTRIES[1][3]
    )


def test_the_nearest_entry_is_taken_and_far_ones_are_not() -> None:
    store_table("GPU", ENTRIES)
    table = load_table("GPU")
    assert lookup_in(table, "gemm float16", LAST, 100)["block_tokens"] == 64
    assert lookup_in(table, "gemm float16", LAST, 700)["block_tokens"] == 128
    near = StageShape((8192,), (592,), last=True)
    assert lookup_in(table, "gemm float16", near, 64)["block_tokens"] == 64
    assert lookup_in(table, "gemm float16", StageShape((64,), (512,), last=True), 64) is None
    assert lookup_in(table, "gemm float16", LAST, 1) is None
    assert lookup_in(table, "gemm int8", LAST, 64) is None
    assert lookup_in(table, "gemv", LAST, 1) is None  # of the other stage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ('[{"kernel": "gemv"}]', "config"),
        ('[{"kernel": "other", "config": {}}]', "other"),
        ("[3]", "TypeError"),
        ({"config": {"block_rows": 1}}, "must have"),
        ({"config": {"block_rows": 0, "splits": 1, "num_warps": 2}}, "positive integers"),
        ({"rows": "many"}, "rows must be a positive integer, got 'many'"),
        ({"last": 1}, "last must be true or false, got 1"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_used_gives_one_warning(text: str | dict, message: str) -> None:
    path = store_table("GPU", ENTRIES[3:])
    if isinstance(text, dict):
        (entry,) = json.loads(path.read_text())
        text = json.dumps([entry | text])
    path.write_text(text)
    with pytest.warns(UserWarning, match="Remove it, or tune again") as caught:
        assert load_table("GPU") == []
    assert len(caught) == 1
    assert message in str(caught[0].message)


def test_what_is_stored_is_checked() -> None:
    with pytest.raises(ValueError, match="positive integers"):
        store_table("GPU", [("xnor", LAST, 1, XnorConfig(0, 1, 2))])
    assert load_table("GPU") == []
