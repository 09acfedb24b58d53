"""The working state of a path of several layers while signs and scales are improved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from littlebit2_kernels.format import WORD_BITS, PackedPath
from littlebit2_kernels.packing import pack_signs, unpack_signs

__all__ = [
    "EXPANDED_ENTRIES",
    "WHOLE_COLUMNS",
    "BinaryFactor",
    "BinaryPath",
    "Parts",
    "chunk_columns",
    "gram",
    "project",
]

#: Columns of a large factor expanded at a time; a multiple of the word size, small enough for a processor's
#: cache.
CHUNK = 16 * WORD_BITS

#: Factors of up to this many entries keep their signs as numbers: expanding words would take most time there,
#: and the memory is small.
EXPANDED_ENTRIES = 2**20


#: Columns up to which such a factor is worked on in one piece: a block of the target goes with every column.
WHOLE_COLUMNS = 2048


#: The chunks ``[B, R, c]`` of a dense factor with the entries that they are.
Parts = Iterable[tuple[slice, torch.Tensor]]


class BinaryFactor:
    """One side of a path, for a batch of ``B`` layers: ``sign(U)^T`` with ``out_scale``, or ``sign(V)``.

    Args:
        words: packed signs ``[B, R, ceil(n / 32)]``, by latents.
        scale: ``[B, n]``, float32 or float64.

    Attributes:
        scale: likewise.
        is_small: whether one layer's factor has at most :data:`EXPANDED_ENTRIES` entries.
    """

    def __init__(self, words: torch.Tensor, scale: torch.Tensor) -> None:
        self.scale = scale
        self.is_small = words.shape[1] * scale.shape[1] <= EXPANDED_ENTRIES
        self._words = words
        if self.is_small:  # [B, R, n]
            self._words = unpack_signs(words.contiguous(), scale.shape[1], scale.dtype)

    @property
    def size(self) -> int:
        """``n``, the entries of one layer's scale."""
        return self.scale.shape[1]

    @property
    def words(self) -> torch.Tensor:
        """The packed signs ``[B, R, ceil(n / 32)]``."""
        return pack_signs(self._words) if self.is_small else self._words

    def chunks(self) -> Iterator[slice]:
        """Yield slices of the ``n`` entries to work on at a time."""
        size = self.scale.shape[1]
        whole = self.is_small and size <= WHOLE_COLUMNS
        step = size if whole else chunk_columns(self._words.shape[1])
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))

    def signs(self, entries: slice) -> torch.Tensor:
        """Return a copy of the signs ``[B, R, c]`` of a chunk."""
        if self.is_small:
            return self._words[:, :, entries].clone()
        words = self._words[:, :, _words(entries)].contiguous()
        return unpack_signs(words, entries.stop - entries.start, self.scale.dtype)

    def set_signs(self, entries: slice, values: torch.Tensor) -> None:
        """Take over the signs of ``values`` ``[B, R, c]`` for a chunk; zero counts as positive."""
        if self.is_small:
            one = self.scale.new_ones(())
            torch.copysign(one, values + 0.0, out=self._words[:, :, entries])  # -0.0 becomes 0.0
        else:
            self._words[:, :, _words(entries)] = pack_signs(values)

    def dense(self, entries: slice, latent: torch.Tensor) -> torch.Tensor:
        """Return ``latent * signs * scale`` ``[B, R, c]`` of a chunk."""
        return self.signs(entries).mul_(self.scale[:, entries].unsqueeze(1)).mul_(latent.unsqueeze(2))

    def parts(self, latent: torch.Tensor) -> Parts:
        """Return :meth:`dense` of every chunk, made once if that is small, else anew in every pass."""
        return (
            [(c, self.dense(c, latent)) for c in self.chunks()] if self.is_small else _LazyParts(self, latent)
        )

    def select(self, which: Sequence[int]) -> BinaryFactor:
        """Return a copy of the factors of some layers of the batch."""
        one = object.__new__(BinaryFactor)
        one.scale, one.is_small = self.scale[list(which)], self.is_small
        one._words = self._words[list(which)]
        return one

    def assign(self, which: Sequence[int], other: BinaryFactor) -> None:
        """Take over what :meth:`select` gave and was changed since."""
        self.scale[list(which)] = other.scale
        self._words[list(which)] = other._words


class _LazyParts:
    """The chunks of a dense factor, of which one at a time is in memory."""

    def __init__(self, factor: BinaryFactor, latent: torch.Tensor) -> None:
        self._factor, self._latent = factor, latent

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        return ((entries, self._factor.dense(entries, self._latent)) for entries in self._factor.chunks())


def gram(parts: Parts, latent: torch.Tensor) -> torch.Tensor:
    """Return ``F F^T`` ``[B, R, R]`` of dense factors ``F`` given by parts."""
    total = latent.new_zeros(*latent.shape, latent.shape[1])
    for _, part in parts:
        total.baddbmm_(part, part.mT)
    return total


