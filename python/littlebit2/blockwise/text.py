"""Text as sequences of tokens, for tuning and held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from littlebit2.checkpoint.side_files import check_tokenizer
from littlebit2.train.data import TokenBlocks, TokenFile, read_texts, write_tokens

__all__ = ["fitting_length", "load_tokenizer", "sequences"]

#: Times as many tokens are read as are used, so that the sequences are of many documents.
_SPREAD = 16


def fitting_length(length: int, config: Any) -> int:
    """Return ``length``, or the number of positions that a model's configuration has, where that is less."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(length, most) if isinstance(most, int) and most > 1 else length


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of a checkpoint.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is none.
    """
    check_tokenizer(model_dir)
    from transformers import AutoTokenizer  # noqa: PLC0415  # slow to import

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def sequences(
    path: Path,
    files: Sequence[Path],
    tokenizer: Any,
    *,
    length: int,
    samples: int,
    most: int | None = None,
    least: int = 0,
    held_out: int,
    seed: int,
    text_field: str = "text",
) -> torch.Tensor:
    """Return sequences of the text, int64 ``[S, T]``: those for tuning, then the held-out ones.

    Held-out sequences are the last of what is read, the others are drawn from what comes before. Fewer
    than ``samples`` are returned where the text is short.

    Args:
        path: where the tokens are kept.
        files: of text.
        tokenizer: of the model.
        length: T.
        samples: sequences for tuning.
        most: sequences for tuning that another choice may ask for; by default ``samples``.
        least: sequences that the tokens must suffice for, whatever is drawn from them.
        held_out: further sequences.
        seed: of the choice.
        text_field: name of the text in JSON lines and tables.

    Raises:
        ValueError: the text is too short for the held-out sequences and one more.
    """
    tokens = TokenFile.open(path)
    if tokens is None:
        limit = (max(_SPREAD * (most or samples), least) + _SPREAD * held_out) * length
        tokens = write_tokens(path, read_texts(files, text_field), tokenizer, max_tokens=limit)
    total = tokens.tokens // length
    if total <= held_out:
        raise ValueError(
            f"data must hold at least {held_out + 1} sequences of {length} tokens, got {tokens.tokens} tokens"
        )
    blocks = TokenBlocks(tokens, length)
    order = torch.randperm(total - held_out, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [*sorted(order[:samples]), *range(total - held_out, total)]
    return torch.stack([blocks[index]["input_ids"] for index in chosen])
