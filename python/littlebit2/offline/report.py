"""What a run did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from littlebit2.quantize import LayerReport
from littlebit2.quantize.budget import at_largest_rank

__all__ = ["RunReport", "layer_entry"]

REPORT_FORMAT = 1


@dataclass(frozen=True)
class RunReport:
    """The report of :func:`.quantize_checkpoint`.

    Attributes:
        settings: everything that the result's bytes depend on.
        layers: one JSON object per quantized layer, in the order of the checkpoint: ``name``,
            ``in_features``, ``out_features``, ``ranks``, ``bias``, ``error`` (squared relative Frobenius
            error), ``weighted_error`` (squared and relative in the norm of the importance, or null),
            ``predicted_error`` (of the allocation, or null; of the weighted error where there is one),
            ``method``, ``path_errors`` (after each path), ``truncation_errors`` (null without SVD),
            ``itq_iterations`` and ``itq_converged`` (per path), ``counted_bpw``, ``stored_bpw``.
        dense: names of the tensors that were copied.
        seconds: per layer, as measured; empty for a run that had been finished before.
        left: files beside the weights that were not copied, and why.
        reasons: why matrices stay dense, with the names of their modules.
        notes: what else is worth knowing.
        bytes: of the weight files, ``before`` and ``after``.
    """

    settings: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    dense: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def at_largest_rank(self) -> tuple[str, ...]:
        """Names of layers all of whose paths have rank ``min(K, N)``: the most that bits per weight buy."""
        return tuple(
            layer["name"]
            for layer in self.layers
            if at_largest_rank(layer["in_features"], layer["out_features"], layer["ranks"])
        )

    def totals(self) -> dict[str, Any]:
        """Return layers, weights, bits per weight over all layers, errors, layers at their largest rank."""
        weights = [layer["in_features"] * layer["out_features"] for layer in self.layers]
        total = sum(weights)

        def mean(name: str) -> float:
            return sum(layer[name] * w for layer, w in zip(self.layers, weights, strict=True)) / total

        predicted = {}
        if all(layer["weighted_error"] is not None for layer in self.layers):
            predicted["mean_weighted_error"] = mean("weighted_error")
        if all(layer["predicted_error"] is not None for layer in self.layers):
            # Of the same kind: weighted in the layers that have an importance, plain in others.
            kinds = [
                "error" if layer["weighted_error"] is None else "weighted_error" for layer in self.layers
            ]
            achieved = [layer[kind] for layer, kind in zip(self.layers, kinds, strict=True)]
            predicted["mean_predicted_error"] = mean("predicted_error")
            predicted["mean_minimized_error"] = (
                sum(value * w for value, w in zip(achieved, weights, strict=True)) / total
            )
        worst = max(self.layers, key=lambda layer: layer["error"])
        return {
            "layers": len(self.layers),
            "weights": total,
            "counted_bpw": mean("counted_bpw"),
            "stored_bpw": mean("stored_bpw"),
            "mean_error": mean("error"),
            **predicted,
            "at_largest_rank": len(self.at_largest_rank),
            "worst_error": worst["error"],
            "worst_layer": worst["name"],
        }

    def as_dict(self, *, timings: bool = False) -> dict[str, Any]:
        """Return the report as JSON values; only ``timings`` differ from one run to the next."""
        content = {
            "report_format": REPORT_FORMAT,
            "settings": self.settings,
            "totals": self.totals(),
            "layers": list(self.layers),
            "dense": list(self.dense),
            "reasons": self.reasons,
            "notes": list(self.notes),
            "bytes": self.bytes,
            "left": dict(self.left),
        }
        return {**content, "seconds": self.seconds} if timings else content


def layer_entry(report: LayerReport, *, bias: bool) -> dict[str, Any]:
    """Return a layer's report as JSON values."""
    return {
        "name": report.name,
        "in_features": report.in_features,
        "out_features": report.out_features,
        "ranks": list(report.ranks),
        "bias": bias,
        "error": report.error,
        "predicted_error": report.predicted_error,
        "weighted_error": report.weighted_error,
        "method": report.method,
        "path_errors": [path.error for path in report.paths],
        "truncation_errors": [path.truncation_error for path in report.paths],
        "itq_iterations": [max(len(path.itq_objective) - 1, 0) for path in report.paths],
        "itq_converged": [path.itq_converged for path in report.paths],
        "counted_bpw": report.counted_bpw,
        "stored_bpw": report.stored_bpw,
    }