def project(parts: Parts, rows: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Return ``F rows^T`` ``[B, R, c]`` for a few rows ``[B, c, n]``."""
    total = latent.new_zeros(*latent.shape, rows.shape[1])
    for entries, part in parts:
        total.baddbmm_(part, rows[:, :, entries].mT)
    return total


class BinaryPath:
    """``diag(left.scale) left.signs^T diag(latent) right.signs diag(right.scale)``, for ``B`` layers.

    Args:
        left: the factors of the ``N`` outputs.
        right: the factors of the ``K`` inputs.
        latent: ``[B, R]``.
    """

    def __init__(self, left: BinaryFactor, right: BinaryFactor, latent: torch.Tensor) -> None:
        self.left, self.right, self.latent = left, right, latent

    @property
    def factors(self) -> tuple[BinaryFactor, BinaryFactor]:
        """Left and right, in the order of a target's axes."""
        return self.left, self.right

    @classmethod
    def from_packed(cls, paths: Sequence[PackedPath], dtype: torch.dtype) -> BinaryPath:
        """Take paths of one shape apart; scales become ``dtype``.

        Raises:
            ValueError: a path has a single stage.
        """
        words = [_words_by_latents(path) for path in paths]

        def stacked(name: str) -> torch.Tensor:
            return torch.stack([getattr(path, name).to(dtype) for path in paths])

        left = BinaryFactor(torch.stack(words), stacked("out_scale"))
        right = BinaryFactor(torch.stack([path.v for path in paths]), stacked("in_scale"))
        return cls(left, right, stacked("latent_scale"))

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        rank: int,
        magnitudes: Sequence[float],
        generators: Sequence[torch.Generator],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> BinaryPath:
        """Return random signs, drawn on the CPU, one layer from each generator.

        Args:
            shape: N and K.
            rank: R.
            magnitudes: root mean squares of the entries of each layer's product.
            generators: as many.
            dtype: of the scales.
            device: where the path is to be.
        """

        def draw(size: int, generator: torch.Generator) -> torch.Tensor:
            signs = torch.randint(0, 2, (rank, size), generator=generator, dtype=torch.int8)
            return pack_signs(signs.mul_(2).sub_(1))

        drawn = [[draw(size, one) for size in shape] for one in generators]
        left, right = (
            BinaryFactor(
                torch.stack([layer[side] for layer in drawn]).to(device),
                torch.ones(len(drawn), size, dtype=dtype, device=device),
            )
            for side, size in enumerate(shape)
        )
        latent = torch.tensor(magnitudes, dtype=dtype, device=device) / rank**0.5
        return cls(left, right, latent.unsqueeze(1).repeat(1, rank))

    def packed(self) -> list[PackedPath]:
        """Return each layer's path as it is stored: scales in float32, signs of outputs by rows.

        The scales of inputs and outputs get a root mean square of 1. Negative ones stay as they are.
        """
        size, rank = self.latent.shape
        out_rms, in_rms = _rms(self.left.scale), _rms(self.right.scale)
        u = torch.empty(
            (size, self.left.scale.shape[1], -(-rank // WORD_BITS)),
            dtype=torch.int32,
            device=self.latent.device,
        )
        for rows in self.left.chunks():
            u[:, rows] = pack_signs(self.left.signs(rows).mT)
        v = self.right.words
        in_scale, out_scale = (self.right.scale / in_rms).float(), (self.left.scale / out_rms).float()
        latent = (self.latent.double() * out_rms.double() * in_rms.double()).float()
        return [
            PackedPath(
                v=v[i].clone(),
                u=u[i].clone(),
                in_scale=in_scale[i].clone(),
                latent_scale=latent[i].clone(),
                out_scale=out_scale[i].clone(),
            )
            for i in range(size)
        ]

    def select(self, which: Sequence[int]) -> BinaryPath:
        """Return a copy of the paths of some layers of the batch."""
        return BinaryPath(self.left.select(which), self.right.select(which), self.latent[list(which)])

    def assign(self, which: Sequence[int], other: BinaryPath) -> None:
        """Take over what :meth:`select` gave and was changed since."""
        self.left.assign(which, other.left)
        self.right.assign(which, other.right)
        self.latent[list(which)] = other.latent


def _words_by_latents(path: PackedPath) -> torch.Tensor:
    """Return the signs of outputs ``[R, ceil(N / 32)]``."""
    if path.u is None or path.latent_scale is None:
        raise ValueError("path must have two stages, got a single-stage path")
    words = torch.empty(
        (path.rank, -(-path.out_features // WORD_BITS)), dtype=torch.int32, device=path.u.device
    )
    for start in range(0, path.out_features, CHUNK):
        rows = slice(start, min(start + CHUNK, path.out_features))
        words[:, _words(rows)] = pack_signs(unpack_signs(path.u[rows], path.rank, torch.int8).T)
    return words


def chunk_columns(rank: int) -> int:
    """Return how many columns are expanded at a time: 2 MB in float32 at most, but no fewer than 256."""
    return max(CHUNK // 2, min(CHUNK, 2**19 // rank // WORD_BITS * WORD_BITS))


def _words(entries: slice) -> slice:
    return slice(entries.start // WORD_BITS, -(-entries.stop // WORD_BITS))


def _rms(vectors: torch.Tensor) -> torch.Tensor:
    rms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True) / vectors.shape[1] ** 0.5
    return torch.where(rms > 0, rms, 1)
