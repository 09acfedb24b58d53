"""Heads and embeddings in int8 rows in transformers models: their names in files, loading, ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from littlebit2.architecture.int8 import find_rows, put_rows
from littlebit2.architecture.names import CAUSAL_HEAD
from littlebit2.architecture.places import Places
from littlebit2.architecture.tensors import Int8Tensors
from littlebit2.checkpoint import Checkpoint, CheckpointError
from littlebit2_kernels import Int8Embedding, Int8Linear

from .names import FileNames
from .skeleton import skeleton

__all__ = ["check_scales", "int8_names_of", "int8_tensors", "place_rows"]


def int8_tensors(
    config: Mapping[str, Any],
    tensors: Iterable[str],
    *,
    head: bool,
    embedding: bool,
    model: Any = None,
    already: Iterable[str] = (),
) -> Int8Tensors:
    """Find the tensors of a head and an embedding among those of a checkpoint.

    Args:
        config: content of config.json.
        tensors: full names of the dense tensors in the files.
        head: whether the head is wanted in int8.
        embedding: whether the embedding is.
        model: of that config without values, where it is at hand; its packed layers may be replaced.
        already: modules in the files that are in int8 rows, which stay as they are.

    Raises:
        UnknownModelError: transformers does not know the model type.
        ValueError: the model has none, or one that cannot be (:func:`.find_rows`), or the files hold it in
            another form.
    """
    names = list(tensors)
    if not head and not embedding:
        return Int8Tensors()
    if model is None:
        headed = any(CAUSAL_HEAD in name for name in names) or bool(config.get("tie_word_embeddings"))
        model = skeleton(config, headed=headed)
    rows = find_rows(model, head=head, embedding=embedding)
    rounded = [f"{name}.weight" for name in already]
    by_module: dict[str, list[str]] = {}
    for name, destination in FileNames(model).destinations([*names, *rounded]).items():
        if destination.module is not None:
            by_module.setdefault(destination.module, []).append(name)
    wanted = [module for module in rows.stored if not {*by_module.get(module, ())} & {*rounded}]
    for module in wanted:
        if len(by_module.get(module, ())) != 1:
            raise ValueError(
                f"{module} cannot be int8: expected one tensor of its weight in the files, got "
                f"{', '.join(by_module.get(module, ())) or 'none'}"
            )
    notes = []
    if rows.tied and head != embedding:
        notes.append("the head is tied to the embedding: both are the same int8 rows")
    return Int8Tensors(
        tuple(by_module[module][0] for module in wanted),
        tuple(by_module.get(rows.head, ())) if rows.tied and rows.head is not None else (),
        tuple(notes),
    )


def place_rows(model: Any, checkpoint: Checkpoint, names: FileNames, places: Places) -> None:
    """Put modules for the int8 rows of a checkpoint into a model that is being loaded.

    Args:
        model: without values.
        checkpoint: has int8 rows.
        names: of the dense model.
        places: of the model.

    Raises:
        CheckpointError: the rows are of no head and no embedding of the model, or of another shape.
    """
    modules = names.modules(checkpoint.int8, checkpoint.dense, model)
    wanted = {modules.get(name, name): spec for name, spec in checkpoint.int8.items()}
    try:
        head = _name_of(model, "get_output_embeddings") in wanted
        rows = find_rows(model, head=head, embedding=_name_of(model, "get_input_embeddings") in wanted)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} as {type(model).__name__}: {error}") from error
    foreign = sorted({*wanted} ^ {*rows.stored})
    if foreign:
        raise CheckpointError(
            f"{checkpoint.path} as {type(model).__name__}: int8 rows must be those of the head or the "
            f"embedding, got {', '.join(foreign)}"
        )
    for name, spec in wanted.items():
        shape = list(model.get_submodule(name).weight.shape)
        if [spec.rows, spec.columns] != shape:
            raise CheckpointError(
                f"{checkpoint.path}: {spec.name} must have shape {shape}, got {[spec.rows, spec.columns]}"
            )
    put_rows(model, rows, places)
    # Else scales would be rounded to the dtype of the model.
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "weight_scale"}


def check_scales(model: Any) -> None:
    """Raise ``CheckpointError`` if the scales of int8 rows that were loaded are not finite."""
    for name in int8_names_of(model):
        if not bool(torch.isfinite(model.get_submodule(name).weight_scale).all()):
            raise CheckpointError(f"{name}.weight_scale must be finite, got NaN or infinity")


def int8_names_of(model: Any) -> list[str]:
    """Names of the modules of a model that have int8 rows of their own."""
    return [name for name, module in model.named_modules() if isinstance(module, (Int8Embedding, Int8Linear))]


def _name_of(model: Any, method: str) -> str | None:
    module = getattr(model, method)()
    return next((name for name, one in model.named_modules() if one is module), None)
