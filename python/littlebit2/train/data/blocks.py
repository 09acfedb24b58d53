"""Blocks of consecutive tokens, as a dataset with a length and an order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .tokens import TokenFile

__all__ = ["TokenBlocks"]


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """The blocks ``start`` to ``stop`` of a file of tokens.

    Args:
        tokens: the file.
        length: T, tokens in a block; those left over at the end of the file are not used.
        start: first block.
        stop: one past the last block, by default all.
        stride: tokens from the begin of a block to that of the next; by default ``length``.

    Raises:
        ValueError: ``length`` is below 2, ``stride`` is not from 1 to ``length``, or there is no block in the
            range.
    """

    def __init__(
        self,
        tokens: TokenFile,
        length: int,
        start: int = 0,
        stop: int | None = None,
        *,
        stride: int | None = None,
    ) -> None:
        if length < 2:
            raise ValueError(f"block must be at least 2 tokens, got {length}")
        if stride is not None and not 1 <= stride <= length:
            raise ValueError(f"stride must be from 1 to the {length} tokens of a block, got {stride}")
        self.stride = length if stride is None else stride
        total = self._count(tokens.tokens, length)
        if total == 0:
            raise ValueError(
                f"data must hold at least one block of {length} tokens, got {tokens.tokens} tokens: "
                "give more text, or shorter blocks"
            )
        self.tokens = tokens
        self.length = length
        self.start = start
        self.stop = total if stop is None else min(stop, total)
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start must be from 0 to below {self.stop}, got {start}")
        self._array: Any = None

    @property
    def total(self) -> int:
        """Blocks in the file."""
        return self._count(self.tokens.tokens, self.length)

    def _count(self, tokens: int, length: int) -> int:
        return max(0, (tokens - length) // self.stride + 1)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` int64 ``[T]`` and ``block``, the number of the block in the file."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        if self._array is None:
            self._array = self.tokens.array()
        block = self.start + index
        first = block * self.stride
        ids = self._array[first : first + self.length]
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "block": torch.tensor(block),
        }

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself.
        return {**self.__dict__, "_array": None}
