"""``GrowingDecoder``: tokens one after another through a cache that grows, also of rows with padding."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

__all__ = ["GrowingDecoder"]


class GrowingDecoder:
    """Feeds a causal language model token by token, without the model library's loop around it.

    Args:
        model: a causal language model of transformers, in evaluation mode, on one device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}
        self._cache: DynamicCache | None = None
        self._mask: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Begin with prompts.

        Args:
            ids: ``[rows, T]`` int64.
            mask: ``[rows, T]`` int64, 0 for padding, which is on the left; ``None`` if there is none.

        Returns:
            Logits ``[rows, vocabulary]`` of the tokens after the prompts, in the model's dtype.
        """
        self._cache = DynamicCache(config=self.model.config)
        self._mask = None if mask is None else mask.to(self.model.device)
        places = None if self._mask is None else (self._mask.cumsum(-1) - 1).clamp(min=0)
        return self._forward(ids.to(self.model.device), places)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row: ``tokens`` ``[rows]`` int64. Returns logits ``[rows, vocabulary]``.

        Raises:
            ValueError: there was no :meth:`prefill`.
        """
        if self._cache is None:
            raise ValueError("step() must follow prefill(), got no prompt yet")
        places = None
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], -1)
            places = self._mask.sum(-1, keepdim=True) - 1
        return self._forward(tokens[:, None], places)

    def _forward(self, ids: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        more: dict[str, Any] = dict(self._more)
        if places is not None:
            more["attention_mask"] = self._mask
            if "position_ids" in self._accepted:
                more["position_ids"] = places
        output: Any = self.model(ids, past_key_values=self._cache, use_cache=True, **more)
        return output.logits[:, -1]
