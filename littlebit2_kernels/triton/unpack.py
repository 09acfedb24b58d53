"""Packed signs as kernels use them: the one place that knows what a bit stands for.

Bit 1 of a word is -1, bit 0 is +1, the least significant bit is the first column (docs/format.md). Words are
uint32 here. Each function makes signs of many words from a few integer instructions, all within a thread: no
sign crosses lanes or shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["count_ones", "load_words", "sign_matrix", "sign_operand", "with_signs"]


@triton.jit
def load_words(rows_ptr, word, row_units, inside, UNIT: tl.constexpr):
    """Words ``word`` of the rows at ``rows_ptr`` as uint32; 0 past a row's end and outside of ``inside``.

    A row has ``row_units * UNIT`` words. ``UNIT`` is 4 where rows start at and span multiples of 16 bytes:
    with that in the mask, the compiler knows that four words are loaded or masked together.
    """
    words = tl.load(rows_ptr + word, mask=inside & (word < row_units * UNIT), other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def with_signs(values, words, bit):
    """float32 ``values`` times the sign of bit ``bit`` of ``words``: a shift and an xor of the sign bit."""
    flipped = values.to(tl.uint32, bitcast=True) ^ ((words << (31 - bit)) & 0x80000000)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def sign_operand(words, step, PER_WORD: tl.constexpr):
    """``[rows, W]`` words to ``[rows, PER_WORD * W]`` signs that a dot product takes.

    Step ``j`` of ``32 / PER_WORD`` takes bits ``j + h * 32 / PER_WORD``, h < PER_WORD, of each word; they
    become columns ``PER_WORD * w + h``. ``PER_WORD`` is 2 for float16 and 4 for int8: the signs of a word and
    step are one 32-bit register of the operand, made at once.
    """
    if PER_WORD == 2:
        # +-1.0 is 0x3C00 with or without its sign bit.
        pairs = ((words << (15 - step)) & 0x80008000) | 0x3C003C00
        halves = tl.interleave(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
        return halves.to(tl.float16, bitcast=True)
    else:  # Triton would compile both returns without it
        # In each byte, 1 - 2 bit = 1 + 254 bit without a carry.
        quads = ((words >> step) & 0x01010101) * 0xFE + 0x01010101
        even = tl.interleave(quads.to(tl.int8), (quads >> 16).to(tl.int8))
        odd = tl.interleave((quads >> 8).to(tl.int8), (quads >> 24).to(tl.int8))
        return tl.interleave(even, odd)


@triton.jit
def sign_matrix(words, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """``[ROWS, WORDS]`` words to their bfloat16 signs ``[ROWS, 32 * WORDS]``, columns in order."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    ones = ((bits << 15) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(ones, (ROWS, 32 * WORDS))


@triton.jit
def count_ones(words):
    """Set bits of each word, int32: in the form that LLVM turns into the machine's population count."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
