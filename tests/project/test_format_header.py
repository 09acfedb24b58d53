"""format.h and format.py hold the same constants."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from littlebit2_kernels import format as packed_format

#: Limits and counts of the Python side.
NOT_OF_THE_LAYOUT = {"MAX_DIM", "COUNTED_SCALE_BITS", "STORED_SCALE_BITS"}
HEADER = Path(__file__).parents[2] / "csrc/include/littlebit2/format.h"


def defines(text: str) -> dict[str, int]:
    """The ``#define LB2_NAME integer`` lines of a header, without the prefix."""
    found = re.findall(r"^#define[ \t]+LB2_(\w+)[ \t]+(\S.*)$", text, re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def mirrored() -> dict[str, int]:
    """The integer constants of format.py that describe the layout."""
    return {
        name: value
        for name, value in vars(packed_format).items()
        if name.isupper() and isinstance(value, int) and name not in NOT_OF_THE_LAYOUT
    }


def test_header_and_module_agree() -> None:
    assert defines(HEADER.read_text("utf-8")) == mirrored()


def test_constants_are_those_of_version_1() -> None:
    """A changed constant is another format: it needs a new version, not an edit here."""
    assert mirrored() == {
        "FORMAT_VERSION": 1,
        "WORD_BITS": 32,
        "FIRST_BIT": 0,
        "NEGATIVE_BIT": 1,
        "PAD_BIT": 0,
        "RANK_MULTIPLE": 8,
        "MAX_PATHS": 16,
    }


def test_a_difference_would_be_seen() -> None:
    changed = HEADER.read_text("utf-8").replace("LB2_NEGATIVE_BIT 1", "LB2_NEGATIVE_BIT 0")
    assert defines(changed) != mirrored()
    removed = re.sub(r"#define LB2_PAD_BIT 0\n", "", HEADER.read_text("utf-8"))
    assert defines(removed) != mirrored()


@pytest.mark.parametrize(
    ("cols", "words"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (2**31 - 1, 2**26)]
)
def test_words_per_row(cols: int, words: int) -> None:
    assert packed_format.words_per_row(cols) == words
