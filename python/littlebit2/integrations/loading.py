"""``littlebit2.load``: a checkpoint of any known layout as a model that is whole, or an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from littlebit2.architecture.names import CAUSAL_HEAD
from littlebit2.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from littlebit2.quantize.device import check_device, check_dtype

from .bars import no_bars_in_logs
from .configuration import LittleBit2Config
from .modules import layers_of
from .quantizer import reusing
from .skeleton import model_class
from .transformers import register

__all__ = ["load"]

#: The voices of Qwen2.5-Omni.
_VOICES = "spk_dict.pt"
#: Names listed in one message; a wrong model class can miss thousands.
_MOST_NAMES = 20


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    activation: str = "auto",
    backend: str = "auto",
    fuse: bool = True,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a checkpoint directory and make sure that nothing of it is missing.

    Takes every layout that :func:`littlebit2.checkpoint.open_checkpoint` knows, dense checkpoints
    included. Packed layers are read one at a time and, on the CPU, brought to the kernels' layout as they
    come, so that at no time more is held than the packed model and one tensor. Dense tensors are
    memory-mapped if their stored dtype is the wanted one.

    Args:
        path: a local directory with config.json and weights.
        device: where the model goes.
        dtype: dtype of dense tensors and activations; by default that of config.json or of the file.
            Scales are float32 whatever it is.
        activation: how activations enter the sums, see :func:`littlebit2_kernels.littlebit_linear`.
        backend: backend for every packed layer, see there too.
        fuse: whether norms, projections, MLPs and residuals are computed in fewer calls, see
            :func:`littlebit2.fuse_projections`.
        attn_implementation: an attention implementation of transformers, such as ``"sdpa"`` or ``"eager"``.
            By default that of this package, ``"littlebit2"``, for packed models on the CPU whose attention it
            can compute (docs/checkpoints.md), else transformers' own choice.

    Returns:
        The model of the class that config.json names, in evaluation mode.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: there is no such directory.
        CheckpointError: a layer or tensor is missing, unexpected, mis-shaped or malformed; the message
            names it.
        ValueError: an argument or the configuration is invalid.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    register()
    wanted = check_device(device)
    if dtype not in (None, "auto"):
        dtype = check_dtype(dtype)
    how: dict[str, Any] = {
        "backend": backend,
        "activation": activation,
        "prepack": wanted.type == "cpu",
        "fuse": fuse,
    }
    LittleBit2Config(**how)  # checks the two that are the caller's before anything is read
    with open_checkpoint(path) as checkpoint:
        if not checkpoint.config:
            raise CheckpointError(f"{checkpoint.path}: config.json is missing, which names the model's class")
        if not checkpoint.files.standard:
            how["source"] = str(checkpoint.path)
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        if checkpoint.layers:
            skipped = (checkpoint.config.get("quantization_config") or {}).get("modules_to_not_convert") or ()
            config.quantization_config = {
                **LittleBit2Config.from_layers(
                    checkpoint.layers, skipped, checkpoint.columns, tuple(checkpoint.int8)
                ).to_dict(),
                **how,
            }
        with _quiet(), no_bars_in_logs(), reusing(checkpoint):
            # A file without a head may still tie it to the embedding.
            names = (*checkpoint.dense, *checkpoint.layers, *checkpoint.tied())
            headed = any(CAUSAL_HEAD in name for name in names)
            kind = model_class(config, headed=headed)
            if not checkpoint.files.standard and hasattr(kind, "_model_mapping"):
                kind = kind._model_mapping[type(config)]  # automatic classes need a directory
            model, info = _with_info(kind, checkpoint.path)(
                **_where(checkpoint),
                **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
                config=config,
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                # Reported below together with everything else.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            if not checkpoint.files.standard:
                _complete(model, checkpoint.path)
        _check_complete(model, info, checkpoint)
    return model.to(wanted).eval() if wanted.type != "cpu" else model.eval()


def _where(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tell transformers the directory, or give it the dense tensors of files that it would not find."""
    if checkpoint.files.standard:
        return {"pretrained_model_name_or_path": str(checkpoint.path)}
    dense = checkpoint.files.read(checkpoint.dense)
    return {"pretrained_model_name_or_path": None, "state_dict": dense}


def _with_info(kind: Any, path: Path) -> Callable[..., Any]:
    """Return ``kind.from_pretrained``, mended where a class has one that cannot give what it found.

    That of Qwen2.5-Omni expects a model from the library's own, whatever was asked for, to load its voices.
    """
    if not hasattr(kind, "load_speakers"):
        whole: Callable[..., Any] = kind.from_pretrained
        return whole

    def from_pretrained(**options: Any) -> Any:
        if not (path / _VOICES).is_file():
            raise CheckpointError(f"{path}: {_VOICES} is missing, which {kind.__name__} reads")
        model, info = vars(PreTrainedModel)["from_pretrained"].__func__(kind, **options)
        model.load_speakers(str(path / _VOICES))
        return model, info

    return from_pretrained


def _complete(model: PreTrainedModel, path: Path) -> None:
    """Do what ``from_pretrained`` does with a directory besides the weights."""
    model.name_or_path = str(path)
    model.config.name_or_path = str(path)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's own report of missing and mismatched tensors back: it becomes an error here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_complete(model: PreTrainedModel, info: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys"):
        names = sorted(info.get(kind) or ())
        if names:
            problems.append(f"{kind.removesuffix('_keys')} tensors: {_listed(names)}")
    shapes = [(name, list(got), list(wanted)) for name, got, wanted in info.get("mismatched_keys") or ()]
    if shapes:
        listed = _listed(
            [f"{name} must have shape {wanted}, got {got}" for name, got, wanted in sorted(shapes)]
        )
        problems.append(f"mis-shaped tensors: {listed}")
    problems += info.get("error_msgs") or ()
    layers = layers_of(model)
    if len(layers) != len(checkpoint.layers):
        problems.append(f"the checkpoint has {len(checkpoint.layers)} packed layers, the model {len(layers)}")
    meta = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if meta:
        problems.append(f"tensors without values: {_listed(meta)}")
    if problems:
        raise CheckpointError(f"{checkpoint.path} as {type(model).__name__}: " + "; ".join(problems))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
