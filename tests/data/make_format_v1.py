"""Write the golden sign matrices of packed format v1: signs as text, the same signs as packed bytes.

    python tests/data/make_format_v1.py

Plain Python, written from docs/format.md alone, so that an error shared by the project's own packers
cannot enter the golden. The files are committed; test_golden.py checks that this script still makes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

SIGNS_NAME = "format_v1_signs.txt"
WORDS_NAME = "format_v1_words.bin"

#: Rows and columns: below, at and past a word's end, ranks that are not multiples of 32, a wide row.
SHAPES = [(1, 1), (3, 8), (2, 31), (4, 32), (3, 33), (5, 24), (2, 40), (3, 64), (2, 72), (7, 127), (2, 1000)]


def coin_flips(state: int = 20260101) -> Iterator[bool]:
    """Yield the top bit of a 64-bit linear congruential generator (Knuth's MMIX constants)."""
    while True:
        state = (6364136223846793005 * state + 1442695040888963407) % 2**64
        yield state >> 63 == 1


def matrices() -> list[list[str]]:
    """Return one matrix for every shape as rows of ``+`` and ``-``, then two without a choice."""
    flips = coin_flips()
    made = [["".join("-" if next(flips) else "+" for _ in range(c)) for _ in range(r)] for r, c in SHAPES]
    return [*made, ["-" * 45] * 2, ["+" * 45] * 2]


def pack_row(signs: str) -> bytes:
    """Pack one row: column ``c`` is bit ``c % 32`` of word ``c // 32``, 1 for ``-``, words little-endian."""
    words = []
    for start in range(0, len(signs), 32):
        word = 0
        for bit, sign in enumerate(signs[start : start + 32]):
            word |= (sign == "-") << bit
        words.append(word)
    return struct.pack(f"<{len(words)}I", *words)


def main() -> None:
    """Write both files next to this script."""
    folder = Path(__file__).parent
    text = "\n\n".join("\n".join(matrix) for matrix in matrices())
    (folder / SIGNS_NAME).write_text(text + "\n", "ascii")
    (folder / WORDS_NAME).write_bytes(b"".join(pack_row(row) for matrix in matrices() for row in matrix))


if __name__ == "__main__":
    main()
