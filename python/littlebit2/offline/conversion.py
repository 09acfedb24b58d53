"""Conversion between layouts, with a head and an embedding rounded on the way."""

from __future__ import annotations

from pathlib import Path

from littlebit2.architecture.select import INT8, KEEP, check_rows
from littlebit2.architecture.tensors import Int8Tensors
from littlebit2.checkpoint import SideFiles, convert, open_checkpoint

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    head: str = KEEP,
    embedding: str = KEEP,
    overwrite: bool = False,
) -> tuple[SideFiles, tuple[str, ...]]:
    """Convert a checkpoint as :func:`littlebit2.checkpoint.convert` does.

    Args:
        source: a checkpoint of any layout that is read, with packed layers.
        out: directory to make.
        to: ``"littlebit2"`` (ours) or ``"littlebit"`` (the authors').
        head: ``"keep"``, or ``"int8"``: a dense head becomes int8 rows with a float32 scale each.
        embedding: likewise, the embedding of tokens. Either rounds both if the head is tied to it.
        overwrite: replace an existing checkpoint directory, at the end.

    Returns:
        Which of the files beside the weights were copied, and which were not and why; and remarks.

    Raises:
        ImportError: int8 rows are wanted, and transformers is not installed.
        ValueError: the head or the embedding cannot be int8; or as ``convert``.
        CheckpointError, FileExistsError: as ``convert``.
    """
    check_rows(head, embedding)
    chosen = Int8Tensors()
    if (head, embedding) != (KEEP, KEEP):
        if to != "littlebit2":
            raise ValueError(f"to must be littlebit2 for int8 rows, got {to}")
        from littlebit2.integrations.int8 import int8_tensors  # noqa: PLC0415  # needs transformers

        with open_checkpoint(source) as checkpoint:
            chosen = int8_tensors(
                checkpoint.config,
                checkpoint.dense,
                head=head == INT8,
                embedding=embedding == INT8,
                already=checkpoint.int8,
            )
    side = convert(source, out, to, int8=chosen.rounded, left_out=chosen.left_out, overwrite=overwrite)
    return side, chosen.notes
