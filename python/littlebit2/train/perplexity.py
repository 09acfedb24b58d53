"""Perplexity of a causal language model on blocks of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .data import TokenBlocks
from .losses import distillation_kl, token_nll

__all__ = ["Agreement", "Perplexity", "agreement", "batches_of", "perplexity"]


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: that were predicted: all but the first of every block, each once.
    """

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity; infinite where it is above what a float can hold."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class Agreement:
    """How a model's predictions compare with those of a teacher.

    Attributes:
        kl: mean KL(teacher || model) of a predicted token, in nats.
        top1: fraction of tokens for which both have the same likeliest one.
        teacher: perplexity of the teacher on the same tokens.
        tokens: that were compared: those that perplexities count.
    """

    kl: float
    top1: float
    teacher: Perplexity
    tokens: int


def perplexity(model: Any, blocks: TokenBlocks, *, batch_size: int = 8) -> Perplexity:
    """Measure ``model`` on blocks, each without the context of the one before.

    Where blocks overlap, as a ``stride`` below their length makes them, each token is counted once: in the
    first block that has it, with the longest context that it gets there.

    Args:
        model: a causal language model of transformers; run in evaluation mode, and left in the mode it has.
        blocks: the tokens.
        batch_size: blocks at a time.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    total = 0.0
    with _evaluating(model):
        for ids, new in _counted(blocks, batch_size):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            total += float(token_nll(logits[:, -new - 1 :], ids[:, -new - 1 :]))
    count = _predicted_tokens(blocks)
    return Perplexity(total / count, count)


def agreement(
    model: Any, teacher: Any, blocks: TokenBlocks, *, batch_size: int = 8
) -> tuple[Perplexity, Agreement]:
    """Measure ``model`` like :func:`perplexity`, and compare it with ``teacher`` on the same tokens.

    Args:
        model: a causal language model of transformers.
        teacher: another with the same vocabulary.
        blocks: the tokens.
        batch_size: blocks at a time.

    Raises:
        ValueError: ``batch_size`` is not positive, or the vocabularies differ in size.
    """
    own = others = kl = 0.0
    same = 0
    with _evaluating(model), _evaluating(teacher):
        for ids, new in _counted(blocks, batch_size):
            rows = slice(-new - 1, None)
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, rows]
            expected = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits[:, rows]
            expected = expected.to(logits.device)
            own += float(token_nll(logits, ids[:, rows]))
            others += float(token_nll(expected, ids[:, rows]))
            # The last position predicts a token that is not there.
            logits, expected = logits[:, :-1], expected[:, :-1]
            kl += float(distillation_kl(logits, expected)) * logits.shape[0] * new
            same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
    count = _predicted_tokens(blocks)
    found = Agreement(kl / count, same / count, Perplexity(others / count, count), count)
    return Perplexity(own / count, count), found


def _predicted_tokens(blocks: TokenBlocks) -> int:
    """Number of tokens that a perplexity on ``blocks`` counts: each but the first of a context, once."""
    first = blocks.length - 1
    return first + (len(blocks) - 1) * min(blocks.stride, first)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a model in evaluation mode without gradients, and each of its modules back in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _counted(blocks: TokenBlocks, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield batches of ids int64 ``[B, T]``, and how many tokens at the end of each row are new."""
    if size < 1:
        raise ValueError(f"batch_size must be positive, got {size}")
    first, stride = blocks.length - 1, blocks.stride
    if stride >= first:
        yield from ((ids, first) for ids in batches_of(blocks, size))
        return
    yield blocks[0]["input_ids"][None], first
    for start in range(1, len(blocks), size):
        stop = min(start + size, len(blocks))
        yield torch.stack([blocks[i]["input_ids"] for i in range(start, stop)]), stride


def batches_of(blocks: TokenBlocks, size: int) -> Iterator[torch.Tensor]:
    """Yield the ids of consecutive blocks, int64 ``[B, T]``."""
    for start in range(0, len(blocks), size):
        stop = min(start + size, len(blocks))
        yield torch.stack([blocks[i]["input_ids"] for i in range(start, stop)])
