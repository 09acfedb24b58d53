"""The transposed layer: gradients of x.

Signs are expanded in the order of their columns and are the right-hand operand of ``tl.dot``, in bfloat16; so
are the gradients, as the sum of two bfloat16 terms (three for float32): 16 and 24 bits with the range of
float32, without staging. Two launches like the layer itself, and no fewer for shared first stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import is_interpreted, wrap_triton
from .slots import Term, pick, slot_arguments, unspecialized
from .unpack import load_words, sign_matrix

__all__ = ["transposed", "transposed_kernel"]

_OPERANDS = ("words", "pitch", "units", "rows", "cols", "scale", "row_scale", "result", "source")
_BLOCKS = {"BLOCK_TOKENS": 32, "BLOCK_ROWS": 32, "BLOCK_WORDS": 4}


@triton.jit
def _column_sums(grad, grad_row, token, tokens, row_scale, words, pitch, units, rows, first_word,
                 UNIT: tl.constexpr, TERMS: tl.constexpr, WIDE: tl.constexpr, HAS_ROW_SCALE: tl.constexpr,
                 BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                 BLOCK_WORDS: tl.constexpr):  # fmt: skip
    """Sums ``[tokens, columns]`` of gradients ``[tokens, rows]`` times signs, over all rows."""
    sums = tl.zeros((BLOCK_TOKENS, 32 * BLOCK_WORDS), tl.float32)
    place = grad + token.to(tl.int64)[:, None] * grad_row
    word = first_word + tl.arange(0, BLOCK_WORDS)[None, :]
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        rest = tl.load(
            place + row[None, :], mask=(token < tokens)[:, None] & (row < rows)[None, :], other=0.0
        )
        rest = rest.to(tl.float32)
        if HAS_ROW_SCALE:
            rest *= tl.load(row_scale + row, mask=row < rows, other=0.0)[None, :]
        packed = load_words(words + row.to(tl.int64)[:, None] * (pitch * UNIT), word, units,
                            (row < rows)[:, None], UNIT)  # fmt: skip
        signs = sign_matrix(packed, BLOCK_WORDS, BLOCK_ROWS)
        for _ in tl.static_range(TERMS):
            # The leading 8 bits, which bfloat16 holds exactly.
            term = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            if WIDE:
                sums = tl.dot(term, signs.to(tl.float32), sums)
            else:
                sums = tl.dot(term.to(tl.bfloat16), signs, sums)
            rest -= term
    return sums


@triton.jit(do_not_specialize=unspecialized("pitch", "units"))
def transposed_kernel(
    grad, grad_row, out, out_row, base, tokens, most_cols,
    words0, words1, words2, words3, pitch0, pitch1, pitch2, pitch3, units0, units1, units2, units3,
    rows0, rows1, rows2, rows3, cols0, cols1, cols2, cols3, scale0, scale1, scale2, scale3,
    row_scale0, row_scale1, row_scale2, row_scale3, result0, result1, result2, result3,
    source0, source1, source2, source3,
    PATHS: tl.constexpr, UNIT: tl.constexpr, TERMS: tl.constexpr, WIDE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, LAST: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """One stage; grid ``(column blocks * token blocks, terms of a first stage)``.

    First stage: ``out[token, result + column]`` in float32. Last: ``out[token, column]``, all paths.
    """
    tiles = tl.cdiv(most_cols, 32 * BLOCK_WORDS)
    first_word = (tl.program_id(0) % tiles) * BLOCK_WORDS
    col = first_word * 32 + tl.arange(0, 32 * BLOCK_WORDS)
    token = (tl.program_id(0) // tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = (token < tokens)[:, None]
    if LAST:
        place = token.to(tl.int64)[:, None] * most_cols + col[None, :]
        inside = present & (col < most_cols)[None, :]
        total = tl.zeros((BLOCK_TOKENS, 32 * BLOCK_WORDS), tl.float32)
        if HAS_BASE:
            total += tl.load(base + place, mask=inside, other=0.0)
        for path in tl.static_range(PATHS):
            sums = _column_sums(
                grad + pick(path, source0, source1, source2, source3, PATHS), grad_row, token, tokens,
                pick(path, row_scale0, row_scale1, row_scale2, row_scale3, PATHS),
                pick(path, words0, words1, words2, words3, PATHS),
                pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                pick(path, units0, units1, units2, units3, PATHS),
                pick(path, rows0, rows1, rows2, rows3, PATHS), first_word,
                UNIT, TERMS, WIDE, HAS_ROW_SCALE, BLOCK_TOKENS, BLOCK_ROWS, BLOCK_WORDS,
            )  # fmt: skip
            scale = pick(path, scale0, scale1, scale2, scale3, PATHS)
            scale = tl.load(scale + col, mask=col < most_cols, other=0.0)
            total = tl.fma(sums, tl.broadcast_to(scale[None, :], sums.shape), total)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    else:
        path = tl.program_id(1)
        cols = pick(path, cols0, cols1, cols2, cols3, PATHS)
        sums = _column_sums(
            grad, grad_row, token, tokens, pick(path, row_scale0, row_scale1, row_scale2, row_scale3, PATHS),
            pick(path, words0, words1, words2, words3, PATHS),
            pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
            pick(path, units0, units1, units2, units3, PATHS), rows0, first_word,  # all have y's rows
            UNIT, TERMS, WIDE, HAS_ROW_SCALE, BLOCK_TOKENS, BLOCK_ROWS, BLOCK_WORDS,
        )  # fmt: skip
        scale = pick(path, scale0, scale1, scale2, scale3, PATHS)
        sums *= tl.load(scale + col, mask=col < cols, other=0.0)[None, :]
        place = token.to(tl.int64)[:, None] * out_row + col[None, :]
        place += pick(path, result0, result1, result2, result3, PATHS)
        tl.store(out + place, sums, mask=present & (col < cols)[None, :])


def transposed(
    grad: torch.Tensor,
    terms: Sequence[Term],
    out: torch.Tensor,
    *,
    last: bool,
    exact: bool,
    base: torch.Tensor | None = None,
) -> None:
    """Launch one stage.

    Args:
        grad: ``[M, rows]`` with adjacent columns; of a last stage the latents, of which each term takes its
            own.
        terms: at most :data:`~littlebit2_kernels.triton.slots.SLOTS`; ``row_scale`` multiplies ``grad``, if
            any, and ``scale`` the result.
        out: contiguous ``[M, K]`` of any float dtype, or float32 ``[M, latents]`` of first stages.
        last: whether the terms are the paths of one sum.
        exact: whether gradients keep 24 bits, and not 16.
        base: float32 ``[M, K]`` that a last stage adds to.
    """
    tokens = grad.shape[0]
    most_cols = max(term.cols for term in terms)
    blocks = triton.cdiv(most_cols, 32 * _BLOCKS["BLOCK_WORDS"])
    blocks *= triton.cdiv(tokens, _BLOCKS["BLOCK_TOKENS"])
    wrap_triton(transposed_kernel)[(blocks, 1 if last else len(terms))](
        grad, grad.stride(0), out, out.stride(0), out if base is None else base, tokens, most_cols,
        **slot_arguments(terms, _OPERANDS), TERMS=3 if exact else 2,
        WIDE=is_interpreted(transposed_kernel),  # the interpreter multiplies the bits of bfloat16 as integers
        HAS_ROW_SCALE=terms[0].row_scale is not None, LAST=last, HAS_BASE=base is not None,
        **_BLOCKS, num_warps=4, num_stages=2,
    )  # fmt: skip
