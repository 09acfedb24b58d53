"""Which layers are quantized together. What comes out does not depend on it, only how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import TypeVar

import torch

from .config import QuantConfig
from .memory import working_bytes
from .methods import iteration_operations
from .solvers.binary_path import WHOLE_COLUMNS

__all__ = ["batch_key", "batch_size", "in_batches", "keeps_bits"]

T = TypeVar("T")

#: On a CPU, a layer of more operations an iteration (about 2 ms) gains nothing from company: its products
#: take the time, and the data of several layers no longer lies in the processor's cache
#: (docs/quantization.md).
_CPU_OPERATIONS = 1e8
_CPU_LAYERS = 8
#: Memory that a batch may take on another device, where launching operators is what takes the time.
_DEVICE_BYTES = 2**30
_DEVICE_LAYERS = 64


def batch_size(in_features: int, out_features: int, config: QuantConfig, device: torch.device | str) -> int:
    """Return how many layers of this shape are quantized together at most.

    Args:
        in_features: K.
        out_features: N.
        config: of one layer, with ranks.
        device: that computes.
    """
    assert config.ranks is not None
    steps = config.steps_for(in_features, out_features, config.ranks)
    if not steps.refine_rounds:
        return 1  # decompositions and rotations are done one by one
    if torch.device(device).type == "cpu":
        if not keeps_bits((out_features, in_features)):
            return 1
        work = iteration_operations((out_features, in_features), max(config.ranks))
        return _CPU_LAYERS if work <= _CPU_OPERATIONS else 1
    return max(1, min(_DEVICE_LAYERS, _DEVICE_BYTES // working_bytes(in_features, out_features, config)))


def keeps_bits(shape: tuple[int, int]) -> bool:
    """Whether a layer ``[N, K]`` has the same bits in a batch on a CPU as alone.

    Products of a matrix and a single column, or row, round by where in memory they lie; a last chunk of a
    long factor may be one.
    """
    return min(shape) > 1 and max(shape) <= WHOLE_COLUMNS


def batch_key(in_features: int, out_features: int, config: QuantConfig) -> Hashable:
    """Return what layers of one batch have in common: all but their seeds."""
    return in_features, out_features, replace(config, seed=0)


def in_batches(
    items: Iterable[T], key: Callable[[T], Hashable], most: Callable[[T], int]
) -> list[tuple[T, ...]]:
    """Group items of one key, in the order of the first of each batch.

    Args:
        items: in order.
        key: what the items of a batch share.
        most: how many there are in a batch with this item at most.
    """
    batches: list[list[T]] = []
    filling: dict[Hashable, list[T]] = {}
    for item in items:
        batch = filling.get(key(item))
        if batch is None or len(batch) >= most(item):
            batch = filling[key(item)] = []
            batches.append(batch)
        batch.append(item)
    return [tuple(batch) for batch in batches]
