"""The last step of a run: the result is loaded and run once."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["rehearse"]


def rehearse(path: str | Path) -> str | None:
    """Load a finished checkpoint and run one token, or one small image, through it.

    Returns:
        ``None`` if it ran; else why it could not be tried.

    Raises:
        CheckpointError: it cannot be loaded or run.
    """
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

        from littlebit2.integrations.rehearsal import rehearse as run  # noqa: PLC0415  # imports transformers
    except ModuleNotFoundError as error:
        return f"not tried: {error.name} is not installed"
    config = json.loads(Path(path, "config.json").read_text("utf-8"))
    if config.get("model_type") not in CONFIG_MAPPING:
        return f"not tried: transformers has no model type {config.get('model_type')!r}"
    return run(path)
