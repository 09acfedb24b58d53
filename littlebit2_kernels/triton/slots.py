"""Paths of a layer as kernel arguments: up to four of each kind, one launch for all.

Triton passes no lists, so a kernel has four *slots* for each operand. What a slot holds is a :class:`Term`:
one sign matrix with its scales. Layers of more paths, of which none is known, take a launch for each four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..format import words_per_row
from .plan import SLOTS

__all__ = ["Term", "pick", "slot_arguments", "unspecialized"]


@dataclass(frozen=True)
class Term:
    """One sign matrix of a stage.

    Attributes:
        words: int32 ``[rows, ceil(cols/32)]``, rows of any pitch.
        cols: signs of a row.
        scale: float32 ``[cols]``, what the activations are multiplied by.
        row_scale: float32 ``[rows]``, what sums are multiplied by; ``None`` in a first stage.
        result: where in the latents the result of a first stage begins, a multiple of 16.
        source: where in the latents the operand of a second stage begins; 0 where the operand is x.
        stage: number of the first stage whose result is the operand of this term, in a second stage.
    """

    words: torch.Tensor
    cols: int
    scale: torch.Tensor
    row_scale: torch.Tensor | None
    result: int = 0
    source: int = 0
    stage: int = 0

    @property
    def rows(self) -> int:
        """Rows of the sign matrix; a plain number, also where sizes are traced as symbols."""
        return int(self.words.shape[0])

    @property
    def pitch(self) -> int:
        """Words from row to row."""
        return int(self.words.stride(0))

    @property
    def unit(self) -> int:
        """Words that one mask and one load may cover: 4 where a row's pitch and length allow."""
        return 4 if self.pitch % 4 == 0 and words_per_row(self.cols) % 4 == 0 else 1


def slot_arguments(terms: Sequence[Term], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Kernel arguments ``words0, words1, ...`` of at most :data:`SLOTS` terms; unused slots repeat the first.

    Args:
        terms: one for each path of the launch.
        names: of ``words``, ``pitch``, ``units`` (words of a row), ``rows``, ``cols``, ``scale``,
            ``row_scale``, ``result``, ``source`` and ``stage``, those that the kernel has. ``pitch`` and
            ``units`` count units of the terms' common ``UNIT``; ``eighths`` and ``source_eighths`` are
            ``cols`` and ``source`` in units of their common ``COL_UNIT``: so kernels know what sizes are
            multiples of, without being compiled anew for others. ``PATHS``, and the units needed, are among
            the results.
        prefix: of all their names, in a kernel that takes two stages.
    """
    unit = min(term.unit for term in terms)
    arguments: dict[str, Any] = {f"{prefix}PATHS": len(terms)}
    if "words" in names:
        arguments[f"{prefix}UNIT"] = unit
    col_unit = 8 if all(term.cols % 8 == 0 and term.source % 8 == 0 for term in terms) else 1
    if "eighths" in names:
        arguments[f"{prefix}COL_UNIT"] = col_unit
    for i in range(SLOTS):
        term = terms[i] if i < len(terms) else terms[0]
        values = {
            "words": term.words,
            "pitch": term.pitch // unit,
            "units": words_per_row(term.cols) // unit,
            "rows": term.rows,
            "cols": term.cols,
            "scale": term.scale,
            # Not read where there is none.
            "row_scale": term.scale if term.row_scale is None else term.row_scale,
            "result": term.result,
            "source": term.source,
            "eighths": term.cols // col_unit,
            "source_eighths": term.source // col_unit,
            "stage": term.stage,
        }
        arguments |= {f"{prefix}{name}{i}": values[name] for name in names}
    return arguments


def unspecialized(*names: str) -> list[str]:
    """Arguments that kernels are not compiled anew for: ``tokens``, and those of all slots of ``names``.

    Triton would for each combination of ones, multiples of 16 and other numbers, of which a model with ranks
    by layer has dozens, and while it decodes.
    """
    return ["tokens", *(f"{name}{i}" for name in names for i in range(SLOTS + (name == "chunk")))]


@triton.jit
def pick(path, first, second, third, fourth, PATHS: tl.constexpr):
    """The argument in slot ``path``, a number known when compiling or running."""
    picked = first
    if PATHS > 1:
        picked = tl.where(path == 1, second, picked)
    if PATHS > 2:
        picked = tl.where(path == 2, third, picked)
    if PATHS > 3:
        picked = tl.where(path == 3, fourth, picked)
    return picked
