"""pack_signs_reference and unpack_signs_reference: the definition that other packers are held to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from littlebit2_kernels.format import (
    WORD_BITS,
    pack_signs_reference,
    unpack_signs_reference,
    words_per_row,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64]

#: Up to three leading dimensions, any of them empty, and rows from no sign to past two words.
shapes = st.tuples(
    st.lists(st.integers(0, 4), max_size=3), st.integers(0, 70) | st.sampled_from([31, 32, 33, 63, 64, 65])
).map(lambda parts: (*parts[0], parts[1]))

sign_arrays = shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.sampled_from([-1, 1])))

real_arrays = shapes.flatmap(
    lambda shape: hnp.arrays(
        np.float32, shape, elements=st.floats(allow_nan=False, width=32), fill=st.just(np.float32(-0.0))
    )
)


@given(sign_arrays)
def test_round_trip(array: np.ndarray) -> None:
    signs = torch.from_numpy(array)
    words = pack_signs_reference(signs)
    assert words.dtype == torch.int32
    assert words.shape == (*signs.shape[:-1], words_per_row(signs.shape[-1]))
    assert torch.equal(unpack_signs_reference(words, signs.shape[-1], torch.int8), signs)


@given(sign_arrays)
def test_words_as_docs_define_them(array: np.ndarray) -> None:
    """Each bit, pad bits included, against docs/format.md section 2 with plain integers."""
    cols = array.shape[-1]
    words = pack_signs_reference(torch.from_numpy(array)).numpy().view(np.uint32)
    for index in np.ndindex(*array.shape[:-1]):
        expected = [0] * math.ceil(cols / WORD_BITS)
        for column, sign in enumerate(array[index]):
            expected[column // WORD_BITS] |= int(sign < 0) << (column % WORD_BITS)
        assert words[index].tolist() == expected


@given(real_arrays)
def test_only_values_below_zero_are_negative(array: np.ndarray) -> None:
    """Zeros of either sign, subnormals and infinities included."""
    values = torch.from_numpy(array)
    signs = unpack_signs_reference(pack_signs_reference(values), values.shape[-1])
    assert torch.equal(signs, torch.where(values < 0, -1.0, 1.0))


@given(sign_arrays.filter(lambda array: array.ndim >= 2 and array.size))
def test_strided_input_packs_like_its_copy(array: np.ndarray) -> None:
    signs = torch.from_numpy(array)
    for view in (
        signs.transpose(0, -1),
        signs[..., ::2],
        signs.flip(0),
        signs[:1].expand(3, *signs.shape[1:]),
    ):
        assert torch.equal(pack_signs_reference(view), pack_signs_reference(view.contiguous()))


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=3),
    st.integers(1, WORD_BITS),
    st.integers(1, 3),
)
def test_any_words_unpack_and_pack_back(row: list[int], tail: int, rows: int) -> None:
    """Every bit pattern is a valid word; packing again clears what lay past the last column."""
    words = torch.tensor([row] * rows, dtype=torch.int32)
    cols = WORD_BITS * (len(row) - 1) + tail
    again = pack_signs_reference(unpack_signs_reference(words, cols))
    kept = torch.full((len(row),), -1, dtype=torch.int64)
    kept[-1] = (1 << tail) - 1
    assert torch.equal(again.long() & 0xFFFFFFFF, words.long() & 0xFFFFFFFF & kept)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_signed_dtypes_in_and_out(dtype: torch.dtype) -> None:
    values = torch.tensor([[3, -1, 0, -2, 1] * 9], dtype=dtype)
    words = pack_signs_reference(values)
    assert torch.equal(words, pack_signs_reference(values.double()))
    signs = unpack_signs_reference(words, 45, dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs, torch.where(values < 0, -1, 1).to(dtype))


def test_unsigned_values_are_all_positive() -> None:
    assert pack_signs_reference(torch.arange(40, dtype=torch.uint8)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_and_negative_zero_are_positive(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, -0.0, -tiny, tiny, -math.inf, math.inf], dtype=dtype)
    assert pack_signs_reference(values).tolist() == [(1 << 2) | (1 << 4)]


def test_bit_31_is_the_sign_bit_of_the_word() -> None:
    values = torch.ones(32)
    values[31] = -1
    assert pack_signs_reference(values).tolist() == [-(2**31)]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 33), (0, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    words = pack_signs_reference(torch.ones(shape))
    assert words.shape == (*shape[:-1], words_per_row(shape[-1]))
    assert unpack_signs_reference(words, shape[-1]).shape == shape


def test_input_is_left_as_it_was() -> None:
    values = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    words = pack_signs_reference(values)
    assert not words.requires_grad
    assert values.tolist() == [1.0, -2.0, 0.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_refused(dtype: torch.dtype) -> None:
    values = torch.ones(2, 40, dtype=dtype)
    values[1, 39] = math.nan
    with pytest.raises(ValueError, match="must not contain NaN"):
        pack_signs_reference(values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1.0, -1.0], TypeError, "values must be a torch.Tensor, got list"),
        (torch.ones(3, dtype=torch.bool), TypeError, "real numeric dtype, got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "real numeric dtype, got torch.complex64"),
        (torch.tensor(1.0), ValueError, "at least one dimension, got a 0-d tensor"),
    ],
    ids=["list", "bool", "complex", "0-d"],
)
def test_pack_refuses(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_signs_reference(values)


@pytest.mark.parametrize(
    ("words", "cols", "error", "message"),
    [
        (np.zeros((2, 1), np.int32), 8, TypeError, "words must be a torch.Tensor, got ndarray"),
        (torch.zeros(2, 1, dtype=torch.int64), 8, TypeError, "words must be int32, got torch.int64"),
        (torch.zeros(2, 1), 8, TypeError, "words must be int32, got torch.float32"),
        (torch.zeros(2, 1, dtype=torch.int32), -1, ValueError, "cols must be >= 0, got -1"),
        (torch.zeros(2, 1, dtype=torch.int32), 33, ValueError, r"ceil\(33 / 32\) = 2, got shape \(2, 1\)"),
        (torch.zeros(2, 2, dtype=torch.int32), 32, ValueError, r"ceil\(32 / 32\) = 1, got shape \(2, 2\)"),
        (torch.tensor(0, dtype=torch.int32), 1, ValueError, r"got shape \(\)"),
    ],
    ids=["numpy", "int64", "float", "negative-cols", "too-few-words", "too-many-words", "0-d"],
)
def test_unpack_refuses(words: object, cols: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        unpack_signs_reference(words, cols)
