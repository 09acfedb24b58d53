"""Binarized activations for few tokens: xor of signs with signs, and population counts.

A program takes one token and ``BLOCK_ROWS`` rows. Of a chunk of 512 columns, ``valid - 2 popcount(signs ^
x)`` is the sum of products exactly, as the int8 GEMM has it for ``activation="sign"``; chunks are scaled and
added in the same order as there (gemm.py), so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import wrap_triton
from .operand import Operand
from .plan import CHUNK_WORDS, SLOTS, XnorConfig
from .slots import Term, pick, slot_arguments, unspecialized
from .unpack import count_ones, load_words

__all__ = ["xnor", "xnor_kernel"]

_OPERANDS = ("words", "pitch", "units", "rows", "cols", "row_scale", "result")


@triton.jit
def _chunk_sums(values, words, pitch, units, row, rows, cols, chunk, UNIT: tl.constexpr, WORDS: tl.constexpr):
    """Sums ``[rows]`` over one chunk, before its scale; ``values`` points to its first word of x's signs."""
    word = tl.arange(0, WORDS)[None, :]
    place = words + row.to(tl.int64)[:, None] * (pitch * UNIT)
    signs = load_words(place, chunk * WORDS + word, units, (row < rows)[:, None], UNIT)
    differ = tl.sum(count_ones(signs ^ tl.load(values + word).to(tl.uint32, bitcast=True)), axis=1)
    # Pad bits are zero in both and do not differ.
    return (tl.minimum(cols - chunk * 32 * WORDS, 32 * WORDS) - 2 * differ).to(tl.float32)


@triton.jit(
    do_not_specialize=[*unspecialized("pitch", "units", "rows", "cols", "result", "chunk"), "most_rows"]
)
def xnor_kernel(
    values, values_row, scales, out, out_row, base, bias, tokens, most_rows,
    words0, words1, words2, words3, pitch0, pitch1, pitch2, pitch3, units0, units1, units2, units3,
    rows0, rows1, rows2, rows3, cols0, cols1, cols2, cols3, row_scale0, row_scale1, row_scale2, row_scale3,
    result0, result1, result2, result3, chunk0, chunk1, chunk2, chunk3, chunk4,
    PATHS: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr,
    LAST: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One stage; grid ``(row blocks * splits * tokens, terms of a first stage)``; results as of the GEMM."""
    tiles = tl.cdiv(most_rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = (tl.program_id(0) // tiles) % SPLITS
    token = (tl.program_id(0) // (tiles * SPLITS)).to(tl.int64)
    token_values = values + token * values_row
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    if LAST:
        inside = row < most_rows
        place = token * most_rows + row
        if HAS_BASE:
            total += tl.load(base + place, mask=inside, other=0.0)
        for path in tl.static_range(PATHS):
            first = pick(path, chunk0, chunk1, chunk2, chunk3, PATHS)
            row_scale = pick(path, row_scale0, row_scale1, row_scale2, row_scale3, PATHS)
            row_scale = tl.load(row_scale + row, mask=inside, other=0.0)
            for chunk in range(pick(path, chunk1, chunk2, chunk3, chunk4, 4) - first):
                sums = _chunk_sums(
                    token_values + (first + chunk) * WORDS,
                    pick(path, words0, words1, words2, words3, PATHS),
                    pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                    pick(path, units0, units1, units2, units3, PATHS),
                    row, most_rows, pick(path, cols0, cols1, cols2, cols3, PATHS), chunk, UNIT, WORDS,
                )  # fmt: skip
                total = tl.fma(sums, row_scale * tl.load(scales + (first + chunk) * tokens + token), total)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=inside, other=0.0)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    else:
        path = tl.program_id(1)
        rows = pick(path, rows0, rows1, rows2, rows3, PATHS)
        first = pick(path, chunk0, chunk1, chunk2, chunk3, PATHS)
        place = token * out_row + pick(path, result0, result1, result2, result3, PATHS) + row
        for chunk in range(chunk1 * split // SPLITS, chunk1 * (split + 1) // SPLITS):  # all have x's columns
            sums = _chunk_sums(
                token_values + (first + chunk) * WORDS, pick(path, words0, words1, words2, words3, PATHS),
                pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                units0, row, rows, cols0, chunk, UNIT, WORDS,
            )  # fmt: skip
            if SPLITS > 1:
                tl.store(out + tl.cast(chunk, tl.int64) * tokens * out_row + place, sums, mask=row < rows)
            else:
                scale = tl.load(scales + (first + chunk) * tokens + token)
                total = tl.fma(sums, tl.broadcast_to(scale, total.shape), total)
        if SPLITS == 1:
            tl.store(out + place, total, mask=row < rows)


def xnor(
    operand: Operand,
    terms: Sequence[Term],
    out: torch.Tensor,
    config: XnorConfig,
    *,
    last: bool,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Launch one stage; arguments as of :func:`~littlebit2_kernels.triton.gemm.gemm`."""
    tokens = operand.values.shape[0]
    most_rows = max(term.rows for term in terms)
    blocks = triton.cdiv(most_rows, config.block_rows) * config.splits
    wrap_triton(xnor_kernel)[(blocks * tokens, 1 if last else len(terms))](
        operand.values, operand.values.stride(0), operand.scales, out, out.stride(-2),
        out if base is None else base, out if bias is None else bias, tokens, most_rows,
        **slot_arguments(terms, _OPERANDS), **operand.chunk_arguments(SLOTS + 1),
        WORDS=CHUNK_WORDS["xnor"], LAST=last, HAS_BASE=base is not None, HAS_BIAS=bias is not None,
        SPLITS=config.splits, BLOCK_ROWS=config.block_rows, num_warps=config.num_warps,
    )  # fmt: skip
