"""What a checkpoint is worth on held-out text, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Judgment", "answers", "judge"]

#: Continued by every checkpoint.
PROMPTS = ("The capital of France is", "The sea is", "A function in Python is")
#: What a user says to it, where the tokenizer has a chat template.
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
_LENGTH = 256
_ANSWER = 48


@dataclass(frozen=True)
class Judgment:
    """What was measured of a checkpoint.

    Attributes:
        perplexity: on the text.
        kl: KL(dense || checkpoint), nats a token.
        top1: share of tokens for which both have the same likeliest one.
        answers: greedy continuations by prompt.
    """

    perplexity: float
    kl: float
    top1: float
    answers: dict[str, str] = field(default_factory=dict)


def judge(checkpoint: Path, dense: Path, data: Path, tokens: int) -> Judgment:
    """Measure a checkpoint on held-out text, in float32.

    Args:
        checkpoint: its directory.
        dense: directory of the dense model that it is compared with.
        data: directory of text.
        tokens: to read.
    """
    from littlebit2.train.recipe import evaluate_model

    found = evaluate_model(
        checkpoint, data, teacher=dense, block=_LENGTH, max_tokens=tokens, dtype=torch.float32
    )
    assert found.perplexity is not None  # there is text
    assert found.agreement is not None  # and a teacher
    return Judgment(found.perplexity.value, found.agreement.kl, found.agreement.top1, answers(checkpoint))


def answers(checkpoint: Path) -> dict[str, str]:
    """Return the greedy continuation of each prompt, and the answer to each question."""
    from transformers import AutoTokenizer

    from littlebit2 import load

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = load(checkpoint, dtype=torch.float32)
    texts = {prompt: prompt for prompt in PROMPTS}
    if getattr(tokenizer, "chat_template", None):
        for question in QUESTIONS:
            said = [{"role": "user", "content": question}]
            texts[question] = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    found = {}
    for prompt, text in texts.items():
        # A template writes what opens a text by itself.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=text == prompt)
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=_ANSWER, do_sample=False)
        found[prompt] = tokenizer.decode(
            out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
    return found
