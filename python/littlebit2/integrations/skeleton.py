"""A model without values, from its configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

__all__ = ["UnknownModelError", "model_class", "skeleton"]


class UnknownModelError(ValueError):
    """Transformers does not have the model type that a configuration names."""


def _decoded(value: Any) -> Any:
    """Undo what transformers writes for numbers that JSON does not have: ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _decoded(one) for name, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def model_class(config: PreTrainedConfig, *, headed: bool = True) -> Any:
    """Return the class that ``architectures`` names if transformers has it, else the type's automatic one.

    Args:
        config: of the model.
        headed: whether files without ``architectures`` hold a head.
    """
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    causal = headed and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModel


def skeleton(source: Mapping[str, Any], *, headed: bool = True) -> PreTrainedModel:
    """Build the model that the content of a ``config.json`` describes on the meta device.

    Args:
        source: the configuration; not changed.
        headed: as for :func:`model_class`.

    Raises:
        UnknownModelError: the model type is missing, unknown or needs code of its own.
        ValueError: its class does not accept the configuration.
    """
    fields: dict[str, Any] = _decoded(copy.deepcopy(dict(source)))
    fields.pop("quantization_config", None)
    model_type: Any = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = " (its code lies beside the weights)" if fields.get("auto_map") else ""
        raise UnknownModelError(
            f"model_type must be one that transformers {transformers.__version__} has, "
            f"got {model_type!r}{code}"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(fields)
        kind = model_class(config, headed=headed)
        with torch.device("meta"):
            made: PreTrainedModel = (
                kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
            )
    except Exception as error:  # whatever a family's own code objects to
        text = " ".join(str(error).split())
        raise ValueError(
            f"transformers cannot build the {model_type} of config.json: {type(error).__name__}: {text:.300}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return made.eval()
