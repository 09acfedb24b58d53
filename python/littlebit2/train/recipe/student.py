"""The student of a run: the dense model with trainable layers, and the checkpoint it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from littlebit2._messages import hub_hint
from littlebit2.architecture.expansion import expanded
from littlebit2.checkpoint import CheckpointWriter, find_side_files, open_checkpoint, open_dense
from littlebit2.disk import RunError
from littlebit2.integrations.loading import load
from littlebit2.integrations.modules import layers_of
from littlebit2.integrations.names import published_state
from littlebit2.train.magnitudes import LATENTS, set_magnitudes
from littlebit2.train.model import make_trainable, packed_layers, select_dense, trainable_layers

from .settings import Recipe

__all__ = ["build_student", "check_dense", "check_export", "check_start", "export_student", "round_dense"]

#: Most that packed and trained logits may differ, relative to the largest: far above float32's rounding,
#: far below one wrong sign.
_AGREEMENT = 1e-3
_CHECKED_TOKENS = 128


def check_dense(teacher: Path) -> dict[str, Any]:
    """Return the configuration of a dense checkpoint.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is packed or quantized in a way that is not undone, or has no config.json.
    """
    if not teacher.is_dir():
        raise FileNotFoundError(
            f"teacher must be a checkpoint directory, got {teacher}, which is none{hub_hint(teacher)}"
        )
    with open_checkpoint(teacher) as checkpoint:
        if checkpoint.layers:
            raise ValueError(
                f"teacher must be a dense checkpoint, got {teacher} with {len(checkpoint.layers)} packed "
                "layers: give the dense model, and the packed one as the start (--start)"
            )
    with open_dense(teacher) as dense:
        return dict(dense.config)


def check_start(start: Path) -> None:
    """Raise ``ValueError`` where layers cannot be trained: dense ones, or with salient columns."""
    with open_checkpoint(start) as checkpoint:
        if not checkpoint.layers:
            raise ValueError(f"start must be a packed checkpoint, got {start}, which is dense")
        for name, columns in checkpoint.columns.items():
            raise ValueError(
                f"start must have no layer with salient columns, which are not trained, got layer {name} "
                f"with {columns.count} of them"
            )


def build_student(teacher: Path, start: Path, recipe: Recipe) -> Any:
    """Return the dense model of ``teacher`` in float32, its linears replaced by those of ``start``.

    Raises:
        ValueError: ``start`` has no packed layers, or they do not fit the model; the message names them.
    """
    check_start(start)
    # Not prepacked: the layers give up their signs again.
    started = load(start, dtype=torch.float32, backend="reference")
    model = load(teacher, dtype=torch.float32)
    layers = layers_of(started)
    with expanded(model):
        make_trainable(
            model,
            lambda name: layers[name].packed,
            layers,
            surrogate=recipe.surrogate,
            magnitude=recipe.magnitude,
        )
        for path in sorted((start / LATENTS).glob("*.safetensors")):
            set_magnitudes(model, load_file(path))
    # A packed checkpoint may have trained its dense tensors too.
    stored = dict(started.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Loaded tensors may be views of the file, which must not be written to.
            parameter.data = parameter.data.clone()
            if name in stored:
                parameter.copy_(stored[name])
    select_dense(model, recipe.dense)
    if recipe.gradient_checkpointing:
        # Its name since transformers 5.22, where the old one warns.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def round_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what stays dense to ``dtype``, in which it is to be stored; parameters keep theirs."""
    own = {id(p) for layer in trainable_layers(model).values() for p in layer.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.copy_(parameter.to(dtype))


def export_student(
    model: Any,
    out: Path,
    teacher: Path,
    dtype: torch.dtype,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the packed checkpoint; tokenizer and generation files come from ``teacher``.

    Args:
        model: the student.
        out: directory to make.
        teacher: the dense checkpoint.
        dtype: dtype of the dense tensors.
        state: the whole state where the model's own is sharded.
        overwrite: replace a checkpoint at ``out``.
    """
    tensors = model.state_dict() if state is None else dict(state)
    layers = tuple(f"{name}." for name in trainable_layers(model))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    config = model.config.to_diff_dict()
    config["use_cache"] = True  # turned off while training
    replaces = find_side_files(Path(teacher)).copied
    with CheckpointWriter(out, config, overwrite=overwrite, replaces=replaces) as writer:
        for name, packed in packed_layers(model, tensors):
            writer.add_layer(name, packed)
        dense = {n: t for n, t in tensors.items() if not n.startswith(layers) and n not in tied}
        for name, tensor in published_state(model, dense).items():
            value = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
            writer.add_tensor(name, value.cpu().contiguous())
        writer.copy_side_files(teacher)
        writer.finish()


def check_export(model: Any, packed: Any, ids: torch.Tensor) -> float:
    """Return how far the packed model's logits are from the student's, relative to the largest.

    Args:
        model: the student; evaluated without autocast.
        packed: the exported model, in float32 with exact sums.
        ids: a few tokens ``[B, T]``.

    Raises:
        RunError: it is more than rounding explains.
    """
    ids = ids[:, :_CHECKED_TOKENS]
    training = model.training
    model.eval()
    with torch.inference_mode():
        trained = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        exported = packed(input_ids=ids.to(packed.device), use_cache=False).logits.float().cpu()
    model.train(training)
    difference = float((trained - exported).abs().max() / trained.abs().max().clamp_min(1e-30))
    if not difference <= _AGREEMENT:
        raise RunError(
            f"the exported model must give the trained model's logits within {_AGREEMENT}, got a relative "
            f"difference of {difference:g}: the checkpoint was written, but is not what was trained"
        )
    return difference
