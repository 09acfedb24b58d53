"""The latent rotation: joint iterative quantization of both factors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from littlebit2_kernels.packing import pack_signs, unpack_signs

from .numerics import binary_exponent, check_matrix, squared_norm, times_power_of_two
from .polar import PolarMethod, polar_factor

__all__ = ["LatentRotation", "joint_itq", "random_rotation"]

#: Rows of the latent factors worked on at a time, so that their rotated copy is never whole.
_BLOCK_ROWS = 512

#: How far the signs look ahead along the last step. The plain iteration creeps: at 0.9 about 8 steps reach
#: what 50 plain ones do (docs/quantization.md).
_LOOK_AHEAD = 0.9


@dataclass(frozen=True, eq=False)
class LatentRotation:
    """A rotation of the latent space and what it does to the two factors.

    Attributes:
        rotation: ``[R, R]``, orthogonal.
        a: ``[N, R]``, the rotated ``a @ rotation``.
        b: ``[R, K]``, the rotated ``rotation.T @ b``; the product with ``a`` is unchanged.
        objective: the alignment ``|Z R|_1 / (sqrt(numel) |Z|_F)`` in [0, 1] of ``Z = [a; b.T]``, 1 where all
            entries share one magnitude: under the starting rotation, a lower bound of it after every
            iteration, and last that of the factors handed back. It never falls.
        converged: whether a fixed point of the plain iteration was reached before the iterations ran out.
    """

    rotation: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    objective: tuple[float, ...]
    converged: bool


def joint_itq(
    a: torch.Tensor,
    b: torch.Tensor,
    iterations: int = 20,
    *,
    generator: torch.Generator | None = None,
    polar: PolarMethod = "auto",
    look_ahead: float = _LOOK_AHEAD,
    in_place: bool = False,
) -> LatentRotation:
    """Rotate the latent space so that both factors lose least to their signs (Joint-ITQ).

    LittleBit-2 (arXiv 2603.00042), internal latent rotation: from a random rotation, alternate
    ``B = sign(Z R)`` and ``R = polar(Z.T B)``, the orthogonal Procrustes solution, for
    ``Z = [a; b.T]``. Both halves of a step can only raise ``|Z R|_1``.

    Signs are taken ahead of the last step, ``sign(Z (R + look_ahead (R - R_before)))``, as in Nesterov's
    gradient method. A step that lowers the objective is taken back and done without that. 0 is the
    iteration of the paper.

    Args:
        a: ``[N, R]``, float32 or float64.
        b: ``[R, K]``, like ``a``.
        iterations: most iterations; 0 keeps the random starting rotation.
        generator: CPU generator of the starting rotation, so that it is the same on every device.
        polar: see :func:`.polar_factor`.
        look_ahead: share of the last step, in [0, 1).
        in_place: write the result into ``a`` and ``b``, which saves the memory of a copy.

    Raises:
        TypeError: ``a`` or ``b`` is not a real floating-point tensor.
        ValueError: ``a`` and ``b`` do not share R, hold NaN or infinity, ``iterations`` is negative, or
            ``look_ahead`` is outside [0, 1).
    """
    check_matrix("a", a)
    check_matrix("b", b)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b.size(0) must equal a.size(1) = {a.shape[1]}, got {b.shape[0]}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0, got {iterations}")
    if not 0 <= look_ahead < 1:
        raise ValueError(f"look_ahead must be in [0, 1), got {look_ahead}")
    z = _Rows([*a.split(_BLOCK_ROWS), *b.T.split(_BLOCK_ROWS)], max(binary_exponent(a), binary_exponent(b)))
    rotation = random_rotation(a.shape[1], generator=generator).to(a)
    total, negative = z.rotated_signs(rotation)
    reached = [total]
    moving = False  # whether the signs were taken ahead of the rotation
    converged = False
    for _ in range(iterations):
        correlation = z.correlation(negative)
        following = polar_factor(correlation, polar)
        bound = float((following * correlation).sum(dtype=torch.float64))  # at most |Z following|_1
        del correlation
        fell = moving and bound < reached[-1]
        reached.append(max(bound, reached[-1]))
        ahead = rotation if fell else torch.lerp(following, rotation, -look_ahead)
        moving = not (fell or torch.equal(following, rotation))
        rotation = rotation if fell else following
        del following
        before, (_, negative) = negative, z.rotated_signs(ahead)
        del ahead
        # The same signs give the same rotation again; looking ahead may have been what kept them.
        converged = not (fell or moving) and all(map(torch.equal, negative, before))
        if converged:
            break
    if not in_place:
        a, b = a.clone(), b.clone()
    for block in (*a.split(_BLOCK_ROWS), *b.T.split(_BLOCK_ROWS)):
        block.copy_(block @ rotation)
    if iterations:
        rotated = _Rows([*a.split(_BLOCK_ROWS), *b.T.split(_BLOCK_ROWS)], z.exponent)
        reached.append(max(rotated.absolute_sum(), reached.pop()))
    largest = z.largest_sum
    objective = tuple(total / largest if largest else 0.0 for total in reached)
    return LatentRotation(rotation, a, b, objective, converged)


class _Rows:
    """``Z = [a; b.T] 2^-exponent`` as blocks of rows, which are views."""

    def __init__(self, blocks: list[torch.Tensor], exponent: int) -> None:
        self.blocks = blocks
        self.exponent = exponent
        squares = math.fsum(squared_norm(self._scaled(block)) for block in blocks)
        #: What ``|Z|_1`` would be if all entries had one magnitude.
        self.largest_sum = math.sqrt(squares * sum(block.numel() for block in blocks))

    def _scaled(self, block: torch.Tensor) -> torch.Tensor:
        return times_power_of_two(block, -self.exponent)

    def absolute_sum(self) -> float:
        """Return ``|Z|_1``."""
        return math.fsum(float(self._scaled(b).abs_().sum(dtype=torch.float64)) for b in self.blocks)

    def rotated_signs(self, rotation: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        """Return ``|Z rotation|_1`` and the signs of ``Z rotation``, packed."""
        sums, signs = [], []
        for block in self.blocks:
            rotated = self._scaled(block) @ rotation
            signs.append(pack_signs(rotated))
            sums.append(float(rotated.abs_().sum(dtype=torch.float64)))
        return math.fsum(sums), signs

    def correlation(self, signs: list[torch.Tensor]) -> torch.Tensor:
        """Return ``Z^T S`` ``[R, R]`` for packed signs ``S``."""
        rank = self.blocks[0].shape[1]
        total = self.blocks[0].new_zeros(rank, rank)
        for block, words in zip(self.blocks, signs, strict=True):
            total.addmm_(self._scaled(block).T, unpack_signs(words, rank, block.dtype))
        return total


def random_rotation(size: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return a float64 ``[size, size]`` orthogonal matrix, uniformly distributed, drawn on the CPU."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    # By its two halves: that way no more than two such matrices are held.
    reflectors, tau = torch.geqrf(gaussian)
    del gaussian
    # QR leaves the signs of R's diagonal to the library; fixing them makes Q uniform and reproducible.
    signs = torch.where(reflectors.diagonal() < 0, -1.0, 1.0).to(reflectors.dtype)
    return torch.linalg.householder_product(reflectors, tau).mul_(signs)
