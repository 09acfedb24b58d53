"""When tokens come, and their text as it becomes final."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer, TextStreamer

__all__ = ["Clock"]


class Clock(BaseStreamer):
    """Takes the time of every token and passes text on.

    Args:
        stream: called with each piece of text, ``None`` for no text.
        tokenizer: makes text of tokens; without one they are passed on in decimal, with a space after each.
    """

    def __init__(self, stream: Callable[[str], object] | None, tokenizer: Any) -> None:
        #: Times of the first and the last new token.
        self.first = self.last = 0.0
        self._prompt_seen = False
        self._stream = stream
        self._text = _TextStream(tokenizer, stream) if stream is not None and tokenizer is not None else None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, or a new token."""
        if not self._prompt_seen:  # generate() begins with the prompt
            self._prompt_seen = True
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self._text is not None:
            self._text.put(value)
        elif self._stream is not None:
            self._stream("".join(f"{token} " for token in value.flatten().tolist()))

    def end(self) -> None:
        """Pass on what text is left."""
        if self._text is not None:
            self._text.end()


class _TextStream(TextStreamer):
    """The library's rules of when text is final, without its printing."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._sink = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._sink(text)
