"""Checks on the headers of one layer's tensors, which collect everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from littlebit2.checkpoint.headers import TensorEntry
from littlebit2_kernels.format import MAX_DIM, MAX_PATHS, words_per_row
from littlebit2_kernels.state import path_suffix

from .names import module_prefix

__all__ = ["Examination", "ReadInts"]

#: Gives the few values of an int64 tensor.
ReadInts = Callable[[TensorEntry], list[int]]

_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LATENT_DTYPES = (*_SCALE_DTYPES, torch.float64, torch.int8)


@dataclass
class Examination:
    """The tensors of one layer by their names of docs/format.md, and what is wrong with them.

    Attributes:
        module: module path.
        tensors: entries by name (float latents: ``U``, ``V``).
        faults: one line each.
        used: names that some check has asked for.
    """

    module: str
    tensors: Mapping[str, TensorEntry]
    faults: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def fault(self, leaf: str, message: str) -> None:
        """Record that something is wrong with a tensor."""
        entry = self.tensors.get(leaf)
        where = f"{entry.file.name}: {entry.name}" if entry else module_prefix(self.module) + leaf
        self.faults.append(f"{where} {message}")

    def take(self, leaf: str, *, optional: bool = False) -> TensorEntry | None:
        """Return a tensor's entry."""
        entry = self.tensors.get(leaf)
        self.used.add(leaf)
        if entry is None and not optional:
            self.fault(leaf, "is missing")
        return entry

    def scale(self, leaf: str, size: int | None = None, *, optional: bool = False) -> int | None:
        """Return the length of a scale vector; ``None`` where it is missing or malformed."""
        entry = self.take(leaf, optional=optional)
        if entry is None:
            return None
        if entry.dtype not in _SCALE_DTYPES:
            self.fault(leaf, f"must be float32, float16 or bfloat16, got {entry.dtype}")
        vector = len(entry.shape) == 1 or (len(entry.shape) == 2 and entry.shape[0] == 1)
        expected = "size" if size is None else size
        length = entry.shape[-1] if vector else 0
        if not 1 <= length <= MAX_DIM or (size is not None and length != size):
            self.fault(leaf, f"must have shape [1, {expected}] or [{expected}], got {list(entry.shape)}")
            return None
        return length

    def matrix(
        self, leaf: str, rows: int | None, cols: int | None, dtypes: Iterable[torch.dtype]
    ) -> int | None:
        """Return the number of rows of a matrix; ``None`` where it is missing or malformed."""
        entry = self.take(leaf)
        if entry is None:
            return None
        allowed = tuple(dtypes)
        if entry.dtype not in allowed:
            self.fault(leaf, f"must be {' or '.join(map(str, allowed))}, got {entry.dtype}")
        shape = list(entry.shape)
        fits = len(shape) == 2 and 1 <= shape[0] <= MAX_DIM
        if not fits or (rows is not None and shape[0] != rows) or (cols is not None and shape[1] != cols):
            expected = ["rows" if rows is None else rows, "columns" if cols is None else cols]
            self.fault(leaf, f"must have shape [{expected[0]}, {expected[1]}], got {shape}")
            return None
        return shape[0]

    def ints(self, leaf: str, count: int, *, optional: bool = False) -> None:
        """Check a tensor of a few int64."""
        entry = self.take(leaf, optional=optional)
        if entry is not None and (entry.dtype != torch.int64 or entry.numel != count):
            self.fault(leaf, f"must hold {count} int64, got {entry.dtype} of shape {list(entry.shape)}")

    def count_paths(self) -> int:
        """Return the number of paths up to the last that has a tensor; one missing in between is a fault."""
        present = [
            path
            for path in range(MAX_PATHS)
            for stem in ("u1", "U_packed", "V_packed", "U", "V", "V_shared")
            if stem + path_suffix(path) in self.tensors
        ]
        return max(present, default=0) + 1

    def path(
        self,
        path: int,
        features: tuple[int | None, int | None],
        *,
        latent: bool,
        two_stage: bool,
        implied_scale: bool,
        implied_share: bool,
        strict: bool,
    ) -> tuple[tuple[int | None, int | None], int | None]:
        """Check one path.

        Args:
            path: its index.
            features: (K, N) as far as they are known.
            latent: whether sign matrices are stored as floats.
            two_stage: whether there is a second sign matrix.
            implied_scale: whether a missing ``latent_scale`` stands for ones.
            implied_share: whether a path with ``U``, ``u1`` and ``u2`` alone uses the first path's ``V``.
            strict: whether the stored shapes must be there.

        Returns:
            (K, N) as far as they are known, and the rows of V.
        """
        s = path_suffix(path)
        implied = implied_share and self.shares_silently(path)
        shared = implied or f"V_shared{s}" in self.tensors
        in_features, out_features = features
        if shared and not implied:
            self.ints(f"V_shared{s}", 1)
        elif not shared:
            in_features = self.scale(f"v2{s}", in_features) or in_features
        out_features = self.scale(f"u1{s}", out_features) or out_features
        known = (in_features, out_features)
        matrix, dtypes = ("", _LATENT_DTYPES) if latent else ("_packed", (torch.int32,))

        def width(cols: int | None) -> int | None:
            return cols if latent or cols is None else words_per_row(cols)

        rows: int | None = None
        if not shared:
            rows = self.matrix(
                f"V{matrix}{s}", None if two_stage else out_features, width(in_features), dtypes
            )
            if not latent:
                self.ints(f"V_shape{s}", 2, optional=not strict)
        if not two_stage:
            return known, rows
        rank = self.scale(f"u2{s}") if implied else self._latent_rank(s, rows, implied_scale)
        self.matrix(f"U{matrix}{s}", out_features, width(rank), dtypes)
        if not latent:
            self.ints(f"U_shape{s}", 2, optional=not strict)
        return known, rank

    def shares_silently(self, path: int) -> bool:
        """Whether a path has nothing of a first stage, and does not say whose it uses."""
        s = path_suffix(path)
        first = ("V", "V_packed", "V_shape", "V_shared", "v1", "v2", "latent_scale")
        return path > 0 and f"u2{s}" in self.tensors and not any(f"{n}{s}" in self.tensors for n in first)

    def leader(self, path: int, read_ints: ReadInts) -> int | None:
        """Return the earlier path whose first stage a path shares, or ``None``."""
        leaf = f"V_shared{path_suffix(path)}"
        entry = self.tensors.get(leaf)
        if entry is None or entry.dtype != torch.int64 or entry.numel != 1:
            return None
        (leader,) = read_ints(entry)
        if not 0 <= leader < path or f"V_shared{path_suffix(leader)}" in self.tensors:
            self.fault(leaf, f"must name an earlier path that has its own V, got {leader}")
            return None
        return leader

    def _latent_rank(self, s: str, rank: int | None, implied_scale: bool) -> int | None:
        pair = [leaf for leaf in (f"v1{s}", f"u2{s}") if leaf in self.tensors]
        if not pair:
            found = self.scale(f"latent_scale{s}", rank, optional=implied_scale)
            return rank if rank is not None else found
        if f"latent_scale{s}" in self.tensors:
            self.fault(f"latent_scale{s}", f"must not be stored together with {' and '.join(pair)}")
            self.used.add(f"latent_scale{s}")
        for leaf in (f"v1{s}", f"u2{s}"):
            found = self.scale(leaf, rank)
            rank = rank if rank is not None else found
        return rank
