"""Prompts as token ids: text, messages of a conversation, or ids as they are; and several as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

__all__ = ["Prompt", "as_messages", "check_prompt", "encode", "pad_left", "tokenizer_of"]

#: Text, token ids, or messages with ``role`` and ``content``.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | torch.Tensor

#: Any of these makes a directory one with a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def tokenizer_of(directory: Path) -> Any:
    """Return the tokenizer of a checkpoint, ``None`` if there is none."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def as_messages(prompt: Prompt, system: str | None) -> Sequence[Mapping[str, Any]]:
    """Return a conversation: text is what the user says.

    Raises:
        ValueError: the prompt is token ids, or has a message of the system already.
    """
    if isinstance(prompt, str):
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": prompt}]
    elif _is_conversation(prompt):
        messages = list(prompt)  # type: ignore[arg-type]
    else:
        raise ValueError("prompt must be text or messages for chat, got token ids")
    if system is None:
        return messages
    if any(isinstance(message, Mapping) and message.get("role") == "system" for message in messages):
        raise ValueError("system must not be given with messages that have one of the system")
    return [{"role": "system", "content": system}, *messages]


def check_prompt(prompt: Prompt, tokenizer: Any, directory: Path) -> None:
    """Refuse a prompt that cannot be encoded, before a model is loaded for it.

    Raises:
        ValueError: it is text or messages and there is no tokenizer, or one without a chat template; or it is
            empty.
    """
    said = isinstance(prompt, str) or _is_conversation(prompt)
    if said and tokenizer is None:
        kind = "text" if isinstance(prompt, str) else "messages"
        raise ValueError(f"prompt must be token ids, for {directory} has no tokenizer; got {kind}")
    if not isinstance(prompt, str) and not len(prompt):
        raise ValueError("prompt must hold at least one token id, got none")
    if _is_conversation(prompt):
        for index, message in enumerate(prompt):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ValueError(f"message {index} of prompt must have role and content, got {message!r}")
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"prompt must be text or token ids, for the tokenizer of {directory} has no chat template; "
                "got messages"
            )


def encode(prompt: Prompt, tokenizer: Any, model: PreTrainedModel) -> torch.Tensor:
    """Return a prompt as int64 ``[T]``.

    Raises:
        ValueError: the model does not generate or has no such tokens, the prompt holds none, or the chat
            template refuses it.
    """
    if not model.can_generate():
        raise ValueError(f"model must be one that generates, got {type(model).__name__}")
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif _is_conversation(prompt):
        ids = _rendered(prompt, tokenizer)
    else:
        ids = prompt
    given = torch.as_tensor(ids)
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise ValueError(f"prompt must hold integers as token ids, got {given.dtype}")
    if given.dim() > 2 or (given.dim() == 2 and given.shape[0] != 1):
        raise ValueError(f"prompt must be one row of token ids, got shape {list(given.shape)}")
    row = given.to(torch.int64).flatten()
    if row.numel() == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}, which holds none")
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    if not bool(((row >= 0) & (row < size)).all()):
        raise ValueError(f"prompt must hold token ids from 0 to {size - 1}, got {row.tolist()}")
    return row


def pad_left(rows: Sequence[torch.Tensor], token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of any lengths as ``[rows, T]`` that end together, and 1 for what is theirs, else 0."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), token, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def _is_conversation(prompt: Prompt) -> bool:
    return not isinstance(prompt, (str, torch.Tensor)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _rendered(messages: Any, tokenizer: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except Exception as error:  # whatever a template of a checkpoint raises
        raise ValueError(f"prompt cannot be told by the chat template: {error}") from error
