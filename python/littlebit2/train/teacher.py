"""Teachers: a dense model beside the student, or its likeliest tokens from a file.

A stored teacher gives the KL of its k likeliest tokens and no hidden states; it takes ``6 k`` bytes for each
token of training data, and the memory of the dense model is free while training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from littlebit2.disk import explain_errors, reserve, sync, write_json

from .data import TokenBlocks
from .losses import TopK, distillation_kl, hidden_mse, top_k, top_k_kl

__all__ = ["LiveTeacher", "StoredTeacher", "Teacher", "check_logits", "store_teacher"]


class Teacher(Protocol):
    """What the loss asks of a teacher."""

    #: Whether there are hidden states to compare with.
    has_hidden: bool

    def losses(
        self, batch: Mapping[str, torch.Tensor], logits: torch.Tensor, hidden: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the KL, and the hidden-state loss where ``hidden`` is not ``None``.

        Args:
            batch: ``input_ids`` ``[B, T]`` and ``block`` ``[B]``.
            logits: the student's logits ``[B, T, vocabulary]``.
            hidden: its hidden states, embeddings first, or ``None``.
        """
        ...


class LiveTeacher:
    """A dense model that runs beside the student, in evaluation mode and without gradients.

    Hidden states are compared from the first layer's output on; transformers gives the last one after the
    final norm.
    """

    has_hidden = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def losses(
        self, batch: Mapping[str, torch.Tensor], logits: torch.Tensor, hidden: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`Teacher`."""
        with torch.no_grad():
            out = self.model(
                input_ids=batch["input_ids"], output_hidden_states=hidden is not None, use_cache=False
            )
        kl = distillation_kl(logits, out.logits.detach())
        return kl, None if hidden is None else hidden_mse(hidden[1:], out.hidden_states[1:])


class StoredTeacher:
    """The likeliest tokens of every block, from a directory that :func:`store_teacher` wrote.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: it is not there, or not finished.
    """

    has_hidden = False

    def __init__(self, path: Path) -> None:
        description = path / "teacher.json"
        if not description.is_file():
            raise FileNotFoundError(f"path must hold a finished teacher, got {path}, without teacher.json")
        self.description: dict[str, Any] = json.loads(description.read_text("utf-8"))
        self._values = np.load(path / "log_probabilities.npy", mmap_mode="r")
        self._tokens = np.load(path / "tokens.npy", mmap_mode="r")

    def losses(
        self, batch: Mapping[str, torch.Tensor], logits: torch.Tensor, hidden: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`Teacher`; ``hidden`` must be ``None``."""
        if hidden is not None:
            raise ValueError("hidden must be None with a stored teacher, which has no hidden states")
        rows = batch["block"].cpu().numpy() - self.description["first_block"]
        if rows.min() < 0 or rows.max() >= len(self._values):
            raise ValueError(
                f"block must be one of the {len(self._values)} stored ones, got number {int(rows.max())}"
            )
        values = torch.from_numpy(self._values[rows]).to(logits.device).float()
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64)).to(logits.device)
        return top_k_kl(logits, TopK(values, tokens)), None


def store_teacher(
    model: nn.Module,
    blocks: TokenBlocks,
    path: Path,
    *,
    k: int,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> StoredTeacher:
    """Run a teacher once over ``blocks`` and keep its ``k`` likeliest tokens at every position.

    Args:
        model: the teacher; put in evaluation mode.
        blocks: training data.
        path: directory to make; a finished one of the same blocks and ``k`` is used as it is.
        k: tokens a position.
        batch_size: blocks at a time.
        progress: called with the blocks that are done and all.

    Raises:
        OSError: it cannot be written, or the disk is too full for it; the message has path and sizes.
        ValueError: ``k`` or ``batch_size`` is out of range, or ``path`` holds a teacher of other blocks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    description = {
        "k": k,
        "length": blocks.length,
        "first_block": blocks.start,
        "blocks": len(blocks),
    }
    if (path / "teacher.json").is_file():
        stored = StoredTeacher(path)
        if stored.description != description:
            raise ValueError(f"{path} must hold the teacher of {description}, got {stored.description}")
        return stored
    path.mkdir(parents=True, exist_ok=True)
    model.eval()
    shape = (len(blocks), blocks.length, k)
    with explain_errors(path):
        values = np.lib.format.open_memmap(path / "log_probabilities.npy", "w+", np.float16, shape)
        tokens = np.lib.format.open_memmap(path / "tokens.npy", "w+", np.uint32, shape)
    for name in ("log_probabilities.npy", "tokens.npy"):
        reserve(path / name, (path / name).stat().st_size)
    device = next(model.parameters()).device
    for start in range(0, len(blocks), batch_size):
        stop = min(start + batch_size, len(blocks))
        ids = torch.stack([blocks[i]["input_ids"] for i in range(start, stop)]).to(device)
        with torch.no_grad():
            likeliest = top_k(model(input_ids=ids, use_cache=False).logits, k)
        values[start:stop] = likeliest.log_probabilities.cpu().numpy()
        tokens[start:stop] = likeliest.tokens.cpu().numpy()
        if progress is not None:
            progress(stop, len(blocks))
    values.flush()
    tokens.flush()
    for name in ("log_probabilities.npy", "tokens.npy"):
        sync(path / name)
    write_json(path / "teacher.json", description)
    return StoredTeacher(path)


def check_logits(model: Any, what: str) -> None:
    """Raise ``ValueError`` unless ``model`` (named ``what`` in the message) has an output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"{what} must give logits (a causal language model), got {type(model).__name__}")
