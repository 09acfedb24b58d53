"""What is in a checkpoint, as numbers: ranks, bits per weight, bytes."""

from __future__ import annotations

from typing import Any

from .formats import StoredLayer
from .reader import Checkpoint

__all__ = ["describe"]

_SCALES = ("u1", "u2", "v1", "v2", "latent_scale")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a JSON-able summary of an opened checkpoint, from headers alone.

    Keys: ``path``, ``format``, ``model_type``, ``layers`` (by name: ``in_features``, ``out_features``,
    ``ranks``, ``shares``, ``bias``, ``counted_bpw``, ``stored_bpw``, ``bytes``), ``dense`` (by name:
    ``shape``, ``dtype``, ``bytes``), ``totals`` (``layers``, ``packed_weights``, ``dense_parameters``,
    ``counted_bpw``, ``stored_bpw``, both over the packed layers, and ``bytes``: ``packed``, ``scales``,
    ``bias``, ``other``, ``dense``, ``all``), ``metadata``, ``tied`` and ``problems``.

    Counted bits are the papers' (16 for a scale entry); stored ones are those of the files, scales in their
    stored dtypes and padding included, biases and bookkeeping not.
    """
    layers: dict[str, Any] = {}
    sizes = {"packed": 0, "scales": 0, "bias": 0, "other": 0}
    counted = stored = weights = 0
    for name, layer in checkpoint.stored.items():
        shape = layer.spec.shape
        parts = _bytes(checkpoint, layer)
        dense = shape.in_features * shape.out_features
        bits = 8 * (parts["packed"] + parts["scales"])
        layers[name] = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "ranks": None if shape.ranks is None else list(shape.ranks),
            "shares": list(shape.shares),
            "bias": layer.spec.bias,
            "counted_bpw": shape.counted_bpw,
            "stored_bpw": bits / dense,
            "bytes": sum(parts.values()),
        }
        for part, size in parts.items():
            sizes[part] += size
        counted += shape.counted_bits
        stored += bits
        weights += dense
    other = {
        name: {
            "shape": list(entry.shape),
            "dtype": str(entry.dtype).removeprefix("torch."),
            "bytes": entry.nbytes,
        }
        for name, entry in checkpoint.files.entries.items()
        if name in checkpoint.dense
    }
    sizes["dense"] = sum(checkpoint.files.entries[name].nbytes for name in other)
    sizes["all"] = sum(sizes.values())
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "model_type": checkpoint.config.get("model_type"),
        "layers": layers,
        "dense": other,
        "totals": {
            "layers": len(layers),
            "packed_weights": weights,
            "dense_parameters": sum(checkpoint.files.entries[name].numel for name in checkpoint.dense),
            "counted_bpw": counted / weights if weights else None,
            "stored_bpw": stored / weights if weights else None,
            "bytes": sizes,
        },
        "metadata": dict(checkpoint.metadata),
        "tied": checkpoint.tied(),
        "problems": list(checkpoint.problems),
    }


def _bytes(checkpoint: Checkpoint, layer: StoredLayer) -> dict[str, int]:
    parts = {"packed": 0, "scales": 0, "bias": 0, "other": 0}
    for leaf, entry in layer.tensors.items():
        stem = leaf.split("_R")[0]
        if stem in ("U", "V", "U_packed", "V_packed"):
            parts["packed"] += entry.nbytes
        elif stem in _SCALES:
            parts["scales"] += entry.nbytes
        else:
            parts["bias" if stem == "bias" else "other"] += entry.nbytes
    parts["other"] += sum(checkpoint.files.entries[name].nbytes for name in layer.extras)
    return parts
