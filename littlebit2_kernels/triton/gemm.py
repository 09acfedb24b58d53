"""GEMM on tensor cores for many tokens: signs are expanded in registers and feed ``tl.dot``.

A program takes ``BLOCK_ROWS`` rows of signs and ``BLOCK_TOKENS`` tokens. A chunk of columns is a tile of
packed words, loaded once and held in registers; each step takes some bits of every word as the register
operand of a dot product with the staged activations (operand.py), which lie in that order. After a chunk, its
sum times the chunk's scale is added to the total in float32: tensor cores truncate as they add, so their
chains stay short.

The order of the chunks' sums is the same everywhere. Where rows and tokens are too few for the GPU, a first
stage is split over chunks, stores the sum of each, and the launch that stages the latents adds them up like
the unsplit kernel does: the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import wrap_triton
from .operand import LAYOUTS, Operand
from .plan import CHUNK_WORDS, SLOTS, GemmConfig
from .slots import Term, pick, slot_arguments, unspecialized
from .unpack import load_words, sign_operand

__all__ = ["gemm", "gemm_kernel"]

_OPERANDS = ("words", "pitch", "units", "rows", "row_scale", "result")


@triton.jit
def _chunk_sums(values, values_term, present, words, pitch, units, row, rows, chunk,
                UNIT: tl.constexpr, WORDS: tl.constexpr, SIGNS: tl.constexpr, TERMS: tl.constexpr,
                UNROLL: tl.constexpr):  # fmt: skip
    """Sums ``[rows, tokens]`` over one chunk, before its scale; ``values`` points to its first columns."""
    place = words + row.to(tl.int64)[:, None] * (pitch * UNIT)
    word = chunk * WORDS + tl.arange(0, WORDS)[None, :]
    packed = load_words(place, word, units, (row < rows)[:, None], UNIT)
    high = tl.zeros((row.shape[0], values.shape[1]), tl.int32 if SIGNS == 4 else tl.float32)
    low = high
    for step in tl.range(0, 32 // SIGNS, loop_unroll_factor=UNROLL):
        signs = sign_operand(packed, step, SIGNS)
        columns = values + (step * (WORDS * SIGNS) + tl.arange(0, WORDS * SIGNS)[:, None])
        high = tl.dot(signs, tl.load(columns, mask=present, other=0), high, out_dtype=high.dtype)
        if TERMS == 2:
            low = tl.dot(signs, tl.load(columns + values_term, mask=present, other=0), low)
    if TERMS == 2:
        high = tl.fma(low, tl.full(low.shape, 1.0 / 2048.0, tl.float32), high)
    return high.to(tl.float32)


@triton.jit(do_not_specialize=unspecialized("pitch", "units", "rows", "chunk"))
def gemm_kernel(
    values, values_row, values_term, scales, out, out_row, base, bias, tokens, most_rows,
    words0, words1, words2, words3, pitch0, pitch1, pitch2, pitch3, units0, units1, units2, units3,
    rows0, rows1, rows2, rows3, row_scale0, row_scale1, row_scale2, row_scale3,
    result0, result1, result2, result3, chunk0, chunk1, chunk2, chunk3, chunk4,
    PATHS: tl.constexpr, UNIT: tl.constexpr, WORDS: tl.constexpr, SIGNS: tl.constexpr, TERMS: tl.constexpr,
    LAST: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One stage; grid ``(row blocks * splits * token blocks, terms of a first stage)``.

    Last: ``out[token, row]``, all paths. First stage: ``out[token, result + row]`` in float32; with splits
    ``out[chunk, token, result + row]``, the sum of each chunk before its scale.
    """
    tiles = tl.cdiv(most_rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = (tl.program_id(0) // tiles) % SPLITS
    token = (tl.program_id(0) // (tiles * SPLITS)) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < tokens
    CHUNK: tl.constexpr = 32 * WORDS
    token_values = values + token.to(tl.int64)[None, :] * values_row
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    if LAST:
        inside = (row < most_rows)[:, None] & present[None, :]
        place = token.to(tl.int64)[None, :] * most_rows + row[:, None]
        if HAS_BASE:
            total += tl.load(base + place, mask=inside, other=0.0)
        for path in tl.static_range(PATHS):
            first = pick(path, chunk0, chunk1, chunk2, chunk3, PATHS)
            row_scale = pick(path, row_scale0, row_scale1, row_scale2, row_scale3, PATHS)
            row_scale = tl.load(row_scale + row, mask=row < most_rows, other=0.0)
            for chunk in range(pick(path, chunk1, chunk2, chunk3, chunk4, 4) - first):
                sums = _chunk_sums(
                    token_values + (first + chunk) * CHUNK, values_term, present[None, :],
                    pick(path, words0, words1, words2, words3, PATHS),
                    pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                    pick(path, units0, units1, units2, units3, PATHS),
                    row, most_rows, chunk, UNIT, WORDS, SIGNS, TERMS, UNROLL,
                )  # fmt: skip
                scale = tl.load(scales + (first + chunk) * tokens + token, mask=present, other=0.0)
                total = tl.fma(sums, row_scale[:, None] * scale[None, :], total)
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < most_rows, other=0.0)[:, None]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
    else:
        path = tl.program_id(1)
        rows = pick(path, rows0, rows1, rows2, rows3, PATHS)
        inside = (row < rows)[:, None] & present[None, :]
        first = pick(path, chunk0, chunk1, chunk2, chunk3, PATHS)
        place = token.to(tl.int64)[None, :] * out_row + row[:, None]
        place += pick(path, result0, result1, result2, result3, PATHS)
        for chunk in range(chunk1 * split // SPLITS, chunk1 * (split + 1) // SPLITS):  # all have x's columns
            sums = _chunk_sums(
                token_values + (first + chunk) * CHUNK, values_term, present[None, :],
                pick(path, words0, words1, words2, words3, PATHS),
                pick(path, pitch0, pitch1, pitch2, pitch3, PATHS),
                units0, row, rows, chunk, UNIT, WORDS, SIGNS, TERMS, UNROLL,
            )  # fmt: skip
            if SPLITS > 1:
                tl.store(out + tl.cast(chunk, tl.int64) * tokens * out_row + place, sums, mask=inside)
            else:
                scale = tl.load(scales + (first + chunk) * tokens + token, mask=present, other=0.0)
                total = tl.fma(sums, tl.broadcast_to(scale[None, :], total.shape), total)
        if SPLITS == 1:
            tl.store(out + place, total, mask=inside)


def gemm(
    operand: Operand,
    terms: Sequence[Term],
    out: torch.Tensor,
    config: GemmConfig,
    *,
    last: bool,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Launch one stage.

    Args:
        operand: staged for ``terms``.
        terms: at most :data:`~littlebit2_kernels.triton.slots.SLOTS`.
        out: contiguous ``[M, N]`` of any float dtype; of first stages float32 ``[M, latents]``, or with
            splits ``[chunks, M, latents]``.
        config: blocks and splits.
        last: whether the terms are the paths of one sum.
        base: float32 ``[M, N]`` that a last stage adds to.
        bias: float32 ``[N]`` that a last stage adds.
    """
    tokens, kind = operand.values.shape[0], operand.kind
    most_rows = max(term.rows for term in terms)
    blocks = triton.cdiv(most_rows, config.block_rows) * config.splits
    blocks *= triton.cdiv(tokens, config.block_tokens)
    wrap_triton(gemm_kernel)[(blocks, 1 if last else len(terms))](
        operand.values, operand.values.stride(0), operand.values.stride(1), operand.scales,
        out, out.stride(-2), out if base is None else base, out if bias is None else bias, tokens, most_rows,
        **slot_arguments(terms, _OPERANDS), **operand.chunk_arguments(SLOTS + 1),
        WORDS=CHUNK_WORDS[kind], SIGNS=LAYOUTS[kind].signs, TERMS=LAYOUTS[kind].terms,
        LAST=last, HAS_BASE=base is not None, HAS_BIAS=bias is not None, SPLITS=config.splits,
        BLOCK_ROWS=config.block_rows, BLOCK_TOKENS=config.block_tokens, UNROLL=config.unroll,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
