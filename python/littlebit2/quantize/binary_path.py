"""The working state of one path while its signs and scales are improved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from littlebit2_kernels.format import WORD_BITS, PackedPath
from littlebit2_kernels.packing import pack_signs, unpack_signs

__all__ = ["CHUNK", "BinaryFactor", "BinaryPath"]

#: Columns of a factor expanded at a time; a multiple of the word size, small enough for a processor's cache.
CHUNK = 16 * WORD_BITS


@dataclass(eq=False)
class BinaryFactor:
    """One side of a path: ``sign(U)^T`` with ``out_scale``, or ``sign(V)`` with ``in_scale``.

    Attributes:
        words: packed signs ``[R, ceil(n / 32)]``, by latents.
        scale: ``[n]``.
    """

    words: torch.Tensor
    scale: torch.Tensor

    def chunks(self) -> Iterator[slice]:
        """Yield slices of the ``n`` entries to work on at a time."""
        size = self.scale.numel()
        for start in range(0, size, CHUNK):
            yield slice(start, min(start + CHUNK, size))

    def signs(self, entries: slice) -> torch.Tensor:
        """Return the signs ``[R, c]`` of a chunk."""
        return unpack_signs(
            self.words[:, _words(entries)].contiguous(), entries.stop - entries.start, self.scale.dtype
        )

    def set_signs(self, entries: slice, values: torch.Tensor) -> None:
        """Take over the signs of ``values`` ``[R, c]`` for a chunk."""
        self.words[:, _words(entries)] = pack_signs(values)

    def dense(self, entries: slice, latent: torch.Tensor) -> torch.Tensor:
        """Return ``latent * signs * scale`` ``[R, c]`` of a chunk."""
        return self.signs(entries).mul_(self.scale[entries]).mul_(latent.unsqueeze(1))

    def gram(self, latent: torch.Tensor) -> torch.Tensor:
        """Return ``F F^T`` ``[R, R]`` of the whole dense factor ``F``, which is never formed."""
        total = latent.new_zeros(latent.numel(), latent.numel())
        for entries in self.chunks():
            part = self.dense(entries, latent)
            total.addmm_(part, part.T)
        return total

    def project(self, rows: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """Return ``F rows^T`` ``[R, c]`` for a few rows ``[c, n]``."""
        total = latent.new_zeros(latent.numel(), rows.shape[0])
        for entries in self.chunks():
            total.addmm_(self.dense(entries, latent), rows[:, entries].T)
        return total


@dataclass(eq=False)
class BinaryPath:
    """``diag(left.scale) left.signs^T diag(latent) right.signs diag(right.scale)``.

    Attributes:
        left: the factor of the ``N`` outputs.
        right: the factor of the ``K`` inputs.
        latent: ``[R]``.
    """

    left: BinaryFactor
    right: BinaryFactor
    latent: torch.Tensor

    @classmethod
    def from_packed(cls, path: PackedPath, dtype: torch.dtype) -> BinaryPath:
        """Take a path apart; scales become ``dtype``.

        Raises:
            ValueError: the path has a single stage.
        """
        if path.u is None or path.latent_scale is None:
            raise ValueError("path must have two stages, got a single-stage path")
        left = torch.empty_like(path.v[:, :1]).expand(-1, -(-path.out_features // WORD_BITS)).contiguous()
        factor = BinaryFactor(left, path.out_scale.to(dtype, copy=True))
        for rows in factor.chunks():
            factor.set_signs(rows, unpack_signs(path.u[rows], path.rank, torch.int8).T)
        right = BinaryFactor(path.v.clone(), path.in_scale.to(dtype, copy=True))
        return cls(factor, right, path.latent_scale.to(dtype, copy=True))

    @classmethod
    def random(
        cls, target: torch.Tensor, rank: int, magnitude: float, generator: torch.Generator
    ) -> BinaryPath:
        """Return random signs, drawn on the CPU, for a target ``[N, K]``.

        The entries of their product have a root mean square of ``magnitude``.
        """

        def factor(size: int) -> BinaryFactor:
            draw = torch.randint(0, 2, (rank, size), generator=generator, dtype=torch.int8)
            return BinaryFactor(pack_signs(draw.mul_(2).sub_(1)).to(target.device), target.new_ones(size))

        left, right = factor(target.shape[0]), factor(target.shape[1])
        return cls(left, right, target.new_full((rank,), magnitude / rank**0.5))

    def packed(self) -> PackedPath:
        """Return the path as it is stored: scales in float32, signs of outputs by rows.

        The scales of inputs and outputs get a root mean square of 1. Negative ones stay as they are.
        """
        out_rms, in_rms = _rms(self.left.scale), _rms(self.right.scale)
        rank = self.latent.numel()
        u = torch.empty(
            (self.left.scale.numel(), -(-rank // WORD_BITS)), dtype=torch.int32, device=self.latent.device
        )
        for rows in self.left.chunks():
            u[rows] = pack_signs(self.left.signs(rows).T)
        return PackedPath(
            v=self.right.words.clone(),
            u=u,
            in_scale=(self.right.scale / in_rms).float(),
            latent_scale=(self.latent.double() * out_rms.double() * in_rms.double()).float(),
            out_scale=(self.left.scale / out_rms).float(),
        )


def _words(entries: slice) -> slice:
    return slice(entries.start // WORD_BITS, -(-entries.stop // WORD_BITS))


def _rms(vector: torch.Tensor) -> torch.Tensor:
    rms = torch.linalg.vector_norm(vector) / vector.numel() ** 0.5
    return torch.where(rms > 0, rms, 1)
