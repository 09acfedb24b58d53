"""The native packer against the definition in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from littlebit2_kernels import pack_signs, unpack_signs
from littlebit2_kernels.format import pack_signs_reference, unpack_signs_reference

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 140),
    dtype=st.sampled_from((*FLOATS, torch.int8, torch.int64)),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_native_packer_is_the_reference(
    rows: int, cols: int, dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-2, 3, (cols, rows) if transposed else (rows, cols), generator=generator).to(dtype)
    values = values.T if transposed else values
    words = pack_signs(values, backend="native")
    assert torch.equal(words, pack_signs_reference(values))
    for out in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        dense = unpack_signs(words, cols, out, backend="native")
        assert dense.dtype == out
        assert torch.equal(dense, unpack_signs_reference(words, cols, out))
        assert torch.equal(dense.double(), torch.where(values < 0, -1.0, 1.0).double())


def test_leading_dimensions(rng: torch.Generator) -> None:
    values = torch.randn(3, 4, 50, generator=rng)
    words = pack_signs(values, backend="native")
    assert words.shape == (3, 4, 2)
    assert torch.equal(words, pack_signs_reference(values))
    assert torch.equal(unpack_signs(words, 50), unpack_signs_reference(words, 50))


def test_one_dimension(rng: torch.Generator) -> None:
    values = torch.randn(77, generator=rng)
    words = pack_signs(values)
    assert words.shape == (3,)
    assert torch.equal(unpack_signs(words, 77), torch.where(values < 0, -1.0, 1.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
def test_numpy_arrays_stay_numpy(dtype: type[np.number]) -> None:
    values = np.random.default_rng(0).integers(-3, 4, (6, 45)).astype(dtype)
    words = pack_signs(values)
    assert isinstance(words, np.ndarray)
    assert words.dtype == np.int32
    dense = unpack_signs(words, 45, np.float16)
    assert isinstance(dense, np.ndarray)
    assert dense.dtype == np.float16
    np.testing.assert_array_equal(dense, np.where(values < 0, -1, 1))


def test_numpy_views_with_negative_strides() -> None:
    values = np.random.default_rng(1).standard_normal((5, 40))[::-1, ::-1]
    np.testing.assert_array_equal(unpack_signs(pack_signs(values), 40), np.where(values < 0, -1, 1))


def test_read_only_arrays_are_read(recwarn: pytest.WarningsRecorder) -> None:
    values = np.frombuffer(np.random.default_rng(2).standard_normal(40).tobytes())
    np.testing.assert_array_equal(unpack_signs(pack_signs(values), 40), np.where(values < 0, -1, 1))
    assert not recwarn.list


def test_arrays_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="values must have at least one dimension, got a 0-d array"):
        pack_signs(np.array(1.0))
    with pytest.raises(TypeError, match="values must have a real numeric dtype, got <U1"):
        pack_signs(np.array(["a"]))


def test_words_of_strided_rows(rng: torch.Generator) -> None:
    words = pack_signs(torch.randn(8, 64, generator=rng))[::2]
    assert torch.equal(unpack_signs(words, 64, backend="native"), unpack_signs_reference(words, 64))


def test_unserved_requests_are_refused() -> None:
    words = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"backend must be 'auto', 'native' or 'reference', got 'gpu'"):
        pack_signs(torch.ones(2, 3), backend="gpu")
    with pytest.raises(TypeError, match=r"dtype must be one of .* for the native backend, got torch.float64"):
        unpack_signs(words, 3, torch.float64, backend="native")
    with pytest.raises(ValueError, match="packs CPU data only, got a tensor on meta"):
        pack_signs(torch.ones(2, 3, device="meta", dtype=torch.int8), backend="native")
    with pytest.raises(ValueError, match="NaN"):
        pack_signs(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor, got list"):
        pack_signs([1.0, -1.0])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"words.size\(-1\) must equal"):
        unpack_signs(words, 33)


def test_other_dtypes_take_the_reference() -> None:
    values = torch.tensor([[1.0, -1.0, 0.0]])
    assert unpack_signs(pack_signs(values), 3, torch.float64).tolist() == [[1.0, -1.0, 1.0]]
