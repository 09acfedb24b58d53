"""Both stages of a decode call in one launch, for layers so small that a launch costs more than their signs.

A program takes one token and ``BLOCK_ROWS`` rows of the output, and forms every latent itself: 32 at a time,
what one word of a row of U multiplies, until there are those of ``RANK_WORDS`` words, which enter its rows at
once. So the latents of a call, of any rank, never leave the chip, and no program waits for another.

Products are those of the two launches (gemv.py), added in the same order: columns in the first stage's blocks
and splits, words of U in the last stage's blocks. Which of the two runs does not show in results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .gemv import row_sums
from .launch import wrap_triton
from .plan import FusedConfig
from .slots import Term, pick, slot_arguments, unspecialized
from .unpack import load_words, with_signs

__all__ = ["fused", "fused_kernel"]

_FIRST = ("words", "pitch", "units", "rows", "eighths", "scale")
_LAST = ("words", "pitch", "units", "scale", "row_scale")


@triton.jit(
    do_not_specialize=unspecialized("v_pitch", "v_units", "v_rows", "v_eighths", "u_pitch", "u_units")
)
def fused_kernel(
    x, x_row, out, bias, rows,
    v_words0, v_words1, v_words2, v_words3, v_pitch0, v_pitch1, v_pitch2, v_pitch3,
    v_units0, v_units1, v_units2, v_units3, v_rows0, v_rows1, v_rows2, v_rows3,
    v_eighths0, v_eighths1, v_eighths2, v_eighths3, v_scale0, v_scale1, v_scale2, v_scale3,
    u_words0, u_words1, u_words2, u_words3, u_pitch0, u_pitch1, u_pitch2, u_pitch3,
    u_units0, u_units1, u_units2, u_units3, u_scale0, u_scale1, u_scale2, u_scale3,
    u_row_scale0, u_row_scale1, u_row_scale2, u_row_scale3,
    v_PATHS: tl.constexpr, v_UNIT: tl.constexpr, v_COL_UNIT: tl.constexpr,
    u_PATHS: tl.constexpr, u_UNIT: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, COL_WORDS: tl.constexpr, RANK_WORDS: tl.constexpr,
):  # fmt: skip
    """``out[token, row]``, contiguous, of a layer's two stages and all paths; grid ``(row blocks * tokens)``.

    ``COL_WORDS`` and ``SPLITS`` are the first stage's, ``RANK_WORDS`` the last stage's words of a block: with
    them, the order of additions.
    """
    PATHS: tl.constexpr = u_PATHS
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    inside = row < rows
    bit = tl.arange(0, 32)[None, None, :]
    slot = tl.arange(0, RANK_WORDS)[None, :, None]
    cols = v_eighths0 * v_COL_UNIT  # all paths have x's columns
    blocks = tl.cdiv(cols, 32 * COL_WORDS)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for path in range(PATHS):
        rank = pick(path, v_rows0, v_rows1, v_rows2, v_rows3, PATHS)
        u_pitch = pick(path, u_pitch0, u_pitch1, u_pitch2, u_pitch3, PATHS)
        row_words = pick(path, u_words0, u_words1, u_words2, u_words3, PATHS)
        row_words += row.to(tl.int64)[:, None, None] * (u_pitch * u_UNIT)
        sums = tl.zeros((BLOCK_ROWS, RANK_WORDS), tl.float32)
        for first_word in range(0, tl.cdiv(rank, 32), RANK_WORDS):
            values = tl.zeros((1, RANK_WORDS, 32), tl.float32)
            for word in range(first_word, tl.minimum(first_word + RANK_WORDS, tl.cdiv(rank, 32))):
                latent = word * 32 + tl.arange(0, 32)
                z = tl.zeros((32,), tl.float32)
                for split in range(SPLITS):
                    z += row_sums(
                        x + token * x_row, 0, pick(path, v_scale0, v_scale1, v_scale2, v_scale3, PATHS), cols,
                        pick(path, v_words0, v_words1, v_words2, v_words3, PATHS),
                        pick(path, v_pitch0, v_pitch1, v_pitch2, v_pitch3, PATHS),
                        v_units0, latent, rank,
                        blocks * split // SPLITS, blocks * (split + 1) // SPLITS, 1, v_UNIT, 32, COL_WORDS,
                    )  # fmt: skip
                scale = pick(path, u_scale0, u_scale1, u_scale2, u_scale3, PATHS)
                z *= tl.load(scale + latent, mask=latent < rank, other=0.0)
                values = tl.where(slot == word - first_word, tl.reshape(z, (1, 1, 32)), values)
            signs = load_words(
                row_words, first_word + slot, pick(path, u_units0, u_units1, u_units2, u_units3, PATHS),
                inside[:, None, None], u_UNIT,
            )  # fmt: skip
            sums += tl.sum(with_signs(values, signs, bit), axis=2)
        row_scale = pick(path, u_row_scale0, u_row_scale1, u_row_scale2, u_row_scale3, PATHS)
        total = tl.fma(tl.sum(sums, axis=1), tl.load(row_scale + row, mask=inside, other=0.0), total)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0)
    tl.store(out + token * rows + row, total.to(out.dtype.element_ty), mask=inside)


def fused(
    x: torch.Tensor,
    first: Sequence[Term],
    last: Sequence[Term],
    out: torch.Tensor,
    bias: torch.Tensor | None,
    config: FusedConfig,
) -> None:
    """Launch a layer.

    Args:
        x: ``[M, K]``, adjacent columns.
        first: the first stage of each path, at most :data:`~littlebit2_kernels.triton.slots.SLOTS`; one that
            paths share is given, and computed, for each.
        last: the last stage of each path.
        out: contiguous ``[M, N]`` of any float dtype.
        bias: float32 ``[N]`` or ``None``.
        config: blocks, and with them the order of additions.
    """
    tokens, rows = out.shape
    wrap_triton(fused_kernel)[(triton.cdiv(rows, config.block_rows) * tokens,)](
        x, x.stride(0), out, out if bias is None else bias, rows,
        **slot_arguments(first, _FIRST, "v_"), **slot_arguments(last, _LAST, "u_"),
        SPLITS=config.splits, HAS_BIAS=bias is not None, BLOCK_ROWS=config.block_rows,
        COL_WORDS=config.col_words, RANK_WORDS=config.rank_words, num_warps=config.num_warps,
    )  # fmt: skip
