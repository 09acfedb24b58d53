"""Attention of transformers' models: the native kernel for few queries on the CPU, else ``sdpa``.

:func:`register` makes the name ``littlebit2`` known to the library as an attention implementation, beside
``sdpa`` and ``eager``, and :func:`choose` sets it for a loaded model. The library does not store the name of
an implementation with a model, so that what is saved loads without this package's kernels.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from littlebit2_kernels import attention
from littlebit2_kernels.ops.attention import attention_by_torch
from littlebit2_kernels.ops.operands import ACTIVATION_DTYPES as _DTYPES

__all__ = [
    "MOST_QUERIES",
    "NAME",
    "allows_mask",
    "attention_forward",
    "choose",
    "is_plain",
    "register",
    "unregister",
]

#: The name of the attention implementation.
NAME = "littlebit2"
#: Most queries for which the kernel is used: it reads keys and values once for all of them.
MOST_QUERIES = 8


def register() -> None:
    """Make transformers know the attention implementation; further calls do nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def unregister() -> None:
    """Undo :func:`register`. Models that use the implementation do not run afterwards."""
    for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(interface)._global_mapping.pop(NAME, None)


def choose(model: PreTrainedModel) -> bool:
    """Let a model on the CPU use the kernel where its attention is known to be what the kernel computes.

    That is: all of its parts use the library's attention interface, took its ``sdpa`` (or, for its soft cap
    alone, could not), and do nothing by the name of the implementation.

    Returns:
        Whether it was set.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if model.device.type != "cpu" or not all(_suitable(part) for part in parts):
        return False
    register()
    model.set_attn_implementation(NAME)
    return True


def _suitable(part: PreTrainedModel) -> bool:
    if not part._can_set_attn_implementation():
        return False
    try:
        source = inspect.getsource(sys.modules[type(part).__module__])
    except (KeyError, OSError, TypeError):
        return False
    if re.search(r"""["']sdpa["']""", source):
        return False
    if part.config._attn_implementation == "sdpa":
        return True
    return part.config._attn_implementation == "eager" and not part._supports_sdpa and "softcap=" in source


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute what ``sdpa_attention_forward`` of transformers does, with its arguments, and honor soft caps.

    Args:
        module: the attention module.
        query: ``[B, H, M, D]``.
        key: ``[B, G, T, D]``.
        value: ``[B, G, T, E]``.
        attention_mask: bool or additive, ``[B, 1 or H, M, T]``.
        dropout: probability.
        scaling: factor of the products.
        is_causal: by default that of the module.
        softcap: cap of the scores, as in Gemma 2.
        **kwargs: what the library passes besides; what changes the result is left to its ``sdpa``.

    Returns:
        ``[B, M, H, E]`` and no weights.

    Raises:
        ValueError: the library's paged cache, or dropout with a soft cap; set another implementation.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(
            f'attention implementation "{NAME}" must not be used with a paged cache: call '
            'model.set_attn_implementation("sdpa") before'
        )
    plain = dropout == 0.0 and is_plain(kwargs) and _fit(query, key, value, attention_mask)
    if (
        plain
        and query.device.type == "cpu"
        and _few(query.shape[2])
        and not _differentiates(query, key, value, attention_mask)
    ):
        key, value, causal = _causality(module, query, key, value, attention_mask, is_causal)
        out = attention(query, key, value, mask=attention_mask, scale=scaling, softcap=softcap, causal=causal)
        return out.transpose(1, 2), None
    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if not plain:
        raise ValueError(
            f'attention implementation "{NAME}" takes a soft cap without dropout and biases, and returns '
            'no weights: call model.set_attn_implementation("eager")'
        )
    key, value, causal = _causality(module, query, key, value, attention_mask, is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention_by_torch(query, key, value, attention_mask, scale, softcap, causal, 0), None


def _few(queries: Any) -> bool:
    """Whether there are few queries; an exported or compiled program for any number of them has many."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415  # slow

        return statically_known_true(queries <= MOST_QUERIES)
    return bool(queries <= MOST_QUERIES)


def is_plain(settings: dict[str, Any]) -> bool:
    """Whether nothing else enters the result by the further arguments of the interface."""
    asked = settings.get
    return (
        asked("position_bias") is None
        and asked("s_aux") is None
        and asked("head_mask") is None
        and not asked("output_attentions", False)
    )


def allows_mask(mask: torch.Tensor | None, keys: int) -> bool:
    """Whether the kernel takes a mask for this number of keys."""
    if mask is None:
        return True
    return mask.dim() == 4 and mask.shape[-1] == keys and mask.dtype in (torch.bool, *_DTYPES)


def _fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the tensors are what the kernel takes."""
    if not query.dtype == key.dtype == value.dtype or query.dtype not in _DTYPES:
        return False
    return query.shape[0] == key.shape[0] and key.shape[2] != 0 and allows_mask(mask, key.shape[2])


def _differentiates(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def _causality(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The keys and values that count, and whether the call is causal, by the rules of the library's ``sdpa``.

    Without a mask, several queries of a causal module are the first tokens: what a cache of fixed size holds
    after them is empty.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries = query.shape[2]
    if queries == 1 or mask is not None or not causal:
        return key, value, False
    return key[:, :, :queries], value[:, :, :queries], True
