"""Activations as the GEMM and the xnor kernel take them: scaled, rounded, and put in the order of the signs.

One launch stages the operands of all terms of a stage, chunk by chunk of their columns (``CHUNK_WORDS``
words). Each chunk of a token has its own scale, so that an outlier coarsens its own chunk only:

======== ==================================================================================================
kind     a chunk becomes
======== ==================================================================================================
float16  float16, by the power of two that brings its largest magnitude to [2^14, 2^15)
exact    two float16, the second being the first one's error times 2^11
int8     integers of at most 127, scale max / 127
sign     +-1 in int8, and 0 past the last column; scale mean magnitude
xnor     the same as one bit each, in words of the packed format
======== ==================================================================================================

Columns of a chunk lie in the order in which :func:`~.unpack.sign_operand` makes signs. What is not finite
makes the scale of its chunk NaN, and so its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import wrap_triton
from .plan import CHUNK_WORDS, SLOTS
from .slots import Term, pick, slot_arguments, unspecialized

__all__ = ["LAYOUTS", "Operand", "Sums", "operand_kernel", "stage_operand"]

_BLOCK_TOKENS = 4
_OPERANDS = ("eighths", "scale", "source_eighths", "stage")


@dataclass(frozen=True)
class Layout:
    """How a kind holds a chunk: dtype, elements of a word, elements of an activation, signs of a register."""

    dtype: torch.dtype
    per_word: int
    terms: int
    signs: int


LAYOUTS = {
    "float16": Layout(torch.float16, 32, 1, 2),
    "exact": Layout(torch.float16, 32, 2, 2),
    "int8": Layout(torch.int8, 32, 1, 4),
    "sign": Layout(torch.int8, 32, 1, 4),
    "xnor": Layout(torch.int32, 1, 1, 1),
}


@dataclass(frozen=True)
class Sums:
    """What a stage starts from: x, or the latents that the stage before it left.

    Attributes:
        values: ``[parts, M, columns]``, columns adjacent.
        scales: float32 ``[stages * parts, M]``: the parts are sums of one chunk each, to be added up in order
            times the scales of their stage. ``None`` where the only part is the value itself.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class Operand:
    """Staged activations of a stage.

    Attributes:
        kind: a key of :data:`LAYOUTS`.
        values: ``[M, elements of an activation, chunks * elements of a chunk]``.
        scales: float32 ``[chunks, M]``.
        chunks: the first chunk of each term, and the end.
    """

    kind: str
    values: torch.Tensor
    scales: torch.Tensor
    chunks: tuple[int, ...]

    def chunk_arguments(self, count: int) -> dict[str, int]:
        """Kernel arguments ``chunk0, chunk1, ...``; those past the end repeat it."""
        return {f"chunk{i}": self.chunks[min(i, len(self.chunks) - 1)] for i in range(count)}


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_integer(value):
    # To nearest, ties to even, for magnitudes below 2^22.
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _load(x, x_part, scales, tokens, token, parts, inside, SCALED: tl.constexpr):
    """Values at ``x``: one part as it is, or the parts in order, each times its scale."""
    if SCALED:
        value = tl.zeros(x.shape, tl.float32)
        for part in range(parts):
            scale = tl.load(scales + part * tokens + token, mask=token < tokens, other=0.0)
            partial = tl.load(x + part * x_part, mask=inside, other=0.0)
            value = tl.fma(partial, tl.broadcast_to(scale[:, None, None], x.shape), value)
        return value
    else:  # Triton would compile both returns without it
        return tl.load(x, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=[*unspecialized("eighths", "source_eighths", "stage", "chunk"), "parts"])
