"""Dense heads of loaded models: rows in the layout that torch multiplies without copying the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["keep_rows_flat"]


def keep_rows_flat(model: Any) -> None:
    """Let a dense head see rows whose strides are those of a contiguous tensor; changes ``model`` in place.

    After the prompt, ``generate`` passes the head the last position of ``[1, T, K]``. Its strides are those
    of the prompt, and for such strides torch multiplies batches: it copies the weight first, on a CPU
    without threads, which takes a second or two for the head of a 7B model in bfloat16.

    Args:
        model: a ``PreTrainedModel``. One without a head, or with a head that is not ``nn.Linear`` itself,
            stays as it is.
    """
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if type(head) is nn.Linear and _flattened not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_flattened)


def _flattened(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    if not args:  # the input was passed by name
        return None
    x, *more = args
    # A view where the rows are evenly spaced, else a copy of them; `contiguous` leaves strides of size-1
    # dimensions alone.
    return (x.reshape(-1, x.shape[-1]).view(x.shape), *more)
