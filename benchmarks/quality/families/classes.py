"""The model types of transformers, and the class with which each is tried."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

__all__ = ["classes_of", "model_types"]

#: Mappings of the library, in the order in which a class that is in several of them is taken.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


@functools.cache
def _candidates() -> dict[str, list[str]]:
    """Names of classes by model type, in the order of the mappings. Imports no model."""
    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            found.setdefault(model_type, []).extend([names] if isinstance(names, str) else names)
    return found


def model_types() -> list[str]:
    """Return every model type of the mappings."""
    return list(_candidates())


def classes_of(model_type: str) -> list[str]:
    """Return the names of the model classes with which a type is tried, until one can be built.

    First come those whose code asks for the configuration of this type, in the order of the mappings.
    """
    there = [name for name in _candidates()[model_type] if hasattr(transformers, name)]
    wanted = CONFIG_MAPPING_NAMES.get(model_type)
    fitting = [name for name in there if _config_of(getattr(transformers, name)) in (wanted, None)]
    return list(dict.fromkeys([*fitting, *there])) or _candidates()[model_type]


def _config_of(kind: Any) -> str | None:
    """Name of the configuration's class that a model class declares, ``None`` if it declares none."""
    try:
        parameters = inspect.signature(kind.__init__).parameters
        declared: Any = parameters["config"].annotation if "config" in parameters else inspect.Parameter.empty
        if declared is inspect.Parameter.empty:
            declared = kind.config_class
    except ImportError:  # a stand-in for a class whose packages are not installed
        return None
    name = declared if isinstance(declared, str) else getattr(declared, "__name__", None)
    return None if name in ("PreTrainedConfig", "PretrainedConfig") else name
