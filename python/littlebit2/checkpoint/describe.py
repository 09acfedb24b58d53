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
    ``ranks``, ``shares``, ``bias``, ``salient_columns``, ``counted_bpw``, ``stored_bpw``, ``bytes``),
    ``int8`` (heads and embeddings in int8 rows, by name: ``rows``, ``columns``, ``bytes``),
    ``dense`` (by name: ``shape``, ``dtype``, ``bytes``), ``totals`` (``layers``, ``packed_weights``,
    ``dense_parameters``, ``counted_bpw``, ``stored_bpw``, both over the packed layers, and ``bytes``:
    ``packed``, ``scales``, ``salient``, ``bias``, ``other``, ``int8``, ``dense``, ``all``), ``metadata``,
    ``tied`` and ``problems``.

    Counted bits are the papers' (16 for an entry of a scale or of a salient column, 32 for the index of a
    column); stored ones are those of the files, scales in their stored dtypes and padding included, biases
    and bookkeeping not.
    """
    layers: dict[str, Any] = {}
    sizes = {"packed": 0, "scales": 0, "salient": 0, "bias": 0, "other": 0}
    counted = stored = weights = 0
    beside = {columns.spec.layer: columns for columns in checkpoint.stored_columns.values()}
    for name, layer in checkpoint.stored.items():
        shape = layer.spec.shape
        columns = beside.get(name)
        parts = {**_bytes(checkpoint, layer), "salient": 0 if columns is None else columns.nbytes}
        dense = shape.in_features * shape.out_features
        bits = 8 * (parts["packed"] + parts["scales"] + parts["salient"])
        counted_bits = shape.counted_bits + (0 if columns is None else columns.counted_bits)
        layers[name] = {
            "in_features": shape.in_features,
            "out_features": shape.out_features,
            "ranks": None if shape.ranks is None else list(shape.ranks),
            "shares": list(shape.shares),
            "bias": layer.spec.bias,
            "salient_columns": 0 if columns is None else columns.spec.count,
            "counted_bpw": counted_bits / dense,
            "stored_bpw": bits / dense,
            "bytes": sum(parts.values()),
        }
        for part, size in parts.items():
            sizes[part] += size
        counted += counted_bits
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
    int8 = {
        name: {"rows": spec.rows, "columns": spec.columns, "bytes": spec.stored_bytes}
        for name, spec in checkpoint.int8.items()
    }
    sizes["int8"] = sum(spec.stored_bytes for spec in checkpoint.int8.values())
    sizes["dense"] = sum(checkpoint.files.entries[name].nbytes for name in other)
    sizes["all"] = sum(sizes.values())
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "model_type": checkpoint.config.get("model_type"),
        "layers": layers,
        "int8": int8,
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
