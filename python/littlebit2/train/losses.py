"""The losses of distillation: KL of the logits and squared differences of the hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

__all__ = ["TopK", "distillation_kl", "hidden_mse", "token_nll", "top_k", "top_k_kl"]

#: Bytes of float32 logits that are worked on at a time: a few of them fit a core's cache, which is several
#: times as fast as memory. A GPU gets more, for launches.
_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def distillation_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student), summed over the vocabulary, mean over tokens, in float32.

    The gradient is formed in the forward pass, a few rows at a time, so that beside the logits only it is
    held, in their dtype.

    Args:
        student: logits ``[..., vocabulary]``; the loss is differentiable in them, once.
        teacher: logits of the same shape; no gradient.

    Raises:
        ValueError: shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher must give logits of shape {list(student.shape)}, as the student does, "
            f"got {list(teacher.shape)}"
        )
    return _Kl.apply(student, teacher)


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        rows, targets = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=rows.device)
        for part in _parts(rows):
            log_s = torch.log_softmax(rows[part].float(), -1)
            log_t = torch.log_softmax(targets[part].float(), -1)
            probability = log_t.exp()
            total += (probability * (log_t - log_s)).sum()
            if gradient is not None:
                gradient[part] = (log_s.exp_() - probability) / len(rows)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(student))
        return total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def _parts(rows: torch.Tensor) -> Iterator[slice]:
    """Yield the rows that are worked on together."""
    size = max(_BYTES.get(rows.device.type, _BYTES["cuda"]) // (4 * rows.shape[-1]), 1)
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


class TopK:
    """The k likeliest tokens of a teacher at every position.

    Args:
        log_probabilities: ``[..., k]``, of the whole vocabulary's softmax.
        tokens: int64 ``[..., k]``.
    """

    def __init__(self, log_probabilities: torch.Tensor, tokens: torch.Tensor) -> None:
        self.log_probabilities = log_probabilities
        self.tokens = tokens


def top_k(logits: torch.Tensor, k: int) -> TopK:
    """Return the ``k`` likeliest tokens of ``logits`` ``[..., vocabulary]``.

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary's size.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be between 1 and the vocabulary's size {logits.shape[-1]}, got {k}")
    values, tokens = logits.float().topk(k, -1)
    return TopK(values - torch.logsumexp(logits.float(), -1, keepdim=True), tokens)


def top_k_kl(student: torch.Tensor, teacher: TopK) -> torch.Tensor:
    """Return the KL over a teacher's likeliest tokens, all others taken as one; mean over tokens, float32.

    Merging outcomes cannot increase a KL: it is a lower bound of :func:`distillation_kl`, and equal to it
    where k is the whole vocabulary.

    Args:
        student: logits ``[..., vocabulary]``.
        teacher: with the same leading dimensions.
    """
    logits = student.float()
    total = torch.logsumexp(logits, -1, keepdim=True)
    log_t = teacher.log_probabilities.float()
    log_s = logits.gather(-1, teacher.tokens) - total
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    if teacher.tokens.shape[-1] < logits.shape[-1]:
        others = logits.scatter(-1, teacher.tokens, float("-inf"))
        log_rest_s = torch.logsumexp(others, -1) - total.squeeze(-1)
        rest_t = (1 - log_t.exp().sum(-1)).clamp_min(torch.finfo(torch.float32).tiny)
        kl = kl + rest_t * (rest_t.log() - log_rest_s)
    return kl.mean()


def hidden_mse(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum over layers of the mean squared difference, in float32.

    Args:
        student: hidden states ``[B, T, D]`` of every layer.
        teacher: likewise.

    Raises:
        ValueError: there are not as many, or none.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"teacher must give as many hidden states as the student ({len(student)}), got {len(teacher)}"
        )
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        total = total + torch.nn.functional.mse_loss(ours.float(), theirs.to(ours.device).float())
    return total


def token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood of each next token, float32.

    Args:
        logits: ``[B, T, vocabulary]``; those of the last position are not used.
        tokens: int64 ``[B, T]``; the first of each row is not predicted.
    """
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    targets = tokens[:, 1:].reshape(-1).to(rows.device)
    total = torch.zeros((), device=rows.device)
    for part in _parts(rows):
        total += torch.nn.functional.cross_entropy(rows[part].float(), targets[part], reduction="sum")
    return total
