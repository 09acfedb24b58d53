"""One forward of a finished checkpoint: does what was written load and run?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from littlebit2.checkpoint import CheckpointError

from .loading import load

__all__ = ["rehearse"]


def rehearse(path: str | Path) -> str | None:
    """Load a checkpoint and run one token, or one small image, through it.

    Returns:
        ``None`` if it ran; else why it could not be tried.

    Raises:
        CheckpointError: it cannot be loaded, or its code asks a packed layer for what only dense ones have,
            or calls a dense layer that was replaced.
    """
    model = load(path)
    inputs = _inputs(model)
    if inputs is None:
        return f"loaded, but not run: no input for {type(model).__name__} is known"
    try:
        with torch.inference_mode():
            outputs = model(**inputs)
    except AttributeError as error:
        if "LittleBit" not in str(error):
            return f"loaded, but not run: {error}"
        raise CheckpointError(
            f"{path}: was written and loads, but {type(model).__name__} cannot run it: {error}; quantize "
            "again and exclude the layers whose weight its code reads"
        ) from error
    except Exception as error:  # the input may be at fault
        # Layers without values: what was replaced is still called where it is not known.
        if "device meta" in str(error) or "was not loaded from its checkpoint" in str(error):
            raise CheckpointError(
                f"{path}: was written and loads, but {type(model).__name__} calls a layer that was replaced "
                f"by its packed one: {_line(error)}; quantize again and exclude that layer"
            ) from error
        return f"loaded, but not run: {_line(error)}"
    first: Any = outputs[0] if isinstance(outputs, (tuple, ModelOutput)) else outputs
    if isinstance(first, torch.Tensor) and not bool(torch.isfinite(first).all()):
        return "loaded and run, but its outputs are not finite"
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _inputs(model: Any) -> dict[str, torch.Tensor] | None:
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        ids = torch.ones(1, 1, dtype=torch.long)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if main == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"pixel_values": torch.zeros(1, channels, size, size, dtype=model.dtype)}
    return None
