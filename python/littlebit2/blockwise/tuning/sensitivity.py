"""Which channels of a block's output the model's own output feels.

To second order, an error ``e`` of the hidden state changes the output by ``e^T F e``, where ``F`` is the
second moment of the gradient of the log-likelihood of tokens that the model itself chooses (Fisher's
information). Its diagonal is taken. The squared error alone knows nothing of this: a block can lower it and
yet lead the model further away from the dense one. So the loss of the tuning mixes both.

One block is in memory at a time. The hidden states before all blocks are held for a few sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from .block import BlockRunner, batches

__all__ = ["mean_squares", "measure_sensitivity", "mixed"]

#: Times the median norm: what a token's gradient counts at most, so that a few tokens do not own the mean.
_MOST = 3.0


def measure_sensitivity(runner: BlockRunner) -> list[torch.Tensor]:
    """Return the sensitivity ``[D]`` of the dense model's output to the output of every block.

    Args:
        runner: of the run; the first ``sensitivity_samples`` sequences are used.

    Raises:
        ValueError: a gradient is not finite.
    """
    settings, pieces = runner.settings, runner.pieces
    parts = list(batches(runner.samples[: settings.sensitivity_samples], settings.batch_size))
    hidden = [[pieces.embed(runner.ids[rows]) for rows in parts]]
    for index in range(len(pieces)):
        block = pieces.load_block(index)
        with torch.no_grad():
            hidden.append(
                [runner.call(index, rows)(block, h) for rows, h in zip(parts, hidden[-1], strict=True)]
            )
    generator = torch.Generator().manual_seed(settings.seed)
    gradients = [_of_head(runner, rows, h, generator) for rows, h in zip(parts, hidden.pop(), strict=True)]
    found = []
    for index in reversed(range(len(pieces))):
        block = pieces.load_block(index)
        inputs = hidden.pop()
        weighted, before = [], []
        for rows, state, gradient in zip(parts, inputs, gradients, strict=True):
            start = state.detach().requires_grad_(True)
            with torch.enable_grad():
                output = runner.call(index, rows)(block, start)
            weighted.append((gradient * output.detach().norm(dim=-1, keepdim=True)).flatten(0, -2))
            if index:
                before.append(torch.autograd.grad(output, start, gradient)[0])
        found.append(mean_squares(torch.cat(weighted), pieces.name(index)))
        gradients = before
    return found[::-1]


def _of_head(
    runner: BlockRunner, rows: Sequence[int], hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the gradient at the hidden states ``[B, T, D]`` after the last block, a sequence at a time."""
    pieces = runner.pieces
    found = []
    for row, state in zip(rows, hidden, strict=True):
        start = state.detach().unsqueeze(0).requires_grad_(True)
        logits = pieces.finish(runner.ids[[row]], start, gradients=True).flatten(0, 1).float()
        chosen = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        loss = cross_entropy(logits, chosen.flatten().to(logits.device), reduction="sum")
        found.append(torch.autograd.grad(loss, start)[0])
    return torch.cat(found)


def mean_squares(gradients: torch.Tensor, name: str = "the model") -> torch.Tensor:
    """Return the mean square ``[D]`` of every channel's gradients, 1 on average.

    Args:
        gradients: ``[tokens, D]``, each times the norm of the hidden state, as errors are relative to it.
        name: of the block, for the error.

    Raises:
        ValueError: a gradient is not finite.
    """
    norms = gradients.norm(dim=-1, keepdim=True)
    if not bool(norms.isfinite().all()):
        raise ValueError(
            f"sensitivity needs finite gradients, got NaN or infinity at the output of {name}: "
            "use sensitivity 0"
        )
    most = _MOST * float(norms.median())
    kept = gradients * (most / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1)
    squares = kept.square().mean(0)
    mean = float(squares.mean())
    # Without a gradient every channel is as good as another.
    return squares / mean if mean > 0 else torch.ones_like(squares)


def mixed(squares: torch.Tensor, share: float) -> torch.Tensor:
    """Return the weights of channels in the loss: ``share`` of it is the sensitivity's, the rest is even.

    Args:
        squares: ``[D]`` of :func:`mean_squares`.
        share: in [0, 1].
    """
    return squares * share + (1 - share)
