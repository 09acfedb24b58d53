"""A dense checkpoint as a model of transformers with its tokenizer, for work that runs it as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint import DenseCheckpoint
from .checkpoint.side_files import check_tokenizer
from .quantize.device import check_dtype

__all__ = ["architecture_of", "load_dense"]


def architecture_of(checkpoint: DenseCheckpoint) -> str:
    """Return the name of the model's class.

    Raises:
        ValueError: ``config.json`` does not have it.
    """
    found = checkpoint.config.get("architectures")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise ValueError(f"{checkpoint.path}: config.json must name the model's class under architectures")
    return found[0]


def load_dense(
    model_dir: Path, architecture: str, device: torch.device, dtype: torch.dtype | str | None
) -> tuple[Any, Any]:
    """Return model and tokenizer, ready to run.

    Args:
        model_dir: directory of the checkpoint. Nothing is downloaded, none of its code is run.
        architecture: name of the model's class in transformers.
        device: to put it on.
        dtype: of the model; ``None``: as stored.

    Raises:
        ImportError: transformers is not installed.
        ValueError: it has no such class, there is no tokenizer, or ``dtype`` is not of floating point.
    """
    try:
        import transformers  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise ImportError(
            "running a dense model needs transformers: pip install 'littlebit2-kernels[models]'"
        ) from error
    built = getattr(transformers, architecture, None)
    if built is None:
        raise ValueError(f"{model_dir}: transformers {transformers.__version__} has no class {architecture}")
    precision = "auto" if dtype is None else check_dtype(dtype)
    check_tokenizer(model_dir)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        model = built.from_pretrained(model_dir, local_files_only=True, dtype=precision)
    finally:
        if shown:
            bars.enable_progress_bar()
    return model.to(device).eval(), tokenizer
