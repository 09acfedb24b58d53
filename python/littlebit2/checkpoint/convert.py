"""The authors' layout as a target, and conversion between the two layouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from littlebit2.architecture.names import CAUSAL_HEAD
from littlebit2.disk import StagedDirectory, write_json
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.state import path_suffix

from .errors import CheckpointError
from .formats import split_name
from .formats.littlebit import KEPT_SETTINGS, SETTINGS, authors_leaf
from .reader import Checkpoint, open_checkpoint
from .settings import summary
from .shards import ShardedTensors
from .side_files import SideFiles, copy_side_files, find_side_files
from .specs import LayerSpec
from .writer import MAX_SHARD_BYTES, CheckpointWriter

__all__ = ["convert", "export_upstream"]


def export_upstream(checkpoint: Checkpoint, out: str | Path, *, overwrite: bool = False) -> SideFiles:
    """Write a checkpoint in the layout of the LittleBit authors' code.

    ``v1`` gets our ``latent_scale`` and ``u2`` ones, both float32, so that their product is exact. Settings
    that the checkpoint does not know (``quant_func``, ...) are filled in with what describes its layers.

    Args:
        checkpoint: an opened checkpoint with packed layers.
        out: directory to make; must not exist (or be empty) unless ``overwrite``.
        overwrite: replace an existing checkpoint directory, at the end.

    Returns:
        Which of the files beside the weights were copied, and which were not and why.

    Raises:
        CheckpointError: the layout cannot hold a layer: more than two paths, unequal ranks, a shared first
            stage, a single stage, salient columns, a packed head; or a dense layer that their code would
            expect packed.
        FileExistsError: ``out`` exists, and ``overwrite`` is off or it is no checkpoint.
    """
    faults = list(_unfit(checkpoint))
    if faults:
        raise CheckpointError(f"{checkpoint.path}: the authors' layout cannot hold it: {summary(faults)}")
    kept = {key: checkpoint.metadata[key] for key in SETTINGS if key in checkpoint.metadata}
    described = {**_described(checkpoint), **kept}
    replaces = find_side_files(checkpoint.path).copied
    with StagedDirectory(out, overwrite=overwrite, replaces=replaces) as staged:
        tensors = ShardedTensors(staged.path, MAX_SHARD_BYTES, {"format": "pt"})
        try:
            for name, spec in checkpoint.layers.items():
                tensors.add(dict(_upstream_state(spec, checkpoint.load_layer(name), described["eff_bit"])))
            for name in checkpoint.dense:
                tensors.add({name: checkpoint.load_tensor(name)})
            tensors.finish()
        finally:
            tensors.close()
        write_json(staged.path / "config.json", _plain_config(checkpoint.config))
        write_json(staged.path / "littlebit_config.json", described)
        found = copy_side_files(checkpoint.path, staged.path)
        staged.publish()
    return found


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    int8: Collection[str] = (),
    left_out: Collection[str] = (),
    overwrite: bool = False,
) -> SideFiles:
    """Convert a checkpoint directory, one layer in memory at a time.

    Args:
        source: a checkpoint of any layout that is read, with packed layers.
        out: directory to make; must not exist (or be empty) unless ``overwrite``.
        to: ``"littlebit2"`` (ours) or ``"littlebit"`` (the authors').
        int8: full names of dense matrices that become int8 rows, in our layout only; those of heads and
            embeddings are found by :func:`littlebit2.offline.convert_checkpoint`.
        left_out: full names of dense tensors that are not written.
        overwrite: replace an existing checkpoint directory, at the end.

    Returns:
        Which of the files beside the weights were copied, and which were not and why.

    Raises:
        ValueError: ``to`` is unknown, or ``int8`` is given for the authors' layout.
        CheckpointError: ``source`` is malformed, has no packed layer, or does not fit the target layout.
        FileExistsError: ``out`` exists, and ``overwrite`` is off or it is no checkpoint.
    """
    if to not in ("littlebit2", "littlebit"):
        raise ValueError(f"to must be 'littlebit2' or 'littlebit', got {to!r}")
    with open_checkpoint(source) as checkpoint:
        if not checkpoint.layers:
            raise CheckpointError(f"{checkpoint.path}: expected packed layers, got {_got(checkpoint)}")
        if to == "littlebit":
            if int8:
                raise ValueError("to must be 'littlebit2' for int8 rows, got 'littlebit'")
            return export_upstream(checkpoint, out, overwrite=overwrite)
        config = dict(checkpoint.config)
        if checkpoint.format != "littlebit2":
            config = _plain_config(config)
            kept = {key: value for key, value in checkpoint.metadata.items() if key in SETTINGS}
            if kept:
                config[KEPT_SETTINGS] = kept
        replaces = find_side_files(checkpoint.path).copied
        with CheckpointWriter(out, config, int8=int8, overwrite=overwrite, replaces=replaces) as writer:
            for name in checkpoint.layers:
                writer.add_layer(name, checkpoint.load_layer(name))
            for name in checkpoint.columns:
                writer.add_columns(name, checkpoint.load_columns(name))
            for name in checkpoint.int8:
                writer.add_int8(name, *checkpoint.load_int8(name))
            for name in checkpoint.dense:
                if name not in left_out:
                    writer.add_tensor(name, checkpoint.load_tensor(name))
            found = writer.copy_side_files(checkpoint.path)
            writer.finish()
    return found


def _got(checkpoint: Checkpoint) -> str:
    if checkpoint.format == "dense":
        return "a dense model: quantize it"
    method = checkpoint.config["quantization_config"]["quant_method"]
    return f"a model that another method has packed (quant_method {method!r:.80})"


def _unfit(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.layers:
        yield "there is no packed layer"
    for name, columns in checkpoint.columns.items():
        yield f"layer {name}: expected no dense columns, got {columns.count} salient ones"
    for name in checkpoint.int8:
        yield f"{name}: expected a dense matrix, got int8 rows"
    counts = {spec.shape.num_paths for spec in checkpoint.layers.values()}
    if len(counts) > 1:
        yield f"expected the same number of paths in every layer, got {sorted(counts)}"
    for name, spec in checkpoint.layers.items():
        shape = spec.shape
        if shape.ranks is None:
            yield f"layer {name}: expected two stages, got one"
            continue
        if shape.num_paths > 2:
            yield f"layer {name}: expected one or two paths, got {shape.num_paths}"
        if len(set(shape.ranks)) > 1:
            yield f"layer {name}: expected equal ranks, got {list(shape.ranks)}"
        if shape.shares != tuple(range(shape.num_paths)):
            yield f"layer {name}: expected a V of its own in every path, got shares {list(shape.shares)}"
        if CAUSAL_HEAD in name:
            yield f"layer {name}: expected a dense head, got a packed one"
    kinds = {split_name(name)[1] for name in checkpoint.layers}
    for name, (size, _) in checkpoint.dense.items():
        module, leaf = split_name(name)
        if (
            leaf == "weight"
            and len(size) == 2
            and split_name(module)[1] in kinds
            and CAUSAL_HEAD not in module
        ):
            yield f"layer {module}: expected a packed layer like others of its name, got a dense one"


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    shapes = [spec.shape for spec in checkpoint.layers.values()]
    weights = sum(shape.in_features * shape.out_features for shape in shapes)
    return {
        "quant_func": "SmoothSign",
        "eff_bit": sum(shape.counted_bits for shape in shapes) / weights,
        "split_dim": max(max(shape.ranks or ()) for shape in shapes),
        "residual": any(shape.num_paths == 2 for shape in shapes),
        "kv_factor": 1.0,
        "min_split_dim": 8,
    }


def _upstream_state(
    spec: LayerSpec, packed: PackedLinear, eff_bit: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    target = float(eff_bit) if isinstance(eff_bit, (int, float)) else -1.0
    leaves: dict[str, torch.Tensor] = {
        "_eff_bit_target": torch.tensor(target),
        "_split_dim_final": torch.tensor(packed.shape.rows[0]),
        "_eff_bit_actual": torch.tensor(packed.shape.counted_bpw),
    }
    for index, path in enumerate(packed.paths):
        assert path.u is not None and path.latent_scale is not None
        for matrix, words, shape in (
            ("U", path.u, (path.out_features, path.rank)),
            ("V", path.v, (path.rank, path.in_features)),
        ):
            leaves[authors_leaf(matrix, index, "packed")] = words
            leaves[authors_leaf(matrix, index, "shape")] = torch.tensor(shape)
        s = path_suffix(index)
        leaves[f"u1{s}"] = path.out_scale.unsqueeze(0)
        leaves[f"u2{s}"] = torch.ones(1, path.rank, dtype=torch.float32, device="cpu")
        leaves[f"v1{s}"] = path.latent_scale.unsqueeze(0)
        leaves[f"v2{s}"] = path.in_scale.unsqueeze(0)
    if packed.bias is not None:
        leaves["bias"] = packed.bias
    for leaf, tensor in leaves.items():
        yield f"{spec.name}.{leaf}", tensor


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without the quantization settings of either layout."""
    dropped = {"quantization_config", KEPT_SETTINGS, *SETTINGS}
    return {key: value for key, value in config.items() if key not in dropped}
