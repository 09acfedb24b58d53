"""Quantization-aware training of packed layers: float latents in, the packed format out.

This much needs torch alone; :mod:`littlebit2.train.recipe` holds what is built on transformers. See
docs/finetuning.md.
"""

from .flips import FlipMeter
from .latents import MAGNITUDE, starting_latents
from .layer import TrainableLittleBitLinear, TrainablePath
from .model import (
    Dense,
    make_trainable,
    pack_model,
    packed_layers,
    parameter_kind,
    select_dense,
    trainable_layers,
)
from .surrogate import STEEPNESS, Surrogate, hard_sign, surrogate_slope

__all__ = [
    "MAGNITUDE",
    "STEEPNESS",
    "Dense",
    "FlipMeter",
    "Surrogate",
    "TrainableLittleBitLinear",
    "TrainablePath",
    "hard_sign",
    "make_trainable",
    "pack_model",
    "packed_layers",
    "parameter_kind",
    "select_dense",
    "starting_latents",
    "surrogate_slope",
    "trainable_layers",
]
