"""What results of prepacked layers may not depend on, and how special values pass through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from littlebit2_kernels import PackedLinear, PackedPath, littlebit_linear, prepack
from littlebit2_kernels._native import core
from littlebit2_kernels.dispatch import ACTIVATIONS
from littlebit2_kernels.format import pack_signs_reference
from littlebit2_kernels.testing import make_problem, relative_error
from tests.problems import PREPACKED, describe, random_problem, with_equal_in_scales

MODES = ("exact", "int16", "int8", "sign")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", range(15))
def test_instruction_sets_agree_to_the_bit(
    case: int, mode: str, every_isa: list[str], rng: torch.Generator
) -> None:
    x, packed = random_problem(rng, PREPACKED)
    prepacked = prepack(packed)
    results = []
    for name in every_isa:
        core().set_cpu_isa(name)
        results.append(littlebit_linear(x, prepacked, activation=mode))
    for name, result in zip(every_isa, results, strict=True):
        assert torch.equal(result, results[0]), f"{name} and {every_isa[0]}: {describe(x, packed)}"


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 0.3])
def test_windows_at_the_limit_of_16_bits(spread: float, every_isa: list[str], rng: torch.Generator) -> None:
    """Rows whose signs are those of x, or their opposites, make sums as large as int16 entries allow."""
    cols = 720
    x = torch.exp(spread * torch.randn(4, cols, generator=rng)) * torch.randn(4, cols, generator=rng).sign()
    x[1] = -x[0].abs()
    signs = torch.cat([x, -x, torch.randn(40, cols, generator=rng)])
    path = PackedPath(pack_signs_reference(signs), torch.ones(cols), torch.ones(len(signs)))
    packed = PackedLinear((path,))
    results = []
    for name in every_isa:
        core().set_cpu_isa(name)
        results.append(littlebit_linear(x, prepack(packed), activation="int16"))
    expected = x.double() @ torch.where(signs < 0, -1.0, 1.0).double().T
    assert relative_error(results[0], expected) < 5e-4
    for name, result in zip(every_isa, results, strict=True):
        assert torch.equal(result, results[0]), f"{name} and {every_isa[0]} differ"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [[72, 16], [1000], None], ids=str)
def test_result_does_not_depend_on_the_batch(
    ranks: list[int] | None, mode: str, isa: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(139, 1500, 130, ranks, bias=True, generator=rng)
    prepacked = prepack(packed)
    together = littlebit_linear(x, prepacked, activation=mode)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 17, 33, 127, 128, 129):
        y = littlebit_linear(x[:tokens], prepacked, activation=mode)
        assert torch.equal(y, together[:tokens]), f"{tokens} tokens"
    for row in (0, 6, 7, 8, 127, 128, 138):
        alone = littlebit_linear(x[row : row + 1], prepacked, activation=mode)
        assert torch.equal(alone, together[row : row + 1]), f"row {row}"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [[256, 64], None], ids=str)
@pytest.mark.parametrize("tokens", [1, 130])
def test_result_does_not_depend_on_threads_or_repetition(
    tokens: int, ranks: list[int] | None, mode: str, isa: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(tokens, 2200, 1500, ranks, generator=rng)
    prepacked = prepack(packed)
    results = []
    for count in (1, 2, 3, 3, 8):
        torch.set_num_threads(count)
        results.append(littlebit_linear(x, prepacked, activation=mode))
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.usefixtures("threads")
def test_prepacking_does_not_depend_on_threads(rng: torch.Generator) -> None:
    _, packed = make_problem(1, 3000, 1500, [256, 64], generator=rng)
    layers = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        layers.append(prepack(packed).layer)
    assert torch.equal(layers[0], layers[1])
    assert torch.equal(layers[0], layers[2])


@pytest.mark.parametrize("mode", MODES)
def test_sharing_and_stacking_change_no_bit(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(4, 1500, 90, [40, 40], share_v=True, generator=rng)
    first, second = packed.paths
    copied = PackedPath(
        second.v.clone(), second.in_scale.clone(), second.out_scale, second.u, second.latent_scale
    )
    shared, stacked = prepack(packed), prepack(PackedLinear((first, copied)))
    assert shared.nbytes < stacked.nbytes
    assert (shared.shape.shares, stacked.shape.shares) == ((0, 0), (0, 1))
    y = littlebit_linear(x, shared, activation=mode)
    assert torch.equal(littlebit_linear(x, stacked, activation=mode), y)


@pytest.mark.parametrize("mode", MODES)
def test_stacking_changes_no_bit(mode: str, isa: str, rng: torch.Generator) -> None:
    """The scale of a channel that is zero keeps the in_scale of paths apart, and changes no sum."""
    x, packed = make_problem(4, 1500, 90, [40, 72, 24], generator=rng)
    x[:, 7] = 0
    stacked = with_equal_in_scales(packed)
    paths = [stacked.paths[0]]
    for index, path in enumerate(stacked.paths[1:]):
        in_scale = path.in_scale.clone()
        in_scale[7] = index + 5
        paths.append(PackedPath(path.v, in_scale, path.out_scale, path.u, path.latent_scale))
    apart = prepack(PackedLinear(tuple(paths)))
    together = prepack(stacked)
    assert together.nbytes < apart.nbytes
    assert torch.equal(
        littlebit_linear(x, together, activation=mode), littlebit_linear(x, apart, activation=mode)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scales(mode: str, dtype: torch.dtype, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(5, 800, 70, [32], dtype=dtype, generator=rng)
    path = packed.paths[0]
    assert path.latent_scale is not None
    # Powers of two: the products stay exact. The latents of sign are counts, and do not fall with in_scale.
    factor = 2.0**30 if mode == "sign" else 2.0**60
    scaled = PackedLinear(
        (
            PackedPath(
                path.v,
                path.in_scale / factor,
                path.out_scale / factor,
                path.u,
                path.latent_scale * factor * factor,
            ),
        )
    )
    expected = littlebit_linear(x, prepack(packed), activation=mode)
    assert torch.equal(littlebit_linear(x, prepack(scaled), activation=mode), expected)


@pytest.mark.parametrize("mode", ["int16", "int8"])
@pytest.mark.parametrize("exponent", [-100, -109, -115, -126, -140])
def test_tiny_operands_lose_precision_and_nothing_else(
    exponent: int, mode: str, isa: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(5, 300, 70, None, generator=rng)
    tiny = PackedLinear((PackedPath(packed.paths[0].v, packed.paths[0].in_scale, torch.ones(70)),))
    x = x * 2.0**exponent
    y = littlebit_linear(x, prepack(tiny), activation=mode)
    exact = littlebit_linear(x, prepack(tiny), activation="exact")
    assert torch.isfinite(y).all()
    # Half a unit in every entry; the unit of a chunk falls with its values down to that of a bound of 2^-110.
    largest = max(float(x.abs().max() * tiny.paths[0].in_scale.abs().max()) * 30, 2.0**-110)
    unit = largest / (32760 if mode == "int16" else 127)
    assert float((y - exact).abs().max()) <= 300 * unit


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_special_values_stay_in_their_token(
    dtype: torch.dtype, special: float, mode: str, isa: str, rng: torch.Generator
) -> None:
    for column in (0, 14, 720, 1299):
        x, packed = make_problem(11, 1300, 40, [24], dtype=dtype, generator=rng)
        prepacked = prepack(packed)
        spoilt = x.clone()
        spoilt[3, column] = special
        y = littlebit_linear(spoilt, prepacked, activation=mode)
        clean = littlebit_linear(x, prepacked, activation=mode)
        assert not torch.isfinite(y[3]).any()
        others = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("mode", ["exact", "int16", "int8"])
def test_special_values_pass_a_single_stage(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(3, 1300, 40, None, generator=rng)
    x[1, 800] = float("nan")
    finite = torch.isfinite(littlebit_linear(x, prepack(packed), activation=mode))
    assert finite.all(dim=1).tolist() == [True, False, True]
    assert not finite[1].any()


@pytest.mark.parametrize("mode", ["int16", "int8"])
def test_operands_whose_bound_overflows_are_not_taken_for_finite(mode: str, isa: str) -> None:
    packed = PackedLinear(
        (PackedPath(torch.zeros(40, 4, dtype=torch.int32), torch.ones(100), torch.ones(40)),)
    )
    x = torch.full((2, 100), 3e38)
    x[0] = 1.0
    y = littlebit_linear(x, prepack(packed), activation=mode)
    assert torch.allclose(y[0], torch.tensor(100.0), rtol=1e-3)
    assert not torch.isfinite(y[1]).any()


def test_exact_sums_overflow_like_float(isa: str) -> None:
    packed = PackedLinear(
        (PackedPath(torch.zeros(2, 1, dtype=torch.int32), torch.ones(4), torch.tensor([1.0, -1e6])),)
    )
    y = littlebit_linear(torch.ones(1, 4, dtype=torch.float16), prepack(packed), activation="exact")
    assert y.tolist() == [[4.0, -float("inf")]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [None, [40], [24, 8]], ids=str)
def test_zeros_give_the_bias(ranks: list[int] | None, mode: str, isa: str, rng: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _, packed = make_problem(1, 800, 70, ranks, bias=True, generator=rng)
        assert packed.bias is not None
        for zero in (0.0, -0.0):
            x = torch.full((4, 800), zero, dtype=dtype)
            y = littlebit_linear(x, prepack(packed), activation=mode)
            assert torch.equal(y, packed.bias.to(dtype).expand(4, 70))
            bare = littlebit_linear(x, prepack(PackedLinear(packed.paths)), activation=mode)
            assert not bare.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_and_rounded_exactly(isa: str, dtype: torch.dtype) -> None:
    """A layer that is the identity on one channel must give back all 2^16 bit patterns."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(-1, 1)
    packed = PackedLinear(
        (PackedPath(v=torch.zeros(1, 1, dtype=torch.int32), in_scale=torch.ones(1), out_scale=torch.ones(1)),)
    )
    y = littlebit_linear(values, prepack(packed), activation="exact")
    assert torch.equal(y.isnan(), values.isnan())
    assert torch.equal(y[~y.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_is_rounded_to_nearest_even(isa: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=rng, dtype=torch.int64).to(torch.int32)
    ties = (bits & -8192) | torch.randint(0, 2, bits.shape, generator=rng, dtype=torch.int32) << 12
    wanted = torch.cat([bits, ties]).view(torch.float32)
    wanted = wanted[torch.isfinite(wanted)]
    ones = torch.zeros(wanted.numel(), 1, dtype=torch.int32)
    packed = PackedLinear((PackedPath(v=ones, in_scale=torch.ones(1), out_scale=wanted),))
    y = littlebit_linear(torch.ones(1, 1, dtype=dtype), prepack(packed), activation="exact")
    assert torch.equal(y[0], wanted.to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [1, 2, 4, 13, 32])
def test_a_layer_at_any_address(offset: int, mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(9, 1300, 150, [72, 16], bias=True, generator=rng)
    prepacked = prepack(packed)
    layer = prepacked.layer
    moved = torch.zeros(layer.numel() + 64, dtype=torch.uint8)[offset : offset + layer.numel()]
    moved.copy_(layer)
    arguments = (packed.bias, 150, ACTIVATIONS[mode])
    expected = torch.ops.littlebit2.linear_prepacked(x, layer, *arguments)
    assert torch.equal(torch.ops.littlebit2.linear_prepacked(x, moved, *arguments), expected)
    for one, other in zip(
        torch.ops.littlebit2.unprepack(moved), torch.ops.littlebit2.unprepack(layer), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_input_and_bias_at_any_address(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(9, 1300, 150, [72], bias=True, generator=rng)
    assert packed.bias is not None
    expected = littlebit_linear(x, prepack(packed), activation=mode)
    for offset in (1, 3):
        moved = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].reshape(x.shape)
        bias = torch.cat([x.new_zeros(offset), packed.bias])[offset:]
        prepacked = prepack(PackedLinear(packed.paths, bias))
        assert torch.equal(littlebit_linear(moved, prepacked, activation=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_expanded_and_strided_input(mode: str, isa: str, rng: torch.Generator) -> None:
    x, packed = make_problem(4, 800, 50, [40], generator=rng)
    prepacked = prepack(packed)
    expected = littlebit_linear(x, prepacked, activation=mode)
    one = littlebit_linear(x[:1].expand(5, 800), prepacked, activation=mode)
    assert torch.equal(one, expected[:1].expand(5, 50))
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(littlebit_linear(strided, prepacked, activation=mode), expected)
    flipped = littlebit_linear(x.flip(0).T.contiguous().T, prepacked, activation=mode)
    assert torch.equal(flipped, expected.flip(0))
    view = x.reshape(2, 2, 800).transpose(0, 1)
    assert torch.equal(
        littlebit_linear(view, prepacked, activation=mode), expected.reshape(2, 2, 50).transpose(0, 1)
    )
