"""``StaticDecoder``: tokens one after another through a cache of fixed size, each step the same work.

A step of a packed model is many short kernels: on a GPU it takes as long as they take to be launched. With
all tensors at fixed addresses it can be captured once, as a CUDA graph, and replayed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from .graphs import capture

__all__ = ["STEPS", "StaticDecoder", "no_graph_reason", "uncountable"]

#: How a step runs: by Python; through ``torch.compile(mode="reduce-overhead")``; as one CUDA graph.
STEPS = ("eager", "compile", "graph")


class StaticDecoder:
    """Feeds a causal language model token by token, with keys and values in a cache of fixed size.

    The decoder serves one prompt (of ``rows`` equally long rows) at a time; :meth:`prefill` begins the next
    one. What it captured or compiled stays good for that.

    Args:
        model: a causal language model of transformers, in evaluation mode, on one device.
        max_length: tokens that the cache holds, prompt and continuation together.
        rows: batch size, without padding.
        step: one of :data:`STEPS`.

    Raises:
        ValueError: an argument is out of range, or ``step="graph"`` and the model is not on a CUDA device or
            its cache keeps account in Python (sliding windows do).
    """

    def __init__(
        self, model: PreTrainedModel, max_length: int, *, rows: int = 1, step: str = "eager"
    ) -> None:
        if step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
        for name, value in (("max_length", max_length), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if model.config.is_encoder_decoder:
            raise ValueError("model must be a decoder, got an encoder-decoder")
        self.model = model
        self.max_length = max_length
        self.rows = rows
        self.step_kind = step
        #: Tokens in the cache.
        self.length = 0
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        if step == "graph":
            reason = no_graph_reason(model) or uncountable(model, self._cache)
            if reason is not None:
                raise ValueError(f"step='graph' cannot run: {reason}")
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._tokens = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self._logits: torch.Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._compiled: Callable[..., torch.Tensor] | None = None
        if step == "compile":
            self._compiled = torch.compile(self._forward, mode="reduce-overhead", dynamic=False)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Begin with a prompt.

        Args:
            ids: ``[rows, T]`` int64, ``1 <= T <= max_length``.

        Returns:
            Logits ``[rows, vocabulary]`` of the token after the prompt, in the model's dtype.

        Raises:
            ValueError: ``ids`` has another shape.
        """
        if ids.dim() != 2 or ids.shape[0] != self.rows or not 1 <= ids.shape[1] <= self.max_length:
            raise ValueError(
                f"ids must be [{self.rows}, 1 to {self.max_length}] tokens, got shape {list(ids.shape)}"
            )
        if self.length > 0:
            self._cache.reset()
        logits = self._forward(ids.to(self.model.device))
        self.length = ids.shape[1]
        return logits.clone()

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row.

        Args:
            tokens: ``[rows]`` int64.

        Returns:
            Logits ``[rows, vocabulary]`` of the next token; overwritten by the next step.

        Raises:
            ValueError: ``tokens`` has another shape, the cache is full, or there was no :meth:`prefill`.
        """
        if tokens.shape != (self.rows,):
            raise ValueError(f"tokens must have shape [{self.rows}], got {list(tokens.shape)}")
        if self.length == 0:
            raise ValueError("step() must follow prefill(), got no prompt yet")
        if self.length >= self.max_length:
            raise ValueError(f"max_length={self.max_length} tokens are in the cache: it is full")
        self._tokens.copy_(tokens[:, None])
        if self._compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()
            self._logits = self._compiled(self._tokens)
        elif self.step_kind == "graph":
            if self._replay is None:
                self._replay = self._captured()
            self._replay()
        else:
            self._logits = self._forward(self._tokens)
        self.length += 1
        assert self._logits is not None
        return self._logits

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        more = {"logits_to_keep": 1} if self._keeps_last else {}
        output: Any = self.model(ids, past_key_values=self._cache, use_cache=True, **more)
        return output.logits[:, -1]

    def _captured(self) -> Callable[[], None]:
        """A step from ``_tokens`` to ``_logits`` and the cache, to be replayed."""
        self._logits = self._forward(self._tokens)  # its shape, and whatever is made at first use
        layers: Any = self._cache.layers  # all of one kind: uncountable
        counts = [layer.cumulative_length for layer in layers]
        before = [count - 1 for count in counts]

        def restore() -> None:
            # Steps that do not count; what they left in the cache, the next one overwrites.
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)

        def run() -> None:
            self._logits.copy_(self._forward(self._tokens))  # type: ignore[union-attr]

        restore()
        return capture(run, restore)


def no_graph_reason(model: PreTrainedModel) -> str | None:
    """Why steps cannot be captured where the model is, or ``None``."""
    if model.device.type == "cuda":
        return None
    return f"it needs a model on a CUDA device, got one on {model.device}"


def uncountable(model: PreTrainedModel, cache: StaticCache) -> str | None:
    """Why steps with a cache cannot be captured, ``None`` if they can: its account may be kept in Python."""
    for index, layer in enumerate(cache.layers):
        counts = [value for name, value in vars(layer).items() if name.startswith("cumulative_length")]
        if not counts or not all(isinstance(value, torch.Tensor) for value in counts):
            return (
                f"it needs a cache that counts its tokens on the device, and layer {index} of "
                f"{type(model).__name__} has a {type(layer).__name__}, which does not: use step='compile'"
            )
    return None
