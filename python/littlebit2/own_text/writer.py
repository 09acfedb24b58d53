"""Batches of texts drawn from a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from littlebit2.train.data import surroundings

from .chats import ChatForm

__all__ = ["Writer"]

#: Of a chat's tokens, those that a question has at most.
_QUESTION = 1 / 4


class Writer:
    """Draws texts from a model, a batch at a time.

    A free text begins with a token that is a word, drawn from the vocabulary: by itself a model begins most
    texts in the same few ways (LLM-QAT, arXiv 2305.17888, begins so too). In a chat the model writes the
    question as well, after what its template puts before one (Magpie, arXiv 2406.08464).

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        form: of chats; ``None``: free texts alone.
        length: tokens of a text at most.
        temperature: sampling temperature.
        top_k: likeliest tokens that are drawn from; 0: all.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        form: ChatForm | None,
        *,
        length: int,
        temperature: float,
        top_k: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.form = form
        self.length = length
        ends = model.generation_config.eos_token_id
        self._ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._special = {*tokenizer.all_special_ids, *self._ends}
        self._before, _ = surroundings(tokenizer)
        self._words = _words(tokenizer, model.get_input_embeddings().weight.shape[0])
        self._drawn = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": 1.0,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": min(self._special, default=0),
        }

    def free(self, count: int) -> list[tuple[str, int]]:
        """Return texts and their numbers of tokens."""
        chosen = torch.randint(len(self._words), (count,)).tolist()
        starts = [[*self._before, self._words[index]] for index in chosen]
        drawn = self._continued(starts, self.length - len(starts[0]))
        rows = [[start[-1], *self._until_special(row)[0]] for start, row in zip(starts, drawn, strict=True)]
        return [(self._decoded(row), len(row)) for row in rows]

    def chats(self, count: int) -> list[tuple[str, int]]:
        """Return chats of a question and an answer, and their numbers of tokens.

        Those whose question is empty are left out.
        """
        form = self.form
        assert form is not None  # as the caller knows
        drawn = self._continued(self._encoded([form.before] * count), max(int(self.length * _QUESTION), 1))
        questions = [form.question(self._decoded(self._until_special(row)[0])) for row in drawn]
        asked = {question: form.asked(question) for question in questions if question}
        starts = self._encoded(list(asked.values()))
        if not starts:
            return []
        drawn = self._continued(starts, max(self.length - max(map(len, starts)), 1))
        found = []
        for (question, start), row in zip(asked.items(), drawn, strict=True):
            kept, ended = self._until_special(row)
            answer = self._decoded(kept)
            text = form.answered(question, answer.strip()) if ended else start + answer
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            # What reads the text puts this before it again.
            found.append((text.removeprefix(self._decoded(self._before)), len(ids)))
        return found

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        before = self._before
        rows = [list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return [row if row[: len(before)] == before else [*before, *row] for row in rows]

    def _decoded(self, row: Sequence[int]) -> str:
        return str(self.tokenizer.decode(row, skip_special_tokens=False))

    def _until_special(self, row: Sequence[int]) -> tuple[list[int], bool]:
        """Return the tokens before the first special one, and whether there is one."""
        for at, token in enumerate(row):
            if token in self._special:
                return list(row[:at]), True
        return list(row), False

    def _continued(self, rows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Draw up to ``most`` tokens after each row."""
        longest = max(map(len, rows))
        pad = self._drawn["pad_token_id"]
        device = self.model.device
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, **self._drawn)
        return [list(row) for row in out[:, longest:].tolist()]


def _words(tokenizer: Any, size: int) -> list[int]:
    """Return the tokens that are words of their own, capitalized where the script has capitals."""
    special = set(tokenizer.all_special_ids)
    candidates = [token for token in range(min(len(tokenizer), size)) if token not in special]
    texts = tokenizer.batch_decode([[token] for token in candidates])
    words = [
        token
        for token, text in zip(candidates, texts, strict=True)
        if text.isalpha() and text[0] == text[0].upper()
    ]
    return words or candidates
