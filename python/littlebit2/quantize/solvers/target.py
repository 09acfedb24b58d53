"""What paths are to approximate: weights of one shape, read by blocks of rows or of columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .numerics import normalized, squared_norm

__all__ = ["Target", "as_target"]

#: Rows read at a time where all of a target is looked at.
_BLOCK_ROWS = 512


class Target:
    """A batch of ``B`` weights ``[N, K]`` of magnitude about 1.

    Args:
        matrix: ``[B, N, K]``, float32 or float64.

    Attributes:
        size: B.
        shape: N and K.
        dtype: to compute in.
        device: where the weights are.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix
        self.size = matrix.shape[0]
        self.shape = (matrix.shape[1], matrix.shape[2])
        self.dtype, self.device = matrix.dtype, matrix.device

    def block(self, axis: int, entries: slice) -> torch.Tensor:
        """Return rows (axis 0) ``[B, c, K]`` or columns (axis 1) ``[B, c, N]``; not to be written to."""
        return self._matrix[:, entries] if axis == 0 else self._matrix[:, :, entries].mT

    def select(self, which: Sequence[int]) -> Target:
        """Return the target of some of the batch."""
        return Target(self._matrix[list(which)])

    def totals(self) -> list[float]:
        """Return the squared norm of every weight, accumulated in float64."""
        parts = [[squared_norm(one) for one in rows] for rows in self._row_blocks()]
        return [math.fsum(column) for column in zip(*parts, strict=True)]

    def _row_blocks(self) -> Iterator[torch.Tensor]:
        for start in range(0, self.shape[0], _BLOCK_ROWS):
            yield self.block(0, slice(start, min(start + _BLOCK_ROWS, self.shape[0])))


class NarrowTarget(Target):
    """One weight kept in its 16-bit dtype, half of what a float32 copy takes; blocks have the same bits.

    Args:
        source: ``[N, K]``, float16 or bfloat16.
        exponent: of the power of two that is taken out.
        dtype: to compute in.
        rows, columns: factors ``[N]`` and ``[K]`` of importance, or ``None``.
    """

    def __init__(
        self,
        source: torch.Tensor,
        exponent: int,
        dtype: torch.dtype,
        rows: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> None:
        super().__init__(source.unsqueeze(0))
        self.dtype = dtype
        self._exponent = exponent
        self._factors = (rows, columns)

    def block(self, axis: int, entries: slice) -> torch.Tensor:
        """Return rows or columns, as :meth:`Target.block`."""
        part = super().block(axis, entries)[0]
        block = normalized(part, self._exponent, self.dtype)
        mine, other = self._factors if axis == 0 else self._factors[::-1]
        if mine is not None and other is not None:
            # Rows first in either case: the rounding is then that of the whole product.
            first, second = mine[entries].unsqueeze(1), other
            block = block.mul_(first).mul_(second) if axis == 0 else block.mul_(second).mul_(first)
        return block.unsqueeze(0)

    def select(self, which: Sequence[int]) -> Target:
        """Return itself: there is but one weight."""
        del which
        return self


def as_target(matrix: torch.Tensor | Target) -> Target:
    """Return a target of one ``[N, K]`` or several ``[B, N, K]`` weights."""
    if isinstance(matrix, Target):
        return matrix
    return Target(matrix if matrix.dim() == 3 else matrix.unsqueeze(0))
