"""``python -m benchmarks attention``: one row at each length, all candidates in it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.attention import READ, measure, parse_heads, table
from benchmarks.timing import UnitTimer


def test_rows_and_their_table():
    rows = measure(torch.bfloat16, 1, (4, 2), 16, [3, 40], repetitions=1, cold_bytes=1, timer=UnitTimer())
    assert [row.keys for row in rows] == [3, 40]
    assert [row.nbytes for row in rows] == [2 * 2 * 3 * 16 * 2, 2 * 2 * 40 * 16 * 2]
    assert READ in rows[0].seconds
    lines = table(rows).splitlines()
    assert len(lines) == 4
    assert "4/2" in lines[2]
    assert "1.0x" in lines[2]


@pytest.mark.parametrize("text", ["32", "32/0", "a/b", "6/4"])
def test_heads(text):
    with pytest.raises(ValueError, match="heads must be"):
        parse_heads(text)
    assert parse_heads("8/2") == (8, 2)
