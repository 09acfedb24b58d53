"""Which layers of a dense checkpoint are packed: by its model where transformers knows it, else by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from littlebit2.architecture.parts import Part
from littlebit2.architecture.select import INT8, INT8_ROWS, KEEP, check_rows, nothing_selected
from littlebit2.architecture.shapes import model_shapes
from littlebit2.architecture.tensors import Int8Tensors, LayerSource, select_layers
from littlebit2.checkpoint import DenseCheckpoint
from littlebit2.quantize import QuantConfig
from littlebit2.quantize.ranks import too_small

__all__ = ["Choice", "candidates", "choose_layers"]


@dataclass(frozen=True)
class Choice:
    """What is packed of a checkpoint, and what becomes of the rest.

    Attributes:
        layers: to pack, in the order of the files.
        dense: why other matrices stay dense, by the name of the module.
        notes: remarks for the user.
        changes: entries of config.json that the result needs.
        replaced: tensors that are not copied.
        extra: tensors that are written besides, by name.
        int8: tensors that are written as int8 rows.
        trial: what the model itself said (:class:`littlebit2.integrations.trial.Trial`), ``None`` where it
            could not be built.
    """

    layers: tuple[LayerSource, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    extra: Mapping[str, Part] = field(default_factory=dict)
    int8: frozenset[str] = frozenset()
    trial: Any = None


def choose_layers(
    checkpoint: DenseCheckpoint,
    config: QuantConfig,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    head: str = KEEP,
    embedding: str = KEEP,
) -> Choice:
    """Decide for every weight of a dense checkpoint whether it is packed.

    Args:
        checkpoint: the source.
        config: of the quantization; layers that are too small for its budget stay dense.
        include: patterns of names.
        exclude: likewise; wins.
        head: ``"keep"`` or ``"int8"``: what becomes of a head that is not packed.
        embedding: likewise, of the embedding of tokens.

    Raises:
        ValueError: no layer is selected, none fits the budget, the checkpoint is malformed, or the head or
            the embedding cannot be int8.
    """
    check_rows(head, embedding)
    notes: list[str] = []
    layers, trial = candidates(checkpoint, include=include, exclude=exclude, notes=notes)
    dense: dict[str, str] = {} if trial is None else dict(trial.dense)
    changes: Mapping[str, Any] = {} if trial is None else trial.changes
    fitting, failures = [], []
    for layer in layers:
        reason = too_small(layer.name, layer.in_features, layer.out_features, config)
        if reason is None:
            fitting.append(layer)
        else:
            failures.append(reason)
            dense[layer.name] = "too small for the budget"
    if not fitting:
        raise ValueError(failures[0])
    if trial is None:
        parts = [part for one in fitting for part in (one.weight, one.bias) if part is not None]
        replaced, extra = {file for part in parts for file in part.files}, {}
    else:
        replaced, extra = trial.rest(fitting)
    rows = _int8_rows(checkpoint, trial, head, embedding)
    packed = {layer.weight.files[0] for layer in fitting}
    for name in rows.rounded:
        if name in packed:
            raise ValueError(f"head must be 'keep' for a head that is packed, got 'int8' for {name}")
        dense[name.removesuffix(".weight")] = INT8_ROWS
    return Choice(
        tuple(fitting),
        dense,
        (*notes, *rows.notes),
        changes,
        frozenset({*replaced, *rows.left_out}),
        extra,
        frozenset(rows.rounded),
        trial,
    )


def _int8_rows(checkpoint: DenseCheckpoint, trial: Any, head: str, embedding: str) -> Int8Tensors:
    if (head, embedding) == (KEEP, KEEP):
        return Int8Tensors()
    if trial is None:
        raise ValueError(
            "head and embedding can be int8 only in a model that transformers can build: its code says which "
            "modules they are"
        )
    from littlebit2.integrations.int8 import int8_tensors  # noqa: PLC0415  # needs transformers

    return int8_tensors(
        checkpoint.config,
        checkpoint.dense,
        head=head == INT8,
        embedding=embedding == INT8,
        model=trial.model,
    )


def candidates(
    checkpoint: DenseCheckpoint,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    notes: list[str] | None = None,
) -> tuple[list[LayerSource], Any]:
    """Return the layers that can be packed whatever the budget, and the trial, where there was one.

    Args:
        checkpoint: the source.
        include: patterns of names.
        exclude: likewise; wins.
        notes: remarks are added to it.

    Raises:
        ValueError: as :func:`choose_layers`.
    """
    remarks: list[str] = [] if notes is None else notes
    trial = _trial(checkpoint, include, exclude, remarks)
    if trial is None:
        by_name = select_layers(checkpoint.dense, checkpoint.config, include=include, exclude=exclude)
        return by_name, None
    remarks += trial.notes
    if not trial.layers:
        raise ValueError(_nothing_selected(trial.dense, include, exclude))
    return trial.layers, trial


def _trial(
    checkpoint: DenseCheckpoint, include: Sequence[str], exclude: Sequence[str], notes: list[str]
) -> Any:
    """What the model itself says, ``None`` where it cannot be built."""
    try:
        from littlebit2.integrations.skeleton import UnknownModelError  # noqa: PLC0415  # needs transformers
        from littlebit2.integrations.trial import try_out  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        notes.append("transformers is not installed: layers are chosen by the names of their tensors alone")
        _check_complete(checkpoint)
        return None
    try:
        return try_out(checkpoint.config, checkpoint.dense, include=include, exclude=exclude)
    except UnknownModelError as error:
        notes.append(
            f"{error}; layers are chosen by the names of their tensors alone, and the result is untried"
        )
        return None


def _check_complete(checkpoint: DenseCheckpoint) -> None:
    """Raise ``ValueError`` if weights are missing, to judge by the family's shapes where they are known."""
    try:
        shapes = model_shapes(checkpoint.config)
    except ValueError:
        return
    names = [f"{linear.name}.weight" for linear in shapes.linears if not linear.is_head]
    names += [dense.name for dense in shapes.dense]
    missing = [name for name in names if name not in checkpoint.dense]
    # A base model alone has the same tensors without the prefix; nothing is known of such names here.
    if missing and len(missing) < len(names):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"the files lack weights of a {shapes.model_type}: {', '.join(missing[:10])}{more}")


def _nothing_selected(dense: Mapping[str, str], include: Sequence[str], exclude: Sequence[str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in dense.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(
        f"{len(names)} {reason} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for reason, names in by_reason.items()
    )
    return f"{nothing_selected(include, exclude)}. Of the model's matrices: {listed}"
