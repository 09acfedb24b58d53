"""The unpacking of signs alone, against the format's own."""

from __future__ import annotations

import pytest
import torch

from littlebit2_kernels.format import pack_signs_reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from littlebit2_kernels.triton.unpack import count_ones, sign_matrix, sign_operand  # noqa: E402


@triton.jit
def steps_kernel(words, out, STEP: tl.constexpr, PER_WORD: tl.constexpr):
    place = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    signs = sign_operand(tl.load(words + place).to(tl.uint32, bitcast=True), STEP, PER_WORD)
    cols = tl.arange(0, 8 * PER_WORD)
    tl.store(out + tl.arange(0, 16)[:, None] * (8 * PER_WORD) + cols[None, :], signs.to(tl.float32))


@triton.jit
def matrix_kernel(words, out):
    place = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    signs = sign_matrix(tl.load(words + place).to(tl.uint32, bitcast=True), 8, 16)
    tl.store(out + tl.arange(0, 16)[:, None] * 256 + tl.arange(0, 256)[None, :], signs.to(tl.float32))


@triton.jit
def count_kernel(words, out):
    place = tl.arange(0, 64)
    tl.store(out + place, count_ones(tl.load(words + place).to(tl.uint32, bitcast=True)))


@pytest.mark.parametrize("per_word", [2, 4])
def test_steps_make_the_signs_in_the_documented_order(
    device: torch.device, rng: torch.Generator, per_word: int
) -> None:
    values = torch.randn(16, 256, generator=rng)
    words = pack_signs_reference(values).to(device)
    signs = torch.where(values < 0, -1.0, 1.0).reshape(16, 8, per_word, 32 // per_word)
    for step in range(32 // per_word):
        out = torch.zeros(16, 8 * per_word, device=device)
        steps_kernel[(1,)](words, out, step, per_word)
        assert torch.equal(out.cpu().reshape(16, 8, per_word), signs[..., step])


def test_matrix_has_its_columns_in_order(device: torch.device, rng: torch.Generator) -> None:
    values = torch.randn(16, 256, generator=rng)
    out = torch.zeros(16, 256, device=device)
    matrix_kernel[(1,)](pack_signs_reference(values).to(device), out)
    assert torch.equal(out.cpu(), torch.where(values < 0, -1.0, 1.0))


def test_population_count(device: torch.device, rng: torch.Generator) -> None:
    words = torch.randint(-(2**31), 2**31, (64,), generator=rng).to(torch.int32)
    words[:3] = torch.tensor([0, -1, -(2**31)], dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32, device=device)
    count_kernel[(1,)](words.to(device), out)
    assert out.tolist() == [(word & 0xFFFFFFFF).bit_count() for word in words.tolist()]
