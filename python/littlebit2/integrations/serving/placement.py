"""Which part of a layer a tensor-parallel rank holds: rows, columns, or all of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from littlebit2_kernels import PackedLinear, select_rows, slice_columns, slice_rows

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """This rank's part of a module.

    Attributes:
        names: of the packed layers, for messages.
        rank: index of this rank.
        ranks: number of ranks that divide the module, 1 for a replicated one.
        in_features: K of the whole.
        sizes: outputs of this rank, for each output that the module holds side by side.
        pieces: for each of these outputs, which piece this rank has, and of how many: fewer than there are
            ranks where heads are replicated.
        by_columns: whether inputs are divided instead of outputs.
    """

    names: tuple[str, ...]
    rank: int
    ranks: int
    in_features: int
    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    by_columns: bool = False

    @classmethod
    def whole(cls, names: Sequence[str], in_features: int, sizes: Sequence[int]) -> Placement:
        """A module that every rank has all of."""
        return cls(tuple(names), 0, 1, in_features, tuple(sizes), ((0, 1),) * len(sizes))

    @classmethod
    def by_inputs(
        cls, names: Sequence[str], in_features: int, sizes: Sequence[int], rank: int, ranks: int
    ) -> Placement:
        """A module whose inputs are divided among ranks."""
        pieces = ((0, 1),) * len(sizes)
        return cls(tuple(names), rank, ranks, in_features, tuple(sizes), pieces, by_columns=True)

    @property
    def full_sizes(self) -> list[int]:
        """Outputs of the whole module, all ranks together."""
        return [size * count for size, (_, count) in zip(self.sizes, self.pieces, strict=True)]

    def check(self, packed: Sequence[PackedLinear]) -> None:
        """Raise ``ValueError`` unless the layers have the sizes of the module."""
        outputs = self.full_sizes if len(packed) == len(self.sizes) else [sum(self.full_sizes)]
        if len(packed) != len(outputs):
            raise ValueError(
                f"{self.names[0]}: the module has {len(self.sizes)} outputs side by side, "
                f"the checkpoint {len(packed)} layers for it"
            )
        for name, layer, size in zip(self.names, packed, outputs, strict=True):
            expected, got = (self.in_features, size), (layer.in_features, layer.out_features)
            if expected != got:
                raise ValueError(f"{name}: (in_features, out_features) must be {expected}, got {got}")

    def rows(self, packed: Sequence[PackedLinear]) -> list[PackedLinear]:
        """This rank's outputs: of each layer its piece, or of one layer its pieces of each output."""
        if self.ranks == 1:
            return list(packed)
        bounds = [
            (size * index, size * (index + 1))
            for size, (index, _) in zip(self.sizes, self.pieces, strict=True)
        ]
        if len(packed) == len(bounds):
            return [slice_rows(layer, *pair) for layer, pair in zip(packed, bounds, strict=True)]
        begins = itertools.accumulate(self.full_sizes[:-1], initial=0)
        ranges = [(begin + start, begin + stop) for begin, (start, stop) in zip(begins, bounds, strict=True)]
        return [select_rows(packed[0], ranges)]

    def columns(self, packed: PackedLinear) -> PackedLinear:
        """This rank's inputs, with the whole bias."""
        size = self.in_features // self.ranks
        return slice_columns(packed, size * self.rank, size * (self.rank + 1), keep_bias=True)
