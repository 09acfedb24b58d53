"""``prepack`` and back: every sign and every scale, in its place and to the bit."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import PackedLinear, PackedPath, littlebit_linear, prepack
from littlebit2_kernels.dispatch import ACTIVATIONS
from littlebit2_kernels.format import pack_signs_reference, words_per_row
from littlebit2_kernels.testing import make_packed, make_problem
from tests.problems import PREPACKED, describe, random_problem, with_equal_in_scales

MODES = ("exact", "int16", "int8", "sign")


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_same_layer(got: PackedLinear, packed: PackedLinear) -> None:
    assert got.shape == packed.shape
    for one, other in zip(got.paths, packed.paths, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        for name, tensor in one.tensors().items():
            assert tensor.is_contiguous()
            assert tensor.dtype == other.tensors()[name].dtype
            assert same_bits(tensor, other.tensors()[name].contiguous()), name
    assert got.bias is packed.bias


@pytest.mark.parametrize("case", range(120))
def test_random_layers(case: int, rng: torch.Generator) -> None:
    x, packed = random_problem(rng, dataclasses.replace(PREPACKED, tokens=(1,)))
    prepacked = prepack(packed)
    assert (prepacked.in_features, prepacked.out_features) == (packed.in_features, packed.out_features)
    assert prepacked.shape == packed.shape
    unpacked = prepacked.unpack()
    assert_same_layer(unpacked, packed)
    assert torch.equal(prepack(unpacked).layer, prepacked.layer), describe(x, packed)


@pytest.mark.parametrize("cols", sorted({*PREPACKED.cols, *range(1, 100), 735, 750, 1439, 2159, 2160, 3000}))
def test_every_number_of_columns(cols: int, rng: torch.Generator) -> None:
    packed = make_packed(cols, 33, None, generator=rng)
    assert_same_layer(prepack(packed).unpack(), packed)


@pytest.mark.parametrize("rows", sorted({*PREPACKED.rows, *range(1, 70), 383, 384, 385, 1000}))
def test_every_number_of_rows(rows: int, rng: torch.Generator) -> None:
    packed = make_packed(40, rows, None, generator=rng)
    assert_same_layer(prepack(packed).unpack(), packed)


@pytest.mark.parametrize("ranks", [[8, 16, 24], [128, 8, 136], [32, 32, 32]], ids=str)
def test_stacked_first_stages(ranks: list[int], rng: torch.Generator) -> None:
    packed = with_equal_in_scales(make_packed(800, 60, ranks, bias=True, generator=rng))
    assert_same_layer(prepack(packed).unpack(), packed)


def test_sixteen_paths(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 100, 60, [8 * (p + 1) for p in range(16)], generator=rng)
    for layer in (packed, with_equal_in_scales(packed)):
        assert_same_layer(prepack(layer).unpack(), layer)
    exact = littlebit_linear(x, prepack(packed), activation="exact")
    assert torch.allclose(exact, littlebit_linear(x, packed, "cpu"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cols", [31, 720, 1500])
def test_every_bit_position(cols: int, isa: str) -> None:
    """One -1 in every row, in every column once: the layout keeps it, the kernels read it."""
    signs = 1 - 2 * torch.eye(cols)
    packed = PackedLinear((PackedPath(pack_signs_reference(signs), torch.ones(cols), torch.ones(cols)),))
    assert_same_layer(prepack(packed).unpack(), packed)
    values = torch.arange(1.0, cols + 1) % 97  # integers whose sums are exact
    y = littlebit_linear(values, prepack(packed), activation="exact")
    assert torch.equal(y, values.sum() - 2 * values)


@pytest.mark.parametrize("cols", [15, 100, 721, 1441])
def test_every_single_bit_changes_the_layer(cols: int) -> None:
    words = torch.zeros(33, words_per_row(cols), dtype=torch.int32)
    arguments: tuple[Any, ...] = (None, [torch.ones(cols)], None, [torch.ones(33)])
    empty = torch.ops.littlebit2.prepack([words], *arguments)
    places = set()
    for row in (0, 15, 16, 31, 32):
        for column in range(cols):
            one = words.clone()
            bit = 1 << column % 32
            one[row, column // 32] = bit - 2**32 if bit == 2**31 else bit
            changed = torch.ops.littlebit2.prepack([one], *arguments) ^ empty
            index = int(changed.nonzero().squeeze())
            places.add((index, int(changed[index])))
    assert len(places) == 5 * cols
    assert all(value & (value - 1) == 0 for _, value in places)


def raw_operands(draw: random.Random, cols: int, rows: int, rank: int) -> list[list[torch.Tensor]]:
    def bits(*shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    return [
        [bits(rank, words_per_row(cols))],
        [bits(rows, words_per_row(rank))],
        [bits(cols).view(torch.float32)],
        [bits(rank).view(torch.float32)],
        [bits(rows).view(torch.float32)],
    ]


def without_pad_bits(words: torch.Tensor, cols: int) -> torch.Tensor:
    words = words.clone()
    if cols % 32:
        words[:, -1] &= (1 << cols % 32) - 1
    return words


@pytest.mark.parametrize("case", range(40))
def test_any_bits_are_kept_but_for_padding(case: int) -> None:
    """Scales of all bit patterns, NaN with their payloads and -0.0 among them; pad bits become 0."""
    draw = random.Random(case)
    cols, rows, rank = draw.choice(PREPACKED.cols), draw.choice(PREPACKED.rows), 8 * draw.randint(1, 40)
    v, u, in_scale, latent_scale, out_scale = raw_operands(draw, cols, rows, rank)
    in_scale[0][0] = -0.0
    got = torch.ops.littlebit2.unprepack(
        torch.ops.littlebit2.prepack(v, u, in_scale, latent_scale, out_scale)
    )
    assert torch.equal(got[0], without_pad_bits(v[0], cols))
    assert torch.equal(got[1], without_pad_bits(u[0], rank))
    for one, other in zip(got[2:], (in_scale[0], latent_scale[0], out_scale[0]), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_pad_bits_change_no_result(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(5, 725, 50, [40], generator=rng)
    v, u, *scales = packed.operands
    dirty = [
        torch.where(torch.arange(t.shape[1]) == t.shape[1] - 1, t | -(1 << c % 32), t)
        for t, c in ((v[0], 725), (u[0], 40))
    ]
    layer = torch.ops.littlebit2.prepack([dirty[0]], [dirty[1]], *scales)
    assert torch.equal(layer, prepack(packed).layer)
    y = torch.ops.littlebit2.linear_prepacked(x, layer, None, 50, ACTIVATIONS[mode])
    assert torch.equal(y, littlebit_linear(x, prepack(packed), activation=mode))


def test_nan_scales_of_two_paths_are_told_apart() -> None:
    """in_scale is compared by its bits: equal NaN are equal, 0.0 and -0.0 are not."""
    draw = random.Random(0)
    operands = [raw_operands(draw, 100, 40, 16) for _ in range(2)]
    for other in (float("nan"), -0.0):
        first, second = operands[0][2][0].clone(), operands[0][2][0].clone()
        first[5], second[5] = 0.0, other
        lists = [[a[0], b[0]] for a, b in zip(*operands, strict=True)]
        lists[2] = [first, second]
        got = torch.ops.littlebit2.unprepack(torch.ops.littlebit2.prepack(*lists))
        assert same_bits(got[2], first)
        assert same_bits(got[7], second)


def test_pitched_and_shaped_operands(rng: torch.Generator) -> None:
    """Rows of words may be apart, scales may be [1, size] as checkpoints store them."""
    packed = make_packed(800, 50, [40], generator=rng)
    v, u, in_scale, latent_scale, out_scale = (operand[0] for operand in packed.operands)
    pitched = [torch.nn.functional.pad(words, (0, 3), value=-1)[:, : words.shape[1]] for words in (v, u)]
    assert pitched[0].stride() == (words_per_row(800) + 3, 1)
    layer = torch.ops.littlebit2.prepack(
        [pitched[0]], [pitched[1]], [in_scale[None]], [latent_scale[None]], [out_scale[None]]
    )
    assert torch.equal(layer, prepack(packed).layer)
    odd = torch.cat([in_scale.new_zeros(1), in_scale])[1:]
    layer = torch.ops.littlebit2.prepack([v], [u], [odd], [latent_scale], [out_scale])
    assert torch.equal(layer, prepack(packed).layer)


def test_prepacked_layers_are_little_larger_than_packed_ones(rng: torch.Generator) -> None:
    packed = make_packed(4096, 4096, [512, 512], bias=True, generator=rng)
    prepacked = prepack(packed)
    assert prepacked.nbytes == prepacked.layer.numel() + 4 * 4096
    assert prepacked.nbytes <= 1.1 * packed.nbytes
    assert prepacked.device == torch.device("cpu")


def test_the_packed_layer_is_not_needed_afterwards(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 300, 60, [40], bias=True, generator=rng)
    prepacked = prepack(packed)
    expected = littlebit_linear(x, prepacked)
    for tensor in packed.unique_tensors():
        if tensor is not packed.bias:
            tensor.zero_()
    assert torch.equal(littlebit_linear(x, prepacked), expected)
    # And what unpack() returns is nobody else's.
    prepacked.unpack().paths[0].v.fill_(0)
    assert torch.equal(littlebit_linear(x, prepacked), expected)
