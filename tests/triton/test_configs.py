"""Tuned configurations: where they are kept, what is believed of a file, and which entry a shape gets."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.triton import configs
from littlebit2_kernels.triton.configs import Tuned, cache_path, load_table, lookup_in, store_table
from littlebit2_kernels.triton.plan import (
    SPLIT_TOKENS,
    DecodeConfig,
    GemmConfig,
    GemvConfig,
    StageShape,
    XnorConfig,
    decode_config,
    decode_shape,
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
    ("decode", decode_shape(FIRST, LAST), 1, DecodeConfig(1)),
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "_triton_version", lambda: "3.7.1")


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


def test_one_launch_is_taken_for_a_layer_that_was_measured() -> None:
    table = load_table(store_table("GPU", ENTRIES) and "GPU")
    lookup = Tuned(table)
    assert decode_config(FIRST, LAST, GPUS["H200"]) == DecodeConfig(2)
    assert decode_config(FIRST, LAST, GPUS["H200"], lookup) == DecodeConfig(1)
    # Four times the work is another question.
    assert (
        decode_config(StageShape((512, 512), (16384, 16384), last=False), LAST, GPUS["H200"], lookup).launches
        == 2
    )


def test_a_table_is_searched_once_and_compared_with_few_numbers() -> None:
    """So that a number of tokens that is a symbol of torch.compile stays one."""

    asked = []

    class Tokens(int):
        def __le__(self, other: int) -> bool:
            asked.append(other)
            return int(self) <= other

        def __truediv__(self, other: int) -> float:
            raise AssertionError("an arithmetic of its own for every number of tokens")

        __rtruediv__ = __float__ = __truediv__

    table = load_table(store_table("GPU", ENTRIES) and "GPU")
    lookup = Tuned(table)
    for tokens in (1, 5, 9, 64, 200, 256, 257, 1024, 5000, 8193, 10**6):
        expected = lookup_in(table, "gemm float16", LAST, tokens)
        assert lookup("gemm float16", LAST, Tokens(tokens)) == expected
    assert set(asked) == {4, 256, 8192}
    table.clear()
    assert lookup("gemm float16", LAST, 64) == ENTRIES[1][3].__dict__


def test_what_is_tuned_for_fewer_tokens_takes_no_more_memory_and_fits() -> None:
    store_table("GPU", [("gemm float16", FIRST, 512, GemmConfig(64, 128, 8, 4, 3, 16))])
    lookup = Tuned(load_table("GPU"))
    assert gemm_config("float16", FIRST, 512, GPUS["H200"], lookup).splits == 8
    # Splits store a sum for each chunk and token.
    assert gemm_config("float16", FIRST, SPLIT_TOKENS + 1, GPUS["H200"], lookup).splits == 1
    small = GPUS["4090"]
    assert gemm_config("float16", FIRST, 512, small, lookup) == gemm_config("float16", FIRST, 512, small)


def test_entries_are_added_to_those_of_other_shapes() -> None:
    store_table("GPU", ENTRIES[:2])
    store_table("GPU", [(*ENTRIES[0][:3], GemvConfig(64, 16, 2, 4)), *ENTRIES[2:]])
    table = load_table("GPU")
    assert len(table) == len(ENTRIES)
    assert lookup_in(table, "gemv", FIRST, 1) == GemvConfig(64, 16, 2, 4).__dict__


def test_writers_at_the_same_time_lose_nothing() -> None:
    def write(number: int) -> None:
        for step in range(4):
            shape = StageShape((64 << number,), (64 << step,), last=True)
            store_table("GPU", [("xnor", shape, 1, XnorConfig(32, 1, 2))])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_table("GPU")) == 24


def test_what_another_triton_was_tuned_to_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store_table("GPU", ENTRIES)
    monkeypatch.setattr(configs, "_triton_version", lambda: "3.8.0")
    with pytest.warns(UserWarning, match=r"tuned with triton '3.7.1', this is 3.8.0. Remove it"):
        assert load_table("GPU") == []
    with pytest.warns(UserWarning, match="is not used"):
        store_table("GPU", ENTRIES[:1])
    assert len(load_table("GPU")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"", "Expecting value"),
        (b"[" * 100000, "recursion"),
        (b"3", '"entries"'),
        (b"[]", '"entries"'),
        ({"kernel": "other"}, "kernel must begin with one of decode, gemv, gemm, xnor, got 'other'"),
        ({"kernel": 3}, "got 3"),
        ({"kernel": ""}, "got ''"),
        ({"kernel": None}, "got None"),
        ({"config": None}, "an entry must be an object"),
        ({"config": {"block_rows": 1}}, "must have"),
        ({"config": {"block_rows": 0, "splits": 1, "num_warps": 2}}, "block_rows must be a power of two"),
        ({"config": {"block_rows": 48, "splits": 1, "num_warps": 2}}, "from 16 to 1024, got 48"),
        ({"config": {"block_rows": 2**40, "splits": 1, "num_warps": 2}}, "from 16 to 1024"),
        ({"config": {"block_rows": 64, "splits": True, "num_warps": 2}}, "splits must be a power of two"),
        ({"config": {"block_rows": 64, "splits": 2, "num_warps": 2}}, "splits of a last stage must be 1"),
        ({"rows": "many"}, "rows must be a positive integer, got 'many'"),
        ({"tokens": False}, "tokens must be a positive integer, got False"),
        ({"last": 1}, "last must be true or false, got 1"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_file_that_cannot_be_used_gives_one_warning(text: bytes | dict[str, Any], message: str) -> None:
    path = store_table("GPU", ENTRIES[3:4])
    if isinstance(text, dict):
        stored = json.loads(path.read_text())
        stored["entries"][0] |= text
        text = json.dumps(stored).encode()
    path.write_bytes(text)
    with pytest.warns(UserWarning, match="Remove it, or tune again") as caught:
        assert load_table("GPU") == []
    assert len(caught) == 1
    assert message in str(caught[0].message)


def test_a_file_that_may_not_be_read_gives_one_warning() -> None:
    path = cache_path("GPU")
    path.mkdir(parents=True)  # like one without permission, which root has
    with pytest.warns(UserWarning, match="is not used: .*Is a directory"):
        assert load_table("GPU") == []


def test_what_is_stored_is_checked() -> None:
    with pytest.raises(ValueError, match="block_rows must be a power of two from 16 to 1024, got 0"):
        store_table("GPU", [("xnor", LAST, 1, XnorConfig(0, 1, 2))])
    assert load_table("GPU") == []
