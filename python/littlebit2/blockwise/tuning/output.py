"""The loss of the whole model's tuning: KL of the logits, of which a few tokens' are in memory at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from littlebit2.train.losses import distillation_kl

from ..pieces import ModelInPieces

__all__ = ["output_kl"]

#: Bytes of float32 logits of one model at a time. On a CPU they stay below what the C library maps anew, and
#: so faults in page by page, for every tensor (32 MiB).
_BYTES = {"cpu": 24 << 20, "cuda": 1 << 28}
#: Tokens at a time at least: the head's weight is read once for them.
_LEAST = 64


def output_kl(
    pieces: ModelInPieces, ids: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Return KL(dense || quantized) of the logits, mean over tokens, in float32.

    Args:
        pieces: the model; what comes after its blocks is not trained.
        ids: tokens ``[B, T]``.
        hidden: states ``[B, T, D]`` after the last quantized block; the result has a gradient in them.
        target: likewise, after the last dense block; no gradient.
    """
    vocabulary = int(pieces.model.get_output_embeddings().weight.shape[0])
    tokens = max(_BYTES.get(hidden.device.type, _BYTES["cuda"]) // (4 * vocabulary), _LEAST)
    value = _Kl.apply(pieces, ids, hidden, target, max(tokens // len(ids), 1))
    assert isinstance(value, torch.Tensor)
    return value


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pieces: ModelInPieces,
        ids: torch.Tensor,
        hidden: torch.Tensor,
        target: torch.Tensor,
        size: int,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[2]
        gradient = torch.empty_like(hidden) if wanted else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            states = hidden[:, part].detach().requires_grad_(wanted)
            share = states.shape[1] / ids.shape[1]
            dense = pieces.finish(ids[:, part], target[:, part])
            with torch.set_grad_enabled(wanted):
                kl = share * distillation_kl(pieces.finish(ids[:, part], states, gradients=wanted), dense)
            total += kl.detach()
            if gradient is not None:
                (gradient[:, part],) = torch.autograd.grad(kl, states)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * grad.to(gradient.dtype), None, None
