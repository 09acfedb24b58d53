"""What the paths made so far leave of a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from littlebit2_kernels.format import PackedPath

from .importance import Importance
from .solvers.dual_svid import add_path
from .solvers.numerics import binary_exponent, check_matrix, normalized, squared_norm
from .solvers.target import NarrowTarget, Target

__all__ = ["Residual", "unweighted", "weight_exponent"]

#: Weights of fewer entries are copied to the computing dtype at once: what that takes is small.
_LARGE = 2**21


class Residual:
    """The weight at a magnitude of about 1, times its importance, less the paths made so far.

    It can be let go while a step does not need it, and is then loaded and worked out again: beside the
    factors of an SVD it would be what takes most memory. As long as nothing was subtracted, a large weight of
    16 bits stays as it is and is read by blocks.

    Args:
        load: returns the ``[N, K]`` weight, which may be overwritten.
        dtype: to compute in.
        importance: weights of the error.

    Attributes:
        shape: N and K.
        device: where the weight is.
        exponent: the power of two that was taken out.
        paths: what has been subtracted.
        total: squared norm of the weight, without importance.
        weighted_total: the same with it.
        rows, columns: the factors that importance multiplies the weight by.

    Raises:
        TypeError, ValueError: the weight or the importance cannot be used, see :func:`.quantize_weight`.
    """

    def __init__(
        self, load: Callable[[], torch.Tensor], dtype: torch.dtype, importance: Importance | None
    ) -> None:
        weight = load()
        check_matrix("weight", weight)
        self.exponent = weight_exponent(weight)
        self.paths: list[PackedPath] = []
        self._load = load
        self._dtype = dtype
        self._weighted = importance is not None
        self.shape = (weight.shape[0], weight.shape[1])
        self.device = weight.device
        self.rows, self.columns = (importance or Importance()).factors(self.shape, dtype, self.device)
        self._matrix: torch.Tensor | None = None
        self._source: torch.Tensor | None = weight.detach()
        if weight.dtype.itemsize < dtype.itemsize and weight.numel() >= _LARGE:
            (self.total,) = NarrowTarget(weight.detach(), self.exponent, dtype).totals()
            (self.weighted_total,) = self.target().totals()
        else:
            del weight
            matrix = normalized(self._taken(), self.exponent, dtype, in_place=True)
            self.total = squared_norm(matrix)
            self._matrix = self._times_importance(matrix)
            self.weighted_total = squared_norm(self._matrix)

    def target(self) -> Target:
        """Return the residual as what a path is to approximate."""
        if self._source is None or self.paths:
            return Target(self.matrix().unsqueeze(0))
        factors = (self.rows, self.columns) if self._weighted else (None, None)
        return NarrowTarget(self._source, self.exponent, self._dtype, *factors)

    def matrix(self) -> torch.Tensor:
        """Return the residual ``[N, K]``, worked out again if need be."""
        if self._matrix is None:
            matrix = normalized(self._taken(), self.exponent, self._dtype, in_place=True)
            matrix = self._times_importance(matrix)
            for path in self.paths:
                add_path(matrix, path, -1)
            self._matrix = matrix
        return self._matrix

    def _taken(self) -> torch.Tensor:
        """Return the weight, loaded again if need be; it may be overwritten."""
        source = self._load().detach() if self._source is None else self._source
        self._source = None
        return source

    def _times_importance(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.mul_(self.rows.unsqueeze(1)).mul_(self.columns) if self._weighted else matrix

    def release(self) -> None:
        """Let the matrix go until it is asked for again."""
        self._matrix = self._source = None

    def subtract(self, path: PackedPath) -> None:
        """Take a path away."""
        if self._matrix is not None:
            add_path(self._matrix, path, -1)
        self.paths.append(path)

    def errors(self) -> list[float]:
        """Return the squared error that the first, the first two, ... all paths leave, without importance.

        The residual is spent.
        """
        matrix = self.matrix()
        self.release()
        paths = self.plain_paths()
        if self._weighted:
            matrix.div_(self.rows.unsqueeze(1)).div_(self.columns)
        errors = [squared_norm(matrix)]
        for path in reversed(paths[1:]):
            add_path(matrix, path)
            errors.append(squared_norm(matrix))
        return errors[::-1]

    def plain_paths(self) -> list[PackedPath]:
        """Return the paths of the weight itself, without importance."""
        if not self._weighted:
            return self.paths
        return [unweighted(path, self.rows, self.columns) for path in self.paths]


def unweighted(path: PackedPath, rows: torch.Tensor, columns: torch.Tensor) -> PackedPath:
    """Return a path of the weighted weight as one of the weight itself."""
    return replace(path, in_scale=path.in_scale / columns.float(), out_scale=path.out_scale / rows.float())


def weight_exponent(weight: torch.Tensor) -> int:
    """Return the power of two to take out of a weight.

    Raises:
        ValueError: float32 scales cannot hold the magnitude.
    """
    exponent = binary_exponent(weight)
    # float32 holds 2**-126 .. 2**128; the scales of a weight beyond it could not be stored.
    if not -126 <= exponent <= 127:
        raise ValueError(
            "weight must be zero or have its largest magnitude between 2**-126 and 2**128 (float32), "
            f"got one of about 2**{exponent}"
        )
    return exponent
