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
        """Keep views of the buffer: rows of what :meth:`append` returned or of what was kept before."""
        assert self._buffers is not None
        buffer = self._buffers[0]
        self._start = (keys.storage_offset() - buffer.storage_offset()) // buffer.stride(2)
        self._views = keys, values

    def append(
        self, kept: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of the rows ``kept`` and ``new`` one after the other."""
        old, more = kept[0].shape[2] if kept[0].dim() == 4 else 0, new[0].shape[2]
        if not self._has_room(kept, old, more):
            room = (old + more + max(old + more, 2 * _BLOCK) // 2 + _BLOCK - 1) // _BLOCK * _BLOCK
            keys, values = (one.new_empty((*one.shape[:2], room, one.shape[3])) for one in new)
            self._buffers, self._start = (keys, values), 0
            self._written = old
            for buffer, rows in zip(self._buffers, kept, strict=True):
                if old:
                    buffer[:, :, :old] = rows
        assert self._buffers is not None
        end = self._start + old
        for buffer, rows in zip(self._buffers, new, strict=True):
            buffer.narrow(2, end, more).copy_(rows)
        self._written = end + more
        keys, values = (buffer.narrow(2, self._start, old + more) for buffer in self._buffers)
        return keys, values

    def _has_room(self, kept: tuple[torch.Tensor, torch.Tensor], old: int, more: int) -> bool:
        if self._buffers is None or not self.owns(*kept) or self._start + old != self._written:
            return False
        if self._written + more > self._buffers[0].shape[2]:
            return False
        # Such a tensor cannot be written to outside the mode that it was made in.
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()


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

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values
        self._buffer.keep(keys, values)

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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[B, H, M, D]``; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not _can_append(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self._keep(*self._buffer.append((self.keys, self.values), (key_states, value_states)))
        return self.keys, self.values


class GrowingSlidingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """The library's ``DynamicSlidingWindowLayer`` with a buffer that has room to spare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[B, H, M, D]``; return those that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not _can_append(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._buffer.append((self.keys, self.values), (key_states, value_states))
        self.cumulative_length += key_states.shape[-2]
        if self.record_past:  # until the next crop
            self._keep(keys, values)
            visible = self.sliding_window - 1 + key_states.shape[-2]
            return keys[:, :, -visible:], values[:, :, -visible:]
        self._keep(keys[:, :, -self.sliding_window + 1 :], values[:, :, -self.sliding_window + 1 :])
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
