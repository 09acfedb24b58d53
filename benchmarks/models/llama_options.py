"""Changes that any user can make to the time outside the packed linear layers.

An option changes a model that shares its weights with others (:func:`benchmarks.models.llama.twin`).
Several are joined by ``+``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models.llama import WEIGHT_STD, twin
from benchmarks.problems import random_packed
from benchmarks.shapes import LlamaShape
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import Int8Linear, LittleBitLinear
from littlebit2_kernels.int8 import quantize_rows

__all__ = ["DEFAULT", "OPTIONS", "FlatLinear", "Option", "apply_options", "parse_options"]

#: The name of a model without options.
DEFAULT = "as is"
HEAD_BPW = 1.0


class FlatLinear(nn.Module):
    """A linear layer of dense weights that multiplies matrices, whatever the dimensions of its input.

    After the prompt, ``generate`` passes lm_head the last position of ``[1, T, K]``, whose strides are not
    those of a matrix of rows: torch then calls a batched product, and copies bfloat16 weights for it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]``."""
        return self.linear(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


@dataclass
class _Changes:
    """What :func:`apply_options` does to a model."""

    attention: str | None = None
    head: Callable[[nn.Linear], nn.Module] | None = None


@dataclass(frozen=True)
class Option:
    """One change.

    Attributes:
        help: what it does, in a line.
        change: notes it in the changes.
    """

    help: str
    change: Callable[[_Changes], None]


def _packed_head(linear: nn.Linear) -> nn.Module:
    k, n = linear.in_features, linear.out_features
    rank = rank_for_bpw(k, n, HEAD_BPW, paths=2)
    generator = torch.Generator(linear.weight.device).manual_seed(0)
    packed = random_packed(k, n, [rank, rank], std=WEIGHT_STD, generator=generator)
    layer = LittleBitLinear.from_packed(packed)
    return layer.prepack_() if linear.weight.device.type == "cpu" else layer


def _eager_attention(changes: _Changes) -> None:
    changes.attention = "eager"


def _flat_head(changes: _Changes) -> None:
    changes.head = FlatLinear


def _int8_head(changes: _Changes) -> None:
    changes.head = lambda linear: Int8Linear.from_rows(*quantize_rows(linear.weight))


def _pack_head(changes: _Changes) -> None:
    changes.head = _packed_head


OPTIONS = {
    "eager-attention": Option(
        "attention by plain matrix products instead of torch's fused one", _eager_attention
    ),
    "flat-head": Option("pass lm_head contiguous rows, also after the prompt", _flat_head),
    "int8-head": Option("round lm_head to int8, one scale per row", _int8_head),
    "packed-head": Option(f"pack lm_head at {HEAD_BPW:g} bpw (another model: train it so)", _pack_head),
}


def parse_options(text: str) -> list[str]:
    """Names of options joined by ``+``; none for :data:`DEFAULT`.

    Raises:
        ValueError: a name is unknown, or two of them exclude each other.
    """
    if text == DEFAULT:
        return []
    names = text.split("+")
    for name in names:
        if name not in OPTIONS:
            raise ValueError(
                f"option must be one of {', '.join(OPTIONS)}, or several joined by +, got {name!r}"
            )
    heads = [name for name in names if name.endswith("-head")]
    if len(heads) > 1:
        raise ValueError(f"option must change lm_head once, got {text!r}")
    return names


def apply_options(model: Any, shape: LlamaShape, text: str) -> Any:
    """Make a model with the options of ``text`` that shares the other weights of ``model``.

    Raises:
        ValueError: see :func:`parse_options`.
    """
    names = parse_options(text)
    changes = _Changes()
    for name in names:
        OPTIONS[name].change(changes)
    changed = twin(model, shape, attention=changes.attention)
    if changes.head is not None:
        changed.lm_head = changes.head(model.lm_head)
    return changed
