"""A cache of keys and values that grows without copying all of them at each step.

The library's ``DynamicCache`` concatenates: a step copies the whole cache. The layers here write into a
buffer with room to spare, and their ``keys`` and ``values`` are views of it. Everything else is the
library's: what its methods, or anyone else, put in the place of these views is taken over by the next step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .attention import register

__all__ = ["GrowingLayer", "GrowingSlidingWindowLayer", "grow", "grow_caches_of"]

# A model that was pickled has a hook of this module, and the name of the attention in its configuration.
register()

#: Room of a new buffer is a multiple of this many tokens.
_BLOCK = 64
#: Marks caches that :func:`grow_caches_of` has seen.
_GROWS = "_littlebit2_grows"


class _Buffer:
    """Keys and values ``[B, H, room, D]``, of which a range of rows is in use."""

    def __init__(self) -> None:
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None
        self._start = 0
        #: Rows that were ever written. They are not written again: someone may still look at them.
        self._written = 0

    def owns(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are the views that were kept last."""
        return self._views is not None and self._views[0] is keys and self._views[1] is values

    def keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep views of the buffer: rows of what :meth:`extend` returned or of what was kept before."""
        assert self._buffers is not None
        buffer = self._buffers[0]
        self._start = (keys.storage_offset() - buffer.storage_offset()) // buffer.stride(2)
        self._views = keys, values

    def has_room(
        self, kept: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]
    ) -> bool:
        """Whether rows like ``new`` can follow the rows ``kept`` where these are."""
        if self._buffers is None or not self.owns(*kept):
            return False
        keys, values = self._buffers
        batch, heads, room, size = keys.shape
        tokens = new[0].shape[2]
        if self._start + kept[0].shape[2] != self._written or self._written + tokens > room:
            return False
        if new[0].shape != (batch, heads, tokens, size) or new[0].dtype != keys.dtype:
            return False
        if new[1].shape != (batch, heads, tokens, values.shape[3]) or new[1].dtype != values.dtype:
            return False
        # Such a tensor cannot be written to outside the mode that it was made in.
        return torch.is_inference_mode_enabled() or not keys.is_inference()

    def make_room(
        self, kept: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Copy the rows ``kept`` to a buffer with room for rows like ``new`` and more."""
        old, more = kept[0].shape[2] if kept[0].dim() == 4 else 0, new[0].shape[2]
        room = (old + more + max(old + more, 2 * _BLOCK) // 2 + _BLOCK - 1) // _BLOCK * _BLOCK
        keys, values = (one.new_empty((*one.shape[:2], room, one.shape[3])) for one in new)
        self._buffers, self._start = (keys, values), 0
        self._written = old
        for buffer, rows in zip(self._buffers, kept, strict=True):
            if old:
                buffer[:, :, :old] = rows

    def extend(self, more: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep, and return, views of the rows that are in use and of ``more`` to be written after them."""
        assert self._buffers is not None
        self._written += more
        keys, values = self._buffers
        rows = self._written - self._start
        self._views = keys.narrow(2, self._start, rows), values.narrow(2, self._start, rows)
        return self._views


def _can_append(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether to write into a buffer; else the library's concatenation does what is right, or its error."""
    # What attention saves for a backward pass must not change.
    if keys.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    for new, kept in ((keys, layer.keys), (values, layer.values)):
        if new.dim() != 4 or new.requires_grad or not isinstance(kept, torch.Tensor) or kept.requires_grad:
            return False
        if new.dtype != kept.dtype or new.device != kept.device:
            return False
        if kept.numel() and (kept.shape[:2] != new.shape[:2] or kept.shape[3] != new.shape[3]):
            return False
    return keys.shape[2] == values.shape[2]


class _Growing:
    """What both kinds of layers do with their buffer; comes before the class of the library."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffer = _Buffer()

    def __copy__(self) -> Any:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied._buffer = _Buffer()
        return copied

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[B, H, M, D]``; return those that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        new = key_states, value_states
        if not _can_append(self, *new):
            return super().update(*new, *args, **kwargs)  # type: ignore[misc]
        if not self.has_room(*new):
            self._buffer.make_room((self.keys, self.values), new)
        more = key_states.shape[2]
        visible = self.extend(more)
        for rows, one in zip(visible, new, strict=True):
            rows.narrow(2, rows.shape[2] - more, more).copy_(one)
        return visible

    def has_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether such keys and values can follow what the cache holds where that is."""
        return self._buffer.has_room((self.keys, self.values), (key_states, value_states))

    def extend(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make tokens a part of the cache, for which there must be room.

        Returns:
            Keys and values that they may see; the last ``tokens`` rows are theirs, and to be written.
        """
        self.keys, self.values = self._buffer.extend(tokens)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end."""
        owned = self.is_initialized and self._buffer.owns(self.keys, self.values)
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if owned:
            self._buffer.keep(self.keys, self.values)

    def reset(self) -> None:
        """Drop everything."""
        super().reset()  # type: ignore[misc]
        self._buffer = _Buffer()


class GrowingLayer(_Growing, DynamicLayer):
    """The library's ``DynamicLayer`` with a buffer that has room to spare."""


class GrowingSlidingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """The library's ``DynamicSlidingWindowLayer`` with a buffer that has room to spare."""

    def extend(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`GrowingLayer`; what no later token may see is dropped."""
        keys, values = super().extend(tokens)
        self.cumulative_length += tokens
        seen = self.sliding_window - 1
        if self.record_past:  # until the next crop
            return keys[:, :, -(seen + tokens) :], values[:, :, -(seen + tokens) :]
        if keys.shape[2] > seen:
            self.keys, self.values = keys[:, :, -seen:], values[:, :, -seen:]
            self._buffer.keep(self.keys, self.values)
        return keys, values


def grow(cache: DynamicCache) -> None:
    """Let the layers of a cache grow in buffers, in place. Layers of other kinds stay as they are."""
    if cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        new: DynamicLayer
        if type(layer) is DynamicLayer:
            new = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            new = GrowingSlidingWindowLayer(layer.sliding_window)
        else:
            continue
        vars(new).update(vars(layer))
        cache.layers[index] = new


def grow_caches_of(model: nn.Module) -> None:
    """Let every ``DynamicCache`` that is given to the model grow in buffers: the one of ``generate`` too."""
    model.register_forward_pre_hook(_grow_given, with_kwargs=True)


def _grow_given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if type(cache) is EncoderDecoderCache:
        cache = cache.self_attention_cache
    if type(cache) is DynamicCache and not hasattr(cache, _GROWS):
        grow(cache)
        setattr(cache, _GROWS, True)
