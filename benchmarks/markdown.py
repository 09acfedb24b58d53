"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown"]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are as long as their columns, so that it reads well unrendered too."""
    # A bar would end the cell.
    table = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    widths = [max(3, *(len(line[i]) for line in table)) for i in range(len(head))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(padded)
