"""Which layers a checkpoint has packed, by the names of a server's modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from littlebit2.architecture.names import CAUSAL_HEAD, FUSED
from littlebit2.integrations.configuration import LittleBit2Config

__all__ = ["LayerTable", "Part", "Structure"]

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Structure:
    """What config.json says of a packed layer.

    Attributes:
        stored: its name in the checkpoint.
        ranks: rank of every path; ``None`` for a single-stage layer.
        shares: for each path, the path whose first stage it uses; empty if none shares.
    """

    stored: str
    ranks: tuple[int, ...] | None
    shares: tuple[int, ...]

    @property
    def num_paths(self) -> int:
        """P."""
        return len(self.ranks) if self.ranks is not None else max(1, len(self.shares))


@dataclass(frozen=True)
class Part:
    """One packed layer of a module that may hold several.

    Attributes:
        name: as the server would call a module of its own, for messages.
        structure: what is expected of it.
    """

    name: str
    structure: Structure


class LayerTable:
    """The packed layers of a checkpoint.

    Attributes:
        structures: by name.
        rows: names of heads and embeddings in int8 rows, and their names in the checkpoint.
    """

    def __init__(self, structures: Mapping[str, Structure], rows: Mapping[str, str] | None = None) -> None:
        self.structures = dict(structures)
        self.rows = dict(rows or {})

    @classmethod
    def from_config(cls, config: LittleBit2Config) -> LayerTable:
        """The table of a checkpoint, under its own names.

        Raises:
            ValueError: the checkpoint has salient columns, which no server is given yet.
        """
        if config.salient_columns:
            raise ValueError(
                f"{next(iter(config.salient_columns))}: salient columns are not served yet: "
                "quantize without them"
            )
        two_stage = {
            name: Structure(name, tuple(ranks), tuple(config.shares.get(name, ())))
            for name, ranks in config.ranks.items()
        }
        single = {
            name: Structure(name, None, tuple(config.shares.get(name, ()))) for name in config.single_stage
        }
        return cls({**two_stage, **single}, {name: name for name in config.int8})

    def renamed(self, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> LayerTable:
        """The same layers under other names; ``rename`` maps the keys of a dictionary."""
        return LayerTable(rename(self.structures), rename(self.rows))

    def parts(self, prefix: str, mapping: Mapping[str, Sequence[str]]) -> list[Part] | None:
        """Return the packed layers that make up a module, in the order of its outputs.

        Args:
            prefix: full name of the module.
            mapping: last names of the parts of fused modules, by the last name of these.

        Returns:
            ``None`` if the module is dense.

        Raises:
            ValueError: only some of the parts are packed, or they are not those of the model.
        """
        if prefix in self.structures:
            return [Part(prefix, self.structures[prefix])]
        parent, _, leaf = prefix.rpartition(".")
        names = list(mapping.get(leaf, FUSED.get(leaf, ())))
        full = [f"{parent}.{name}" if parent else name for name in names]
        packed = [name for name in full if name in self.structures]
        if packed and len(packed) < len(full):
            dense = [name for name in full if name not in packed]
            raise ValueError(
                f"{prefix}: all of its parts must be packed, or none; "
                f"{', '.join(packed)} are, {', '.join(dense)} are not"
            )
        if packed:
            return [Part(name, self.structures[name]) for name in full]
        others = [f"{parent}.{name}" if parent else name for name in FUSED.get(leaf, ())]
        split = [name for name in others if name in self.structures]
        if split:
            raise ValueError(
                f"{prefix}: the server's model expects one layer of this name, the checkpoint has it in "
                f"parts: {', '.join(split)}; quantize the model again, with the fused layer"
            )
        return None

    def rows_at(self, prefix: str, nameless: str | None) -> str | None:
        """Return the name in the checkpoint of the int8 rows of a head or an embedding.

        Args:
            prefix: full name of the module.
            nameless: what ``prefix`` is where the model does not name its embedding, which is then that of
                the checkpoint that is no head; ``None`` for a head.

        Returns:
            ``None`` if the module is dense.
        """
        if prefix in self.rows or prefix != nameless:
            return self.rows.get(prefix)
        embeddings = [stored for stored in self.rows.values() if CAUSAL_HEAD not in stored]
        return embeddings[0] if len(embeddings) == 1 else None

    def refuse_at(self, name: str, why: str) -> None:
        """Raise ``ValueError`` if ``name`` is packed."""
        if name in self.structures:
            raise ValueError(f"{name}: {why}")

    def refuse_experts(self, why: str) -> None:
        """Raise ``ValueError`` if a layer of an expert is packed, whatever the module above is called."""
        packed = [name for name in self.structures if _EXPERT.search(name)]
        if packed:
            raise ValueError(f"{packed[0]} and {len(packed) - 1} more: {why}")
