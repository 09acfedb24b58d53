"""What the quantization of a model did: what was packed, and what was left dense for which reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from littlebit2.quantize import LayerReport

__all__ = ["LeftDense", "QuantizationReport", "Reason", "count_reasons"]

#: Why a linear module stays dense, in the order in which the reasons are looked at.
Reason = Literal["tied", "head", "pattern", "kind", "filter", "budget"]

_TITLES: dict[Reason, str] = {
    "tied": "tied to another module",
    "head": "output head",
    "pattern": "not selected by include and exclude",
    "kind": "of an unsupported kind",
    "filter": "rejected by filter_fn",
    "budget": "too small for the budget",
}


@dataclass(frozen=True)
class LeftDense:
    """A linear module that was not packed.

    Attributes:
        name: full module name, the first one if there are several.
        kind: name of its class.
        shape: of its weight, ``(N, K)`` for ``nn.Linear``; empty where that is not known yet.
        reason: ``"tied"``, ``"head"``, ``"pattern"``, ``"kind"``, ``"filter"`` or ``"budget"``.
        detail: the reason as a phrase.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind} {list(self.shape)}): {self.detail}"


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`littlebit2.quantize_` did. ``str(report)`` is a table.

    Attributes:
        layers: one report per packed module, in the order of ``named_modules``.
        dense: linear modules that stay dense, in the same order. Embeddings and convolutions are not listed.
        bytes_before: bytes of all parameters and buffers of the model, shared tensors counted once.
        bytes_after: likewise.
    """

    layers: tuple[LayerReport, ...]
    dense: tuple[LeftDense, ...]
    bytes_before: int
    bytes_after: int

    @property
    def counted_bpw(self) -> float:
        """Bits per weight over all packed modules, as the papers count them."""
        return self._mean([layer.counted_bpw for layer in self.layers])

    @property
    def stored_bpw(self) -> float:
        """Bits per weight over all packed modules in memory, biases excluded."""
        return self._mean([layer.stored_bpw for layer in self.layers])

    @property
    def error(self) -> float:
        """Squared relative Frobenius errors, their mean over all packed weights."""
        return self._mean([layer.error for layer in self.layers])

    def _mean(self, values: Sequence[float]) -> float:
        sizes = [layer.in_features * layer.out_features for layer in self.layers]
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)

    def __str__(self) -> str:
        head = ("packed", "K", "N", "ranks", "counted bpw", "stored bpw", "error")
        rows = [
            (
                layer.name,
                str(layer.in_features),
                str(layer.out_features),
                "+".join(map(str, layer.ranks)),
                f"{layer.counted_bpw:.3f}",
                f"{layer.stored_bpw:.3f}",
                f"{layer.error:.4f}",
            )
            for layer in self.layers
        ]
        lines = [
            f"{len(self.layers)} linear modules packed at {self.counted_bpw:.3f} counted "
            f"({self.stored_bpw:.3f} stored) bits per weight, squared relative error {self.error:.4f}; "
            f"{len(self.dense)} left dense; {_size(self.bytes_before)} -> {_size(self.bytes_after)}",
            "",
            *_table([head, *rows]),
        ]
        if self.dense:
            lines += ["", "left dense", *(f"  {one}" for one in self.dense)]
        return "\n".join(lines)


def count_reasons(dense: Iterable[LeftDense]) -> str:
    """Return how many modules were left dense for each reason, as a phrase with some of their names."""
    names: dict[Reason, list[str]] = {}
    for one in dense:
        names.setdefault(one.reason, []).append(one.name)
    some = 3
    return "; ".join(
        f"{len(found)} {_TITLES[reason]} ({', '.join(found[:some])}{', ...' if len(found) > some else ''})"
        for reason, found in names.items()
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def _size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
