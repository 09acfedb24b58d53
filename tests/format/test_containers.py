"""PackedPath and PackedLinear: every check on construction, sharing, moving, copying."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

from littlebit2_kernels.format import PackedLinear, PackedPath, words_per_row
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_packed

K, N, R = 70, 45, 24

Fields = dict[str, torch.Tensor | None]


@pytest.fixture
def fields(rng: torch.Generator) -> Fields:
    """The tensors of one valid two-stage path of K=70, N=45, R=24 (pad bits in both matrices)."""
    return dict(make_packed(K, N, [R], generator=rng).paths[0].tensors())


@pytest.fixture
def single(rng: torch.Generator) -> Fields:
    """The tensors of one valid single-stage path."""
    return dict(make_packed(K, N, None, generator=rng).paths[0].tensors())


def pitched(words: torch.Tensor, pitch: int, fill: int = -1) -> torch.Tensor:
    """The same matrix with rows ``pitch`` words apart and ``fill`` in the gaps."""
    wide = torch.full((words.shape[0], pitch), fill, dtype=torch.int32)
    wide[:, : words.shape[1]] = words
    return wide[:, : words.shape[1]]


def test_valid_path(fields: Fields) -> None:
    path = PackedPath(**fields)
    assert (path.in_features, path.out_features, path.rank, path.single_stage) == (K, N, R, False)
    assert list(path.tensors()) == ["v", "in_scale", "u", "latent_scale", "out_scale"]


def test_valid_single_stage_path(single: Fields) -> None:
    path = PackedPath(**single)
    assert (path.in_features, path.out_features, path.rank, path.single_stage) == (K, N, N, True)
    assert list(path.tensors()) == ["v", "in_scale", "out_scale"]


def test_path_is_frozen(fields: Fields) -> None:
    path = PackedPath(**fields)
    with pytest.raises(AttributeError):
        path.v = path.u


# --- PackedPath: one case per check ------------------------------------------------------------------

MATRICES = ("v", "u")
SCALES = ("in_scale", "latent_scale", "out_scale")


@pytest.mark.parametrize("name", MATRICES + SCALES)
def test_not_a_tensor(fields: Fields, name: str) -> None:
    fields[name] = [1.0, 2.0]
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        PackedPath(**fields)


@pytest.mark.parametrize("name", ["v", "in_scale", "out_scale"])
def test_required_tensor_is_none(fields: Fields, name: str) -> None:
    fields[name] = None
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got NoneType"):
        PackedPath(**fields)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_words_of_another_dtype(fields: Fields, name: str, dtype: torch.dtype) -> None:
    fields[name] = fields[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} must be int32 words, got {dtype}"):
        PackedPath(**fields)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_scale_of_another_dtype(fields: Fields, name: str, dtype: torch.dtype) -> None:
    fields[name] = fields[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} must be float32, got {dtype}"):
        PackedPath(**fields)


@pytest.mark.parametrize("name", ["u", "in_scale", "latent_scale", "out_scale"])
def test_device_differs_from_v(fields: Fields, name: str) -> None:
    fields[name] = fields[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on cpu like v, got meta"):
        PackedPath(**fields)


SHAPES = {
    "v-truncated": ("v", lambda t: t[:, :-1], r"v must have shape \[rows, 3\] \(70 signs.*got \[24, 2\]"),
    "v-too-wide": ("v", lambda t: t.repeat(1, 2), r"v must have shape \[rows, 3\].*got \[24, 6\]"),
    "v-1d": ("v", lambda t: t[0], r"v must have shape \[rows, 3\].*got \[3\]"),
    "v-3d": ("v", lambda t: t[None], r"v must have shape \[rows, 3\].*got \[1, 24, 3\]"),
    "u-short": ("u", lambda t: t[:-1], r"u must have shape \[45, 1\] \(24 signs.*got \[44, 1\]"),
    "u-no-words": ("u", lambda t: t[:, :0], r"u must have shape \[45, 1\].*got \[45, 0\]"),
    "u-1d": ("u", lambda t: t.flatten(), r"u must have shape \[45, 1\].*got \[45\]"),
    "latent-short": ("latent_scale", lambda t: t[:-1], r"latent_scale must have shape \[24\], got \[23\]"),
    "latent-2d": ("latent_scale", lambda t: t[None], r"latent_scale must have shape \[24\], got \[1, 24\]"),
    "in-2d": ("in_scale", lambda t: t[None], r"in_scale must be one-dimensional, got shape \[1, 70\]"),
    "in-short": ("in_scale", lambda t: t[:64], r"v must have shape \[rows, 2\] \(64 signs.*got \[24, 3\]"),
    "in-empty": ("in_scale", lambda t: t[:0], r"in_features .* must be between 1 and 2147483647, got 0"),
    "out-0d": ("out_scale", lambda t: t[0], r"out_scale must be one-dimensional, got shape \[\]"),
    "out-short": ("out_scale", lambda t: t[:-1], r"u must have shape \[44, 1\].*got \[45, 1\]"),
    "out-empty": ("out_scale", lambda t: t[:0], r"out_features .* must be between 1 and 2147483647, got 0"),
}


@pytest.mark.parametrize(("name", "change", "message"), SHAPES.values(), ids=SHAPES)
def test_shape(
    fields: Fields, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    fields[name] = change(fields[name])
    with pytest.raises(ValueError, match=message):
        PackedPath(**fields)


@pytest.mark.parametrize("rank", [0, 4, 12, 20, 23])
def test_rank_is_a_multiple_of_8(fields: Fields, rank: int) -> None:
    fields["v"] = fields["v"][:rank]
    with pytest.raises(ValueError, match=rf"rank \(v.size\(0\)\) must be .* multiple of 8, got {rank}"):
        PackedPath(**fields)


def test_rank_that_u_does_not_have(fields: Fields) -> None:
    """Ranks 24 and 40 differ in words; u packed for one is refused for the other."""
    fields["v"] = torch.cat([fields["v"], fields["v"][:16]])
    with pytest.raises(ValueError, match=r"u must have shape \[45, 2\] \(40 signs per row.*got \[45, 1\]"):
        PackedPath(**fields)


def test_u_packed_for_a_higher_rank_shows_in_its_pad_bits(fields: Fields) -> None:
    """Ranks 24 and 32 take the same words: only set bits past column 24 tell them apart."""
    fields["u"] = fields["u"] | (1 << 24)
    with pytest.raises(ValueError, match="u has non-zero pad bits past column 24"):
        PackedPath(**fields)


def test_single_stage_rows_are_out_features(single: Fields) -> None:
    single["v"] = single["v"][:-1]
    with pytest.raises(ValueError, match=r"v must have shape \[45, 3\].*got \[44, 3\]"):
        PackedPath(**single)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("bit", [31, "first"])
def test_dirty_pad_bits(fields: Fields, name: str, bit: int | str) -> None:
    cols = K if name == "v" else R
    words = fields[name].clone()
    words[7, -1] |= -(2**31) if bit == 31 else 1 << (cols % 32)
    fields[name] = words
    with pytest.raises(
        ValueError, match=rf"{name} has non-zero pad bits past column {cols} \(first in row 7\)"
    ):
        PackedPath(**fields)


def test_no_pad_bits_where_rows_are_full(rng: torch.Generator) -> None:
    words = torch.full((64, 2), -1, dtype=torch.int32)
    path = PackedPath(
        v=words, in_scale=torch.ones(64), out_scale=torch.ones(64), u=words, latent_scale=torch.ones(64)
    )
    assert torch.equal(dense_weight(path), torch.full((64, 64), 64.0, dtype=torch.float64))


def test_columns_of_words_apart(rng: torch.Generator) -> None:
    """Word-major storage of the right shape is refused: rows must be contiguous."""
    fields = dict(make_packed(K, N, [40], generator=rng).paths[0].tensors())
    for name in MATRICES:
        column_major = fields[name].t().contiguous().t()
        with pytest.raises(ValueError, match=rf"{name} must have contiguous rows \(stride 1\), got strides"):
            PackedPath(**{**fields, name: column_major})


@pytest.mark.parametrize("name", SCALES)
def test_scale_with_a_stride(fields: Fields, name: str) -> None:
    fields[name] = fields[name].repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=rf"{name} must be contiguous, got strides \(2,\)"):
        PackedPath(**fields)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scale_not_finite(fields: Fields, name: str, value: float) -> None:
    fields[name] = fields[name].clone()
    fields[name][3] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got {value} at index 3"):
        PackedPath(**fields)


@pytest.mark.parametrize(("missing", "given"), [("u", "latent_scale"), ("latent_scale", "u")])
def test_half_a_second_stage(fields: Fields, missing: str, given: str) -> None:
    fields[missing] = None
    with pytest.raises(ValueError, match=f"{missing} must be given together with {given}, got None"):
        PackedPath(**fields)


def test_zero_and_negative_scales_are_fine(fields: Fields) -> None:
    fields["latent_scale"] = torch.zeros(R)
    fields["out_scale"] = -fields["out_scale"]
    assert not dense_weight(PackedPath(**fields)).any()


# --- PackedPath: storage that is accepted --------------------------------------------------------------


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_pitched_rows(fields: Fields, extra: int, rng: torch.Generator) -> None:
    """Rows may lie apart; what is between them (here: all ones) is neither checked nor read."""
    x = torch.randn(3, K, generator=rng)
    dense = PackedLinear((PackedPath(**fields),))
    for name in MATRICES:
        fields[name] = pitched(fields[name], fields[name].shape[1] + extra)
        assert fields[name].stride(0) == fields[name].shape[1] + extra
    apart = PackedLinear((PackedPath(**fields),))
    assert torch.equal(linear_reference(x, apart), linear_reference(x, dense))


def test_meta_tensors_are_checked_but_not_read(fields: Fields) -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in fields.items()}
    assert PackedPath(**on_meta).rank == R
    with pytest.raises(ValueError, match=r"latent_scale must have shape \[24\], got \[8\]"):
        PackedPath(**{**on_meta, "latent_scale": torch.ones(8, device="meta")})


def test_fake_tensors_are_checked_but_not_read(fields: Fields) -> None:
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(tensor) for name, tensor in fields.items()}
    assert PackedPath(**fake).rank == R


# --- PackedLinear --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "share_v", "bias"),
    [([R], False, False), ([8, 40, 16], False, True), ([R, R], True, True), (None, False, True)],
    ids=["one-path", "three-ranks", "shared-v", "single-stage"],
)
def test_valid_layer(ranks: list[int] | None, share_v: bool, bias: bool, rng: torch.Generator) -> None:
    layer = make_packed(K, N, ranks, bias=bias, share_v=share_v, generator=rng)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.ranks == (None if ranks is None else tuple(ranks))
    assert layer.shape.rows == tuple(ranks or [N])
    assert layer.single_stage == (ranks is None)
    assert layer.device == torch.device("cpu")
    v, u, in_scale, latent_scale, out_scale = layer.operands
    assert len(v) == len(in_scale) == len(out_scale) == len(layer.paths)
    if ranks is None:
        assert u is None
        assert latent_scale is None
    else:
        assert len(u) == len(latent_scale) == len(layer.paths)


def test_operands_are_the_tensors_themselves(rng: torch.Generator) -> None:
    layer = make_packed(K, N, [8, 16], generator=rng)
    for i, path in enumerate(layer.paths):
        for operand, name in zip(
            layer.operands, ("v", "u", "in_scale", "latent_scale", "out_scale"), strict=True
        ):
            assert operand[i] is getattr(path, name)


def test_nbytes_counts_shared_tensors_once(rng: torch.Generator) -> None:
    layer = make_packed(K, N, [R, R], share_v=True, bias=True, generator=rng)
    first_stage = R * words_per_row(K) + K
    second_stage = N * words_per_row(R) + R + N
    assert layer.nbytes == 4 * (first_stage + 2 * second_stage + N)
    assert len(layer.unique_tensors()) == 2 + 2 * 3 + 1


def test_no_paths() -> None:
    with pytest.raises(ValueError, match="paths must hold between 1 and 16 PackedPath, got 0"):
        PackedLinear(())


def test_path_of_another_type(fields: Fields) -> None:
    with pytest.raises(TypeError, match=r"paths\[1\] must be a PackedPath, got dict"):
        PackedLinear((PackedPath(**fields), fields))


def test_first_path_of_another_type(fields: Fields) -> None:
    with pytest.raises(TypeError, match=r"paths\[0\] must be a PackedPath, got dict"):
        PackedLinear((fields,))


@pytest.mark.parametrize(
    ("what", "size", "other"),
    [
        ("in_features", K, (K + 1, N, [R])),
        ("out_features", N, (K, N + 1, [R])),
        ("single_stage", False, (K, N, None)),
    ],
    ids=["K", "N", "stages"],
)
def test_paths_that_disagree(
    what: str, size: int, other: tuple[int, int, list[int] | None], rng: torch.Generator
) -> None:
    paths = (make_packed(K, N, [R], generator=rng).paths[0], make_packed(*other, generator=rng).paths[0])
    with pytest.raises(ValueError, match=rf"paths\[1\].{what} must equal paths\[0\].{what} = {size}, got"):
        PackedLinear(paths)


def test_paths_on_different_devices(rng: torch.Generator) -> None:
    layer = make_packed(K, N, [R, R], generator=rng)
    on_meta = layer.to("meta")
    with pytest.raises(ValueError, match=r"paths\[1\] must be on cpu like paths\[0\], got meta"):
        PackedLinear((layer.paths[0], on_meta.paths[1]))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ([0.0] * N, TypeError, "bias must be a torch.Tensor, got list"),
        (torch.zeros(N, dtype=torch.bfloat16), TypeError, "bias must be float32, got torch.bfloat16"),
        (torch.zeros(N - 1), ValueError, r"bias must have shape \[45\], got \[44\]"),
        (torch.zeros(1, N), ValueError, r"bias must have shape \[45\], got \[1, 45\]"),
        (torch.zeros(2 * N)[::2], ValueError, r"bias must be contiguous, got strides \(2,\)"),
        (torch.full((N,), math.nan), ValueError, "bias must be finite, got nan at index 0"),
        (torch.zeros(N, device="meta"), ValueError, r"bias must be on cpu like paths\[0\], got meta"),
    ],
    ids=["list", "dtype", "length", "two-dimensional", "stride", "nan", "device"],
)
def test_bad_bias(fields: Fields, bias: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackedLinear((PackedPath(**fields),), bias)


# --- sharing, moving, copying --------------------------------------------------------------------------


def assert_shares_first_stage(layer: PackedLinear) -> None:
    first, second = layer.paths
    assert second.shares_first_stage(first)
    assert second.u is not first.u
    assert layer.operands[0][0] is layer.operands[0][1]


def test_equal_values_are_not_shared_tensors(fields: Fields) -> None:
    path = PackedPath(**fields)
    assert not path.shares_first_stage(PackedPath(**{**fields, "v": fields["v"].clone()}))
    assert not path.shares_first_stage(PackedPath(**{**fields, "in_scale": fields["in_scale"].clone()}))
    assert path.shares_first_stage(PackedPath(**{**fields, "u": fields["u"].clone()}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_to_keeps_sharing(device: str, rng: torch.Generator) -> None:
    layer = make_packed(K, N, [R, R], share_v=True, bias=True, generator=rng)
    moved = layer.to(device)
    assert moved.device.type == device
    assert all(tensor.device.type == device for tensor in moved.unique_tensors())
    assert_shares_first_stage(moved)
    assert moved.nbytes == layer.nbytes


def test_to_cuda_and_back(requires_cuda: torch.device, rng: torch.Generator) -> None:
    layer = make_packed(K, N, [R, R], share_v=True, bias=True, generator=rng)
    moved = layer.to(requires_cuda)
    assert moved.device == requires_cuda
    assert_shares_first_stage(moved)
    returned = moved.to("cpu")
    for original, back in zip(layer.unique_tensors(), returned.unique_tensors(), strict=True):
        assert torch.equal(original, back)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_sharing_and_values(
    duplicate: Callable[[PackedLinear], PackedLinear], rng: torch.Generator
) -> None:
    layer = make_packed(K, N, [R, R], share_v=True, bias=True, generator=rng)
    twin = duplicate(layer)
    assert_shares_first_stage(twin)
    for original, other in zip(layer.unique_tensors(), twin.unique_tensors(), strict=True):
        assert original is not other
        assert torch.equal(original, other)
    assert all(
        operand is getattr(path, name)
        for operands, name in zip(
            twin.operands, ("v", "u", "in_scale", "latent_scale", "out_scale"), strict=True
        )
        for operand, path in zip(operands, twin.paths, strict=True)
    )
