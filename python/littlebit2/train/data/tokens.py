"""A file of token ids: written once from a stream of texts, read by memory map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from littlebit2.disk import new_file, write_json

__all__ = ["TokenFile", "surroundings", "write_tokens"]

#: Texts that are tokenized at a time: a fast tokenizer spreads them over threads.
_BATCH = 256
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk.

    Attributes:
        path: unsigned 16- or 32-bit integers, little-endian; beside it ``<path>.json``, written last.
        tokens: how many.
        dtype: ``"uint16"`` or ``"uint32"``.
        documents: that were read.
        characters: that were read.
    """

    path: Path
    tokens: int
    dtype: str
    documents: int
    characters: int

    @classmethod
    def open(cls, path: Path) -> TokenFile | None:
        """Return a finished file, or ``None`` where there is none.

        Raises:
            ValueError: it is damaged.
        """
        description = _description(path)
        if not description.is_file():
            return None
        entry = json.loads(description.read_text("utf-8"))
        found = cls(path=path, **entry)
        expected = found.tokens * np.dtype(found.dtype).itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise ValueError(f"{path} must have {expected} bytes, got {size}: remove it to make it again")
        return found

    def array(self) -> npt.NDArray[Any]:
        """Return the ids, memory-mapped."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")


def write_tokens(
    path: Path, texts: Iterable[tuple[str, bool]], tokenizer: Any, *, max_tokens: int | None = None
) -> TokenFile:
    """Tokenize a stream of texts into a file that appears whole or not at all.

    Documents follow one another. Each is opened and closed by what the tokenizer puts around a text by
    itself; if that is nothing, it is closed by the end-of-text token, where there is one.

    Args:
        path: file to write.
        texts: pieces of documents, and whether the document ends there.
        tokenizer: a tokenizer of transformers.
        max_tokens: stop after so many.

    Raises:
        ValueError: there are no tokens, ``max_tokens`` is not positive, or the vocabulary has more than
            ``2**32`` entries.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be positive, got {max_tokens}")
    before, after = surroundings(tokenizer)
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    tokens = documents = characters = 0
    opened = False
    with new_file(path) as out:
        for batch in _batches(texts):
            ids = tokenizer([text for text, _ in batch], add_special_tokens=False)["input_ids"]
            for (text, ends), row in zip(batch, ids, strict=True):
                whole = [*([] if opened else before), *row, *(after if ends else [])]
                if max_tokens is not None:
                    whole = whole[: max_tokens - tokens]
                out.write(np.asarray(whole, np.dtype(dtype).newbyteorder("<")).tobytes())
                tokens += len(whole)
                characters += len(text)
                documents += ends
                opened = not ends
            if max_tokens is not None and tokens >= max_tokens:
                break
        if not characters:
            raise ValueError("data must hold text, got none")
    found = TokenFile(path, tokens, dtype, documents, characters)
    entry = {key: value for key, value in asdict(found).items() if key != "path"}
    write_json(_description(path), entry)
    return found


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _batches(texts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text, ends in texts:
        batch.append((text, ends))
        characters += len(text)
        if len(batch) >= _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that go before and after a document."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            before, after = whole[:start], whole[start + len(plain) :]
            break
    else:
        before, after = [], []
    if not before and not after and tokenizer.eos_token_id is not None:
        after = [int(tokenizer.eos_token_id)]
    return before, after
