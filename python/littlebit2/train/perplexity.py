"""Perplexity of a causal language model on blocks of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .data import TokenBlocks
from .losses import token_nll

__all__ = ["Perplexity", "batches_of", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: that were predicted: all but the first of every block.
    """

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity; infinite where it is above what a float can hold."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(model: Any, blocks: TokenBlocks, *, batch_size: int = 8) -> Perplexity:
    """Measure ``model`` on blocks that do not overlap, each without the context of the one before.

    Args:
        model: a causal language model of transformers; run in evaluation mode, and left in the mode it has.
        blocks: the tokens.
        batch_size: blocks at a time.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    training = model.training
    model.eval()
    total = 0.0
    try:
        for ids in batches_of(blocks, batch_size):
            with torch.inference_mode():
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits
                total += float(token_nll(logits, ids))
    finally:
        model.train(training)
    count = len(blocks) * (blocks.length - 1)
    return Perplexity(total / count, count)


def batches_of(blocks: TokenBlocks, size: int) -> Iterator[torch.Tensor]:
    """Yield the ids of consecutive blocks, int64 ``[B, T]``."""
    for start in range(0, len(blocks), size):
        stop = min(start + size, len(blocks))
        yield torch.stack([blocks[i]["input_ids"] for i in range(start, stop)])
