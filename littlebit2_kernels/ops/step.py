"""``littlebit2::attention_step``, rotation, cache and attention of a decoding step on the CPU: its fake."""

from __future__ import annotations

import torch

from .operands import ACTIVATION_DTYPES

__all__ = ["register"]


def register() -> None:
    """Register the fake of the operator, which must be loaded. There are no gradients."""
    torch.library.register_fake("littlebit2::attention_step", _fake)


def _fake(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    heads = {"query": query, "new_key": new_key, "new_value": new_value, "key": key, "value": value}
    for name, tensor in heads.items():
        if tensor.dim() != 4:
            raise RuntimeError(
                f"littlebit2: {name} must have four dimensions, got shape {list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.dtype not in ACTIVATION_DTYPES:
            raise RuntimeError(
                f"littlebit2: {name} must be float32, float16 or bfloat16, all alike, got {tensor.dtype}"
            )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dim() != 3:
            raise RuntimeError(
                f"littlebit2: {name} must have three dimensions, got shape {list(tensor.shape)}"
            )
    torch._check(
        key.shape[1] == new_key.shape[1]
        and key.shape[3] == new_key.shape[3] == query.shape[3]
        and value.shape[1:3] == key.shape[1:3]
        and value.shape[3] == new_value.shape[3],
        lambda: (
            f"littlebit2: key and value must have the heads and elements of new_key and new_value, got "
            f"shapes {list(key.shape)} and {list(value.shape)} for {list(new_key.shape)} and "
            f"{list(new_value.shape)}"
        ),
    )
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
