"""Hugging Face transformers: ``from_pretrained`` and ``save_pretrained`` of packed models.

Importing this module (``littlebit2.register()`` does it) makes the library know our checkpoints, through
its own registries. One thing has no registry: a directory in the layout of the LittleBit authors has no
``quantization_config`` by which a quantizer could be chosen, and transformers would leave its layers
random with no more than a warning. So :func:`register` also wraps one public class method,
``PreTrainedConfig.get_config_dict``: for a *local directory* that holds packed layers of a layout other than
ours, it adds the entry that is missing. Nothing else is changed, and :func:`unregister` undoes it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from littlebit2.checkpoint import open_checkpoint

from .configuration import METHOD, LittleBit2Config
from .quantizer import LittleBit2Quantizer, attach

__all__ = ["LittleBit2Config", "LittleBit2Quantizer", "attach", "register", "unregister"]

#: What other writers may call the layouts that we read.
_FOREIGN_METHODS = ("littlebit", "nanoquant")
#: Ends of tensor names that show a packed layer of some layout; the checkpoint reader has the last word.
_MARKS = (".V_packed", ".v2", ".scale_pre")


def register() -> None:
    """Make transformers load our checkpoints and the authors'; further calls do nothing."""
    # Not the decorators' own check: they raise the second time, say after a reload of this module.
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LittleBit2Config)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LittleBit2Quantizer)
    home: Any = PreTrainedConfig
    current = vars(home)["get_config_dict"].__func__
    if not hasattr(current, _ORIGINAL):
        home.get_config_dict = classmethod(_describing(current))


def unregister() -> None:
    """Undo :func:`register`."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    home: Any = PreTrainedConfig
    current = vars(home)["get_config_dict"].__func__
    if hasattr(current, _ORIGINAL):
        home.get_config_dict = classmethod(getattr(current, _ORIGINAL))


_ORIGINAL = "_littlebit2_original"

_GetConfigDict = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


def _describing(original: _GetConfigDict) -> _GetConfigDict:
    @functools.wraps(original)
    def get_config_dict(
        cls: type, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = original(cls, pretrained_model_name_or_path, **kwargs)
        if config and isinstance(pretrained_model_name_or_path, (str, os.PathLike)):
            directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            described = _describe_foreign(directory, config) if directory.is_dir() else None
            if described is not None:
                config = {**config, "quantization_config": described}
        return config, unused

    setattr(get_config_dict, _ORIGINAL, original)
    return get_config_dict


def _describe_foreign(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The missing entry for a directory with packed layers of another layout than ours, else ``None``."""
    entry = config.get("quantization_config")
    if entry is not None and not (isinstance(entry, dict) and entry.get("quant_method") in _FOREIGN_METHODS):
        return None
    if not _looks_packed(directory, config):
        return None
    with open_checkpoint(directory) as checkpoint:
        if not checkpoint.layers:
            return None
        return LittleBit2Config.from_layers(checkpoint.layers).to_dict()


def _looks_packed(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether opening the directory as a packed checkpoint is worth it: cheap, and quiet about bad files."""
    if (directory / "littlebit_config.json").is_file() or "quant_func" in config:
        return True
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                if any(name.endswith(_MARKS) for name in tensors.keys()):  # noqa: SIM118
                    return True
        except (OSError, SafetensorError):
            continue  # transformers says what is wrong with a file when it reads it
    return False


register()
