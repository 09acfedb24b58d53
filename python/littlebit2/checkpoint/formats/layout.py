"""What every layout of packed layers must tell; one subclass, in one file, for each layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from littlebit2.checkpoint.headers import TensorEntry
from littlebit2.checkpoint.specs import LayerSpec
from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape
from littlebit2_kernels.packing import pack_signs
from littlebit2_kernels.state import path_suffix

from .examination import Examination, ReadInts

__all__ = ["Layout", "Leaves", "Modules", "StoredLayer"]

#: Entries of a module's tensors, by the last part of their names.
Leaves = Mapping[str, TensorEntry]
#: The leaves of every module, by module path.
Modules = Mapping[str, Leaves]

#: Buffers of the authors' code (``_eff_bit_actual``, ...) begin so; they carry no weight.
_EXTRA_PREFIX = "_"


@dataclass(frozen=True)
class StoredLayer:
    """A packed layer as its files hold it.

    Attributes:
        spec: what it is, ranks rounded up to a multiple of 8.
        layout: how its tensors are stored.
        tensors: the entry of every tensor, by its name of docs/format.md (float latents: ``U``, ``V``).
        extras: full names of buffers that carry no weight.
        stored_ranks: ranks in the files; empty for a single-stage layer.
    """

    spec: LayerSpec
    layout: Layout
    tensors: Mapping[str, TensorEntry]
    extras: tuple[str, ...]
    stored_ranks: tuple[int, ...]


class Layout(ABC):
    """One way to store packed layers.

    A subclass says which modules are its own (:meth:`claims`, or :meth:`find` where a layer is spread over
    several modules), what its tensors are called (:meth:`rename`), and, where they differ, how headers become
    sizes (:meth:`examine`) and data becomes the tensors of docs/format.md (:meth:`decode`).

    Attributes:
        name: as in ``Checkpoint.format``.
        two_stage: whether layers have two sign matrices in each path.
        implied_scale: whether a missing ``latent_scale`` stands for ones.
        implied_share: whether a path with ``U``, ``u1`` and ``u2`` alone uses the first path's ``V``,
            ``v1`` and ``v2``.
        ours: whether a checkpoint of this project's format may hold such layers.
        settings_file: a JSON file beside the tensors that describes the quantization, or ``None``.
    """

    name: str
    two_stage = True
    implied_scale = False
    implied_share = False
    ours = False
    settings_file: str | None = None

    @abstractmethod
    def claims(self, leaves: Collection[str]) -> bool:
        """Whether a module with these leaves is a layer of this layout, readable or damaged."""

    def find(self, modules: Modules) -> dict[str, Leaves]:
        """Return the layers of this layout, by module path, among modules that no other layout claimed."""
        return {module: leaves for module, leaves in modules.items() if self.claims(leaves)}

    def rename(self, leaf: str) -> str:
        """Return the name of docs/format.md for a leaf."""
        return leaf

    def refusal(self, leaf: str) -> str:
        """Say why a leaf that no check has asked for is wrong; completes "<tensor> ..."."""
        return "is unexpected"

    def latent(self, leaves: Collection[str]) -> bool:
        """Whether the sign matrices are stored as floats, whose signs count."""
        return False

    def examine(
        self, module: str, leaves: Leaves, read_ints: ReadInts, *, strict: bool
    ) -> tuple[StoredLayer | None, list[str]]:
        """Work out one layer from the headers of its tensors.

        Args:
            module: module path.
            leaves: as :meth:`find` returned them.
            read_ints: gives the few values of an int64 tensor.
            strict: whether the checkpoint declares this project's format: stored shapes must be there, and
                ranks be multiples of 8.

        Returns:
            The layer (``None`` if it has faults) and the faults, one line each.
        """
        extras: list[str] = []
        tensors: dict[str, TensorEntry] = {}
        faults: list[str] = []
        for leaf, entry in leaves.items():
            name = self.rename(leaf)
            if leaf.startswith(_EXTRA_PREFIX) and entry.numel == 1:
                extras.append(entry.name)
            elif name in tensors:
                faults.append(f"{entry.name} must not be stored together with {tensors[name].name}")
            else:
                tensors[name] = entry
        seen = Examination(module, tensors, faults)
        rows, shares, features = self._paths(seen, read_ints, strict)
        bias = seen.scale("bias", features[1], optional=True) is not None
        for leaf in sorted(set(tensors) - seen.used):
            seen.fault(leaf, self.refusal(leaf))
        in_features, out_features = features
        if seen.faults or in_features is None or out_features is None:
            return None, seen.faults
        for path, rank in enumerate(rows if strict and self.two_stage else ()):
            if rank % RANK_MULTIPLE:
                leaf = f"V_packed{path_suffix(path)}"
                seen.fault(leaf, f"must have a multiple of {RANK_MULTIPLE} rows, got {rank}")
        if seen.faults:
            return None, seen.faults
        ranks = tuple(-(-rank // RANK_MULTIPLE) * RANK_MULTIPLE for rank in rows) if self.two_stage else None
        try:
            shape = LayerShape(in_features, out_features, ranks, shares)
        except ValueError as error:
            return None, [f"layer {module}: {error}"]
        stored = rows if self.two_stage else ()
        return StoredLayer(LayerSpec(module, shape, bias), self, tensors, tuple(extras), stored), []

    def decode(self, layer: StoredLayer, data: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of docs/format.md, in memory of their own, by leaf.

        Ranks are as stored. Stored shapes may be absent, and so may a ``latent_scale`` of ones.

        Args:
            layer: from :meth:`examine`.
            data: the tensors of ``layer.tensors``, by full name; may be mapped from files.
        """
        state: dict[str, torch.Tensor] = {}
        for leaf, entry in layer.tensors.items():
            tensor = data[entry.name]
            stem, _, suffix = leaf.partition("_")
            if stem in ("U", "V") and (not suffix or suffix.startswith("R")):
                # Packing makes new memory anyway.
                state[f"{stem}_packed{'_' + suffix if suffix else ''}"] = pack_signs(tensor)
            else:
                state[leaf] = tensor.clone(memory_format=torch.contiguous_format)
        for path in range(1, layer.spec.shape.num_paths if self.implied_share else 1):
            s = path_suffix(path)
            if layer.spec.shape.shares[path] == 0 and f"V_shared{s}" not in state:
                state[f"V_shared{s}"] = torch.zeros(1, dtype=torch.int64)
                state[f"latent_scale{s}"] = (
                    state["v1"].float().flatten() * state.pop(f"u2{s}").float().flatten()
                )
        return state

    def _paths(
        self, seen: Examination, read_ints: ReadInts, strict: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, int | None]]:
        """Check every path; return the rows of V, the shares, and (K, N)."""
        rows: list[int] = []
        shares: list[int] = []
        features: tuple[int | None, int | None] = (None, None)
        latent = self.latent(seen.tensors)
        for path in range(seen.count_paths()):
            features, rank = seen.path(
                path,
                features,
                latent=latent,
                two_stage=self.two_stage,
                implied_scale=self.implied_scale,
                implied_share=self.implied_share,
                strict=strict,
            )
            implied = self.implied_share and seen.shares_silently(path)
            leader = 0 if implied else seen.leader(path, read_ints)
            shares.append(path if leader is None else leader)
            if leader is not None and rank is not None and leader < len(rows) and rows[leader] != rank:
                seen.fault(
                    f"latent_scale{path_suffix(path)}", f"must have rank {rows[leader]} like path {leader}"
                )
            rows.append(rank or 0)
        return tuple(rows), tuple(shares), features
