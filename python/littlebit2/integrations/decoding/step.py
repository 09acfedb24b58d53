"""A decoding step of an attention module in one call: rotation, cache and attention.

The rewritten attention of a fused model (:mod:`littlebit2.architecture.decoder.step`) asks the attention
implementation for it. Few queries without gradients get it, on a cache that grows in a buffer with room left,
or on one of fixed size; all else is called one after another.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from littlebit2.architecture.decoder.rotary import Rotation, turns
from littlebit2.architecture.decoder.step import STEP
from littlebit2_kernels.ops.calls import attention_step

from .attention import MOST_QUERIES, allows_mask, attention_forward, is_plain
from .cache import GrowingLayer, GrowingSlidingWindowLayer

__all__ = ["step"]


def step(
    how: Rotation,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: Any,
    place: int,
    mask: torch.Tensor | None,
    /,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None] | None:
    """Rotate, write into the cache, and compute what ``attention_forward`` does, with its settings.

    Args:
        how: the rotation.
        query: ``[B, H, M, D]``, before it is rotated.
        key: ``[B, G, M, D]``, likewise.
        value: ``[B, G, M, E]``.
        cos: ``[B, M, R]`` or ``[1, M, R]``.
        sin: likewise.
        cache: of the model.
        place: of the module's layer in the cache.
        mask: bool or additive, ``[B, 1 or H, M, T]``.
        dropout: probability.
        scaling: factor of the products.
        softcap: cap of the scores.
        **kwargs: what the library passes besides.

    Returns:
        ``[B, M, H, E]`` and no weights; ``None``, and nothing was done, where the kernel does not serve.
    """
    if dropout != 0.0 or torch.is_grad_enabled() or not is_plain(kwargs):
        return None
    if softcap is not None and not softcap > 0:
        return None  # an error, which the implementation raises
    if not turns(how, query, key, cos, sin) or not _is_like(value, query):
        return None
    tokens = query.shape[2]
    # Several queries without a mask are first tokens, of which each sees those before it.
    if tokens > MOST_QUERIES or (tokens > 1 and mask is None):
        return None
    layer = _layer_of(cache, place)
    if layer is None:
        return None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    settings = (mask, scale, softcap or 0.0, False, 0, how.interleaved)
    kind = type(layer)
    if kind is StaticLayer:
        if not _is_static_room(layer, key, value, mask):
            return None
        count = layer.cumulative_length
        out = attention_step(query, key, value, cos, sin, layer.keys, layer.values, count, *settings)
        count.add_(tokens)
        return out, None
    if not _is_growing_room(layer, key, value, mask):
        return None
    keys, values = layer.extend(tokens)
    return attention_step(query, key, value, cos, sin, keys, values, None, *settings), None


setattr(attention_forward, STEP, step)


def _is_like(value: torch.Tensor, query: torch.Tensor) -> bool:
    """Whether the values are a tensor like the queries, which were looked at."""
    plain = torch.compiler.is_compiling() or type(value) is torch.Tensor
    return plain and value.is_cpu and value.dtype == query.dtype and value.layout == torch.strided


def _layer_of(cache: Any, place: int) -> Any:
    """A cache's layer that holds something, if both are the library's or ours; else ``None``."""
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading or "update" in vars(cache):
        return None
    if place >= len(cache.layers):
        return None
    layer = cache.layers[place]
    if type(layer) not in (GrowingLayer, GrowingSlidingWindowLayer, StaticLayer):
        return None
    return layer if layer.is_initialized and "update" not in vars(layer) else None


def _is_growing_room(layer: Any, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the next rows of a buffer are free for these, which then see all of it."""
    if torch.compiler.is_compiling() or getattr(layer, "record_past", False):
        return False
    return layer.has_room(key, value) and allows_mask(mask, layer.keys.shape[2] + key.shape[2])


def _is_static_room(layer: Any, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a cache of fixed size takes these, and the mask hides what is not written yet."""
    if mask is None or not allows_mask(mask, layer.keys.shape[2]):
        return False
    for kept, new in ((layer.keys, key), (layer.values, value)):
        batch, heads, _, size = kept.shape
        if kept.dtype != new.dtype or not kept.is_cpu or new.shape != (batch, heads, key.shape[2], size):
            return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    if layer.keys.is_inference():
        return False  # an error, which the cache raises
    # What autograd may have kept of the cache is about to change.
    torch.autograd.graph.increment_version((layer.keys, layer.values))
    return True
