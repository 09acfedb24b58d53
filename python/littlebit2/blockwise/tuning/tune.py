"""Tuning a block to the output of the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Saved", "Tuned", "relative_error", "rounded", "schedule", "tune"]

#: Least squared norm of a token by which its error is divided.
_TINY = 1e-12
_CLIP = 1.0


@dataclass(frozen=True)
class Tuned:
    """What the tuning of a block came to.

    Attributes:
        before: error on the held-out sequences at the start.
        after: at the end; never above ``before``.
        steps: that were taken.
    """

    before: float
    after: float
    steps: int


class Saved(Protocol):
    """Where the state of a long tuning is kept."""

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, ``None`` if nothing was."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state instead of the last one."""


def relative_error(
    output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the squared error of each token relative to its own squared norm, averaged.

    With a plain sum of squares, a few tokens of massive activation would own the loss.

    Args:
        output: hidden states ``[B, T, D]``.
        target: likewise, of the dense model.
        weights: ``[D]``, of the channels' squared errors; by default 1.
    """
    squares = (output - target).square()
    error = (squares if weights is None else squares * weights).sum(-1)
    return (error / target.square().sum(-1).clamp_min(_TINY)).mean()


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates: a linear rise, then a cosine to zero."""
    rise = max(int(steps * warmup), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


@contextmanager
def rounded(dtypes: Mapping[nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Round parameters to the dtypes in which they will be stored, and undo it."""
    masters = {parameter: parameter.detach().clone() for parameter in dtypes}
    with torch.no_grad():
        for parameter, dtype in dtypes.items():
            parameter.copy_(parameter.to(dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)


def tune(
    loss: Callable[[int], torch.Tensor],
    measure: Callable[[], float],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    stored: Mapping[nn.Parameter, torch.dtype],
    *,
    steps: int,
    warmup: float,
    evaluations: int,
    patience: int,
    saved: Saved | None = None,
    tell: Callable[[int, float], object] = lambda done, error: None,
) -> Tuned:
    """Minimize a loss by AdamW, and end in the best of the states that were measured, the first included.

    Args:
        loss: returns the loss of a step, whose number it gets.
        measure: returns the error on held-out sequences.
        groups: parameters and their peak learning rate.
        stored: the dtypes in which parameters will be stored: states are measured and kept rounded.
        steps: most steps.
        warmup: as for :func:`schedule`.
        evaluations: measurements, evenly spread over the steps.
        patience: measurements without a gain after which to stop.
        saved: where the state is kept at every measurement, and from where it goes on.
        tell: called with the number of steps that are done and the error, at every measurement.
    """
    parameters = [parameter for members, _ in groups for parameter in members]
    optimizer = torch.optim.AdamW(
        [{"params": list(members), "lr": lr, "peak": lr} for members, lr in groups],
        weight_decay=0.0,
        fused=True,
    )
    state = [torch.empty_like(parameter) for parameter in parameters]

    def keep() -> None:
        for kept, parameter in zip(state, parameters, strict=True):
            kept.copy_(parameter.detach())

    found = None if saved is None else saved.load()
    if found is None:
        done = waited = 0
        with rounded(stored):
            before = best = measure()
            keep()
    else:
        done, waited, before, best = (found[name] for name in ("done", "waited", "before", "best"))
        optimizer.load_state_dict(found["optimizer"])
        with torch.no_grad():
            for into, values in ((parameters, found["parameters"]), (state, found["state"])):
                for tensor, value in zip(into, values, strict=True):
                    tensor.copy_(value)
        del found
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    for step in range(done, steps):
        if waited >= patience:
            break
        factor = schedule(step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        done = step + 1
        if done not in marks:
            continue
        with rounded(stored):
            error = measure()
            if error < best:
                best, waited = error, 0
                keep()
            else:
                waited += 1
        tell(done, error)
        if saved is not None:
            saved.save(
                {
                    "done": done,
                    "waited": waited,
                    "before": before,
                    "best": best,
                    "parameters": [parameter.detach() for parameter in parameters],
                    "state": state,
                    "optimizer": optimizer.state_dict(),
                }
            )
    with torch.no_grad():
        for kept, parameter in zip(state, parameters, strict=True):
            parameter.copy_(kept)
    return Tuned(before, best, done)
