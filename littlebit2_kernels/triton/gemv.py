"""GEMV in float32 for few tokens: the layer in two launches, everything else fused into them.

A program takes one token, ``BLOCK_ROWS`` rows of signs and the columns of one split, in blocks of
``BLOCK_WORDS`` words. A thread holds some words of some rows and the 32 activations of each, so that a
sign-accumulate is a shift, an xor and an add within the thread; lanes meet once, at the end.

The first launch does every first stage and leaves sums ``[splits, M, latents]``; the second one adds the
splits in order, multiplies by ``latent_scale`` and does all paths, ``out_scale`` and bias. Which columns a
thread adds, and in which order, depends on the layer and the configuration, not on the other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import wrap_triton
from .plan import GemvConfig
from .slots import Term, pick, slot_arguments, unspecialized
from .unpack import load_words, with_signs

__all__ = ["gemv", "gemv_kernel", "row_sums"]

_OPERANDS = (
    *("words", "pitch", "units", "rows", "eighths", "scale", "row_scale", "result"),
    "source_eighths",
)


@triton.jit
def _activations(x, x_part, scale, col, cols, PARTS: tl.constexpr):
    """``scale`` times the sum of the parts of ``x`` in columns ``col``, float32; zero past the last one."""
    inside = col < cols
    value = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x + part * x_part + col, mask=inside, other=0.0).to(tl.float32)
    return value * tl.load(scale + col, mask=inside, other=0.0)


@triton.jit
def row_sums(x, x_part, scale, cols, words, pitch, units, row, rows, begin, end,
              PARTS: tl.constexpr, UNIT: tl.constexpr,
              BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr):  # fmt: skip
    """Sums ``[BLOCK_ROWS]`` of signs times activations over the word blocks from ``begin`` to ``end``."""
    # Tensors are [rows, words, bits] from the start: with loads of that rank, the words' own layout, in which
    # a thread has whole words, is the one that the arithmetic is done in.
    bit = tl.arange(0, 32)[None, None, :]
    inside = (row < rows)[:, None, None]
    row_words = words + row.to(tl.int64)[:, None, None] * (pitch * UNIT)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_WORDS), tl.float32)
    for block in range(begin, end):
        word = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :, None]
        values = _activations(x, x_part, scale, word * 32 + bit, cols, PARTS)
        signs = load_words(row_words, word, units, inside, UNIT)
        sums += tl.sum(with_signs(values, signs, bit), axis=2)
    return tl.sum(sums, axis=1)


@triton.jit(
    do_not_specialize=[
        *unspecialized("pitch", "units", "rows", "eighths", "result", "source_eighths"),
        "most_rows",
    ]
)
def gemv_kernel(
    x, x_row, out, out_row, base, bias, tokens, most_rows,
    words0, words1, words2, words3, pitch0, pitch1, pitch2, pitch3, units0, units1, units2, units3,
    rows0, rows1, rows2, rows3, eighths0, eighths1, eighths2, eighths3, scale0, scale1, scale2, scale3,
    row_scale0, row_scale1, row_scale2, row_scale3, result0, result1, result2, result3,
    source_eighths0, source_eighths1, source_eighths2, source_eighths3,
    PATHS: tl.constexpr, UNIT: tl.constexpr, COL_UNIT: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, LAST: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One stage; grid ``(row blocks * splits * tokens, paths of a first stage)``.

    First stage: ``out[split, token, result + row]`` in float32. Last: ``out[token, row]``, all paths.
    """
    tiles = tl.cdiv(most_rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = (tl.program_id(0) // tiles) % SPLITS
    token = (tl.program_id(0) // (tiles * SPLITS)).to(tl.int64)
    token_x = x + token * x_row
    if LAST:
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        inside = row < most_rows
        if HAS_BASE:
            total += tl.load(base + token * most_rows + row, mask=inside, other=0.0)
        for path in tl.static_range(PATHS):
            cols = pick(path, eighths0, eighths1, eighths2, eighths3, PATHS) * COL_UNIT
            source = pick(
                path, source_eighths0, source_eighths1, source_eighths2, source_eighths3, PATHS
            )  # fmt: skip
            sums = row_sums(
                token_x + source * COL_UNIT, tokens * x_row,
                pick(path, scale0, scale1, scale2, scale3, PATHS), cols,
                pick(path, words0, words1, words2, words3, PATHS),
                pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                pick(path, units0, units1, units2, units3, PATHS),
                row, most_rows, 0, tl.cdiv(cols, 32 * BLOCK_WORDS), PARTS, UNIT, BLOCK_ROWS, BLOCK_WORDS,
            )  # fmt: skip
            row_scale = pick(path, row_scale0, row_scale1, row_scale2, row_scale3, PATHS)
            total = tl.fma(sums, tl.load(row_scale + row, mask=inside, other=0.0), total)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=inside, other=0.0)
        tl.store(out + token * out_row + row, total.to(out.dtype.element_ty), mask=inside)
    else:
        path = tl.program_id(1)
        rows = pick(path, rows0, rows1, rows2, rows3, PATHS)
        cols = eighths0 * COL_UNIT  # all paths have x's columns
        blocks = tl.cdiv(cols, 32 * BLOCK_WORDS)
        sums = row_sums(
            token_x, tokens * x_row, pick(path, scale0, scale1, scale2, scale3, PATHS), cols,
            pick(path, words0, words1, words2, words3, PATHS),
            pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
            units0, row, rows, blocks * split // SPLITS, blocks * (split + 1) // SPLITS,
            PARTS, UNIT, BLOCK_ROWS, BLOCK_WORDS,
        )  # fmt: skip
        first = pick(path, result0, result1, result2, result3, PATHS)
        place = (split * tokens + token) * out_row + first + row
        tl.store(out + place, sums, mask=row < rows)


def gemv(
    x: torch.Tensor,
    terms: Sequence[Term],
    out: torch.Tensor,
    config: GemvConfig,
    *,
    last: bool,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Launch one stage.

    Args:
        x: ``[parts, M, columns]``, adjacent columns and tokens evenly apart, of which each term takes its
            own; parts are added up first.
        terms: at most :data:`~littlebit2_kernels.triton.slots.SLOTS`.
        out: ``[M, N]`` of any float dtype, or float32 ``[splits, M, latents]`` of first stages.
        config: blocks and splits.
        last: whether the terms are the paths of one sum.
        base: float32 ``[M, N]`` that a last stage adds to.
        bias: float32 ``[N]`` that a last stage adds.
    """
    parts, tokens = x.shape[:2]
    most_rows = max(term.rows for term in terms)
    blocks = triton.cdiv(most_rows, config.block_rows) * config.splits
    wrap_triton(gemv_kernel)[(blocks * tokens, 1 if last else len(terms))](
        x, x.stride(1), out, out.stride(-2),
        out if base is None else base, out if bias is None else bias, tokens, most_rows,
        **slot_arguments(terms, _OPERANDS),
        PARTS=parts, SPLITS=config.splits, LAST=last, HAS_BASE=base is not None, HAS_BIAS=bias is not None,
        BLOCK_ROWS=config.block_rows, BLOCK_WORDS=config.block_words, num_warps=config.num_warps,
    )  # fmt: skip