def operand_kernel(
    x, x_row, sums_scales, parts, values, values_row, values_term, scales, tokens,
    eighths0, eighths1, eighths2, eighths3, scale0, scale1, scale2, scale3,
    source_eighths0, source_eighths1, source_eighths2, source_eighths3,
    stage0, stage1, stage2, stage3, chunk0, chunk1, chunk2, chunk3,
    PATHS: tl.constexpr, COL_UNIT: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
    WORDS: tl.constexpr, SIGNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Stage one chunk of ``BLOCK_TOKENS`` tokens; grid ``(token blocks, terms, chunks of a term)``."""
    path = tl.program_id(1)
    cols = pick(path, eighths0, eighths1, eighths2, eighths3, PATHS) * COL_UNIT
    first_col = tl.program_id(2) * 32 * WORDS
    if first_col >= cols:
        return
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < tokens
    bit = tl.arange(0, 32)[None, None, :]
    col = first_col + tl.arange(0, WORDS)[None, :, None] * 32 + bit  # [1, words, bits]
    place = x + token.to(tl.int64)[:, None, None] * x_row
    source = pick(path, source_eighths0, source_eighths1, source_eighths2, source_eighths3, PATHS)
    place += source * COL_UNIT + col
    z = _load(
        place, tl.cast(tokens, tl.int64) * x_row,
        sums_scales + pick(path, stage0, stage1, stage2, stage3, PATHS) * parts * tokens,
        tokens, token, parts, present[:, None, None] & (col < cols), SCALED,
    )  # fmt: skip
    z *= tl.load(pick(path, scale0, scale1, scale2, scale3, PATHS) + col, mask=col < cols, other=0.0)

    # Magnitudes order like their bits, and NaN comes last.
    most = tl.max(tl.max(z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2), axis=1)
    finite = most < 0x7F800000
    # What is brought to [1, 2) with it; neither this power of two nor its inverse leaves the range.
    exponent = tl.minimum(tl.maximum((most >> 23) - 127, -112), 126)
    if KIND == "sign" or KIND == "xnor":
        scale = tl.sum(tl.sum(tl.abs(z), axis=2), axis=1) / tl.minimum(cols - first_col, 32 * WORDS)
    elif KIND == "int8":
        largest = most.to(tl.float32, bitcast=True) * _power_of_two(-exponent)
        inverse = 127.0 / tl.where(most == 0, 1.0, largest)
        z = _to_integer(z * _power_of_two(-exponent)[:, None, None] * inverse[:, None, None])
        scale = largest / 127.0 * _power_of_two(exponent)
    else:
        z *= _power_of_two(14 - exponent)[:, None, None]
        scale = _power_of_two(exponent - 14)
    chunk = pick(path, chunk0, chunk1, chunk2, chunk3, PATHS) + tl.program_id(2)
    tl.store(
        scales + tl.cast(chunk, tl.int64) * tokens + token,
        tl.where(finite, scale, float("nan")),
        mask=present,
    )

    out = values + token.to(tl.int64)[:, None] * values_row
    if KIND == "xnor":
        words = tl.sum((z < 0).to(tl.int32) << bit, axis=2)
        tl.store(out + chunk * WORDS + tl.arange(0, WORDS)[None, :], words, mask=present[:, None])
    else:
        if KIND == "sign":
            z = tl.where(col < cols, tl.where(z < 0, -1.0, 1.0), 0.0)
        z = tl.where(finite[:, None, None], z, 0.0)
        # [tokens, words, bits of a register, steps] -> [tokens, steps, words, bits of a register]
        z = tl.permute(tl.reshape(z, (BLOCK_TOKENS, WORDS, SIGNS, 32 // SIGNS)), (0, 3, 1, 2))
        z = tl.reshape(z, (BLOCK_TOKENS, 32 * WORDS))
        out += chunk * (32 * WORDS) + tl.arange(0, 32 * WORDS)[None, :]
        high = z.to(values.dtype.element_ty)
        tl.store(out, high, mask=present[:, None])
        if KIND == "exact":
            low = (z - high.to(tl.float32)) * 2048.0
            tl.store(out + values_term, low.to(tl.float16), mask=present[:, None])


def stage_operand(sums: Sums, terms: Sequence[Term], kind: str) -> Operand:
    """Launch for the terms of one launch; ``kind`` is a key of :data:`LAYOUTS`."""
    layout, words = LAYOUTS[kind], CHUNK_WORDS[kind]
    chunks = [0]
    for term in terms:
        chunks.append(chunks[-1] + triton.cdiv(term.cols, 32 * words))
    parts, tokens = sums.values.shape[:2]
    like = sums.values
    size = (tokens, layout.terms, chunks[-1] * words * layout.per_word)
    values = like.new_empty(size, dtype=layout.dtype)
    scales = like.new_empty((chunks[-1], tokens), dtype=torch.float32)
    operand = Operand(kind, values, scales, tuple(chunks))
    longest = triton.cdiv(max(term.cols for term in terms), 32 * words)
    wrap_triton(operand_kernel)[(triton.cdiv(tokens, _BLOCK_TOKENS), len(terms), longest)](
        like, like.stride(1), scales if sums.scales is None else sums.scales, parts,
        values, values.stride(0), values.stride(1), scales, tokens, **slot_arguments(terms, _OPERANDS),
        **operand.chunk_arguments(SLOTS),
        KIND=kind, SCALED=sums.scales is not None, WORDS=words, SIGNS=layout.signs,
        BLOCK_TOKENS=_BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
    return operand
