"""Random problems that the sweeps of the CPU kernels share."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from littlebit2_kernels import PackedLinear, PackedPath
from littlebit2_kernels.testing import TOLERANCE, make_problem

SIZES = (1, 2, 7, 16, 31, 32, 33, 64, 65, 100, 130, 257, 400, 1025)
TOKENS = (0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 13, 25, 33, 100)

#: Around the words (15 columns), pairs of words, chunks (at most 720) and segments of the prepacked layout.
LOOKUP_COLS = (1, 4, 5, 14, 15, 16, 29, 30, 31, 100, 257, 400, 719, 720, 721, 1440, 1441, 2161, 2900, 4330)
#: Around its blocks (32 rows) and tiles (128 rows).
LOOKUP_ROWS = (1, 7, 16, 31, 32, 33, 64, 97, 127, 128, 129, 160, 255, 256, 257, 300, 513)
LOOKUP_TOKENS = (0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130)


def random_problem(rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    """Draw shapes, ranks, paths, dtype, layout of x, outliers and bias."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    paths = draw.choice((None, 1, 1, 2, 2, 3))
    share = paths is not None and draw.random() < 0.3
    ranks = None
    if paths is not None:
        ranks = [8 * draw.randint(1, 20) for _ in range(paths)]
        ranks = [ranks[0]] * paths if share else ranks
    in_features = draw.choice(SIZES)
    x, packed = make_problem(
        draw.choice(TOKENS),
        in_features,
        draw.choice(SIZES),
        ranks,
        dtype=draw.choice(tuple(TOLERANCE)),
        outliers=min(in_features, draw.choice((0, 0, 3))),
        bias=draw.random() < 0.5,
        share_v=share,
        generator=rng,
    )
    return with_random_layout(draw, x), packed


def random_lookup_problem(
    rng: torch.Generator,
    *,
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCE),
    outliers: Sequence[int] = (0, 0, 3),
    tokens: Sequence[int] = LOOKUP_TOKENS,
) -> tuple[torch.Tensor, PackedLinear]:
    """The same for prepacked layers: sizes around the units of their layout, and stacked first stages."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    paths = draw.choice((None, 1, 1, 2, 2, 3))
    kind = draw.choice(("apart", "shared", "stacked", "mixed")) if paths not in (None, 1) else "apart"
    ranks = None
    if paths is not None:
        ranks = [
            8 * draw.choice((draw.randint(1, 20), draw.randint(1, 20), 90, 91, 181)) for _ in range(paths)
        ]
        ranks = [ranks[0]] * paths if kind in ("shared", "mixed") else ranks
    in_features = draw.choice(LOOKUP_COLS)
    x, packed = make_problem(
        draw.choice(tokens),
        in_features,
        draw.choice(LOOKUP_ROWS),
        ranks,
        dtype=draw.choice(dtypes),
        outliers=min(in_features, draw.choice(outliers)),
        bias=draw.random() < 0.5,
        share_v=kind == "shared",
        generator=rng,
    )
    packed = scaled_down(packed)
    if kind in ("stacked", "mixed"):
        packed = with_equal_in_scales(packed, share_last=kind == "mixed")
    return with_random_layout(draw, x), packed


def scaled_down(packed: PackedLinear) -> PackedLinear:
    """The layer divided by 256, so that large ones do not leave the range of float16."""
    paths = [PackedPath(p.v, p.in_scale, p.out_scale / 256, p.u, p.latent_scale) for p in packed.paths]
    return PackedLinear(tuple(paths), None if packed.bias is None else packed.bias / 256)


def describe(x: torch.Tensor, packed: PackedLinear) -> str:
    """What a failing assertion says of its problem."""
    return (
        f"x {list(x.shape)} {x.dtype}, N {packed.out_features}, ranks {packed.ranks}, "
        f"single_stage {packed.single_stage}, shares {packed.shares}, bias {packed.bias is not None}"
    )


def with_equal_in_scales(packed: PackedLinear, *, share_last: bool = False) -> PackedLinear:
    """Give all paths the first one's in_scale by value, which stacks their V; the last may share a V."""
    paths = [packed.paths[0]]
    for path in packed.paths[1:]:
        paths.append(PackedPath(path.v, paths[0].in_scale.clone(), path.out_scale, path.u, path.latent_scale))
    if share_last:
        last = paths[-1]
        paths[-1] = PackedPath(paths[-2].v, paths[-2].in_scale, last.out_scale, last.u, last.latent_scale)
    return PackedLinear(tuple(paths), packed.bias)


def with_random_layout(draw: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same values with other strides, dimensions or storage offset."""
    tokens, in_features = x.shape
    layout = draw.choice(("contiguous", "pitched", "transposed", "offset", "batched"))
    if layout == "pitched":
        return torch.cat([x, x[:, :3]], dim=1)[:, :in_features]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(tokens, in_features)
    if layout == "batched" and tokens % 2 == 0:
        return x.reshape(2, tokens // 2, in_features)
    return x
