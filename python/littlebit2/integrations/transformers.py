"""Hugging Face transformers: ``from_pretrained`` and ``save_pretrained`` of packed models.

Importing this module (``littlebit2.register()`` does it) makes the library know our checkpoints, through
its own registries. Two things have none, and :func:`register` wraps a public class method for each:

- ``PreTrainedConfig.get_config_dict``: a directory in the layout of the LittleBit authors has no
  ``quantization_config`` by which a quantizer could be chosen, and transformers would leave its layers random
  with no more than a warning. For a *local directory* that holds packed layers of a layout other than ours,
  the entry is added; a directory that says it is packed, in a layout that cannot be read, is refused.
- ``AutoHfQuantizer.merge_quantization_configs``: the library drops the ``LittleBit2Config`` that is given to
  ``from_pretrained`` in favor of the stored one. The run settings of the given one are kept.

Nothing else is changed, and :func:`unregister` undoes it.

Where the package is installed, ``_littlebit2_autoregister`` has put stand-ins into the registries when the
interpreter started. They import this module for the first packed checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import configuration_utils
from transformers.quantizers import auto

from littlebit2.checkpoint import CheckpointError, looks_packed, open_checkpoint

from .configuration import METHOD, LittleBit2Config
from .decoding import attention
from .quantizer import LittleBit2Quantizer, attach

__all__ = ["LittleBit2Config", "LittleBit2Quantizer", "attach", "register", "unregister"]

#: What other writers may call the layouts that we read.
_FOREIGN_METHODS = ("littlebit", "nanoquant")
#: Files that say that a directory is packed.
_SETTINGS_FILES = ("littlebit_config.json", "nanoquant_config.json")


def register() -> None:
    """Make transformers load our checkpoints and the authors'; further calls do nothing."""
    for mapping, add, ours in _registries():
        held = mapping.get(METHOD)
        # Not the decorators' own check: they raise the second time, say after a reload of this module.
        if held is None:
            add(METHOD)(ours)
        elif getattr(held, "is_stand_in", False):
            _stand_ins[ours] = held
            mapping[METHOD] = ours  # at once: another thread may be loading a checkpoint
    for home, name, wrap in _wrapped():
        current = vars(home)[name].__func__
        if not hasattr(current, _ORIGINAL):
            setattr(home, name, classmethod(wrap(current)))
    attention.register()


def unregister() -> None:
    """Undo :func:`register`; the stand-ins of an installed package, which register when used, come back."""
    for mapping, _, ours in _registries():
        mapping.pop(METHOD, None)
        if ours in _stand_ins:
            mapping[METHOD] = _stand_ins.pop(ours)
    for home, name, _ in _wrapped():
        current = vars(home)[name].__func__
        if hasattr(current, _ORIGINAL):
            setattr(home, name, classmethod(getattr(current, _ORIGINAL)))
    attention.unregister()


#: What :func:`register` has replaced by each of our classes.
_stand_ins: dict[type, Any] = {}


def _registries() -> tuple[tuple[dict[str, Any], Callable[..., Any], type], ...]:
    """The registries of transformers, how to add to each, and our class for it."""
    return (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, LittleBit2Config),
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, LittleBit2Quantizer),
    )


#: Marks our wrappers; ``_littlebit2_autoregister`` looks for it too.
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


def _keeping_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def merge_quantization_configs(cls: type, quantization_config: Any, given: Any, *args: Any) -> Any:
        if not isinstance(given, LittleBit2Config):
            return original(cls, quantization_config, given, *args)
        stored = original(cls, quantization_config, None, *args)
        if not isinstance(stored, LittleBit2Config):
            return original(cls, stored, given, *args)  # raises: of another class
        return stored.run_as(given)

    setattr(merge_quantization_configs, _ORIGINAL, original)
    return merge_quantization_configs


def _wrapped() -> tuple[tuple[Any, str, Callable[..., Any]], ...]:
    """Class methods that :func:`register` wraps: of which class, and by what."""
    return (
        (configuration_utils.PreTrainedConfig, "get_config_dict", _describing),
        (auto.AutoHfQuantizer, "merge_quantization_configs", _keeping_settings),
    )


def _describe_foreign(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The missing entry for a directory with packed layers of another layout than ours, else ``None``.

    Raises:
        CheckpointError: the directory is said to be packed, and no packed layer can be read.
    """
    entry = config.get("quantization_config")
    if entry is not None and not (isinstance(entry, dict) and entry.get("quant_method") in _FOREIGN_METHODS):
        return None
    said = [name for name in _SETTINGS_FILES if (directory / name).is_file()]
    said += [f"{key} in config.json" for key in ("quant_func",) if key in config]
    said += [] if entry is None else [f"quant_method {entry['quant_method']!r} in config.json"]
    if not said and not looks_packed(directory):
        return None
    with open_checkpoint(directory) as checkpoint:
        if not checkpoint.layers:
            leaves = sorted({name.rpartition(".")[2] for name in checkpoint.dense})
            raise CheckpointError(
                f"{directory}: expected packed layers, as {' and '.join(said)} says, got none of a known "
                f"layout; its tensors are called {', '.join(leaves[:20])}. If the model is dense, remove "
                f"{said[0]}"
            )
        return LittleBit2Config.from_layers(checkpoint.layers, columns=checkpoint.columns).to_dict()


register()
