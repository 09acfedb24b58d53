"""Random problems for the sweeps of all backends: one generator, and the spaces that it draws from.

A space lists sizes around the units of one set of kernels (words, chunks, tiles), to reach every tail.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from littlebit2_kernels import PackedLinear, PackedPath
from littlebit2_kernels.testing import TOLERANCE, make_problem

__all__ = [
    "CUDA",
    "GROUPS",
    "PORTABLE",
    "PREPACKED",
    "TRITON",
    "TRITON_DECODE",
    "Space",
    "describe",
    "pick",
    "random_problem",
    "scaled_down",
    "with_equal_in_scales",
    "with_input_layout",
    "with_word_layout",
]

T = TypeVar("T")

#: Layers that share their input: arguments of ``make_packed``.
GROUPS: dict[str, list[dict[str, Any]]] = {
    "qkv": [
        {"out_features": 70, "ranks": [40], "bias": True},
        {"out_features": 33, "ranks": [16, 24]},
        {"out_features": 1, "ranks": [8], "bias": True},
    ],
    "shared-v": [
        {"out_features": 20, "ranks": [24, 24], "share_v": True},
        {"out_features": 20, "ranks": [8]},
    ],
    "single-stage": [{"out_features": 70, "ranks": None, "bias": True}, {"out_features": 5, "ranks": None}],
    "one": [{"out_features": 9, "ranks": [8]}],
}


@dataclass(frozen=True)
class Space:
    """What :func:`random_problem` draws from, each value as often as it is listed.

    Attributes:
        tokens: M.
        cols: K.
        rows: N.
        paths: P; ``None`` is a single-stage layer.
        eighths: R / 8 of each path.
        sharing: first stages of layers with several paths: ``apart``; ``shared``, one V and in_scale for all;
            ``stacked``, equal in_scales by value; ``mixed``, stacked, and the last two share a V.
        outliers: channels of x that are 50 times larger.
        dtypes: dtypes of x.
        layouts: see :func:`with_input_layout`.
        word_layouts: see :func:`with_word_layout`.
        scaled: whether the layer is divided by 256, so that large ones stay in the range of float16.
    """

    tokens: Sequence[int]
    cols: Sequence[int]
    rows: Sequence[int]
    paths: Sequence[int | None]
    eighths: Sequence[int]
    sharing: Sequence[str] = ("apart",) * 7 + ("shared",) * 3
    outliers: Sequence[int] = (0, 0, 3)
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)
    layouts: Sequence[str] = ("contiguous", "pitched", "transposed", "offset", "batched")
    word_layouts: Sequence[str] = ("dense",)
    scaled: bool = True


#: The CPU kernels on the portable layout.
PORTABLE = Space(
    tokens=(0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 13, 25, 33, 100),
    cols=(1, 2, 7, 16, 31, 32, 33, 64, 65, 100, 130, 257, 400, 1025),
    rows=(1, 2, 7, 16, 31, 32, 33, 64, 65, 100, 130, 257, 400, 1025),
    paths=(None, 1, 1, 2, 2, 3),
    eighths=range(1, 21),
    scaled=False,
)

#: The CPU kernels on the prepacked layout: words (15 columns), pairs of words, chunks (at most 720),
#: segments, blocks (32 rows), tiles (128 rows).
PREPACKED = Space(
    tokens=(0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 130),
    cols=(1, 4, 5, 14, 15, 16, 29, 30, 31, 100, 257, 400, 719, 720, 721, 1440, 1441, 2161, 2900, 4330),
    rows=(1, 7, 16, 31, 32, 33, 64, 97, 127, 128, 129, 160, 255, 256, 257, 300, 513),
    paths=(None, 1, 1, 2, 2, 3),
    eighths=(*range(1, 21), *(90, 91, 181) * 10),
    sharing=("apart", "shared", "stacked", "mixed"),
)

#: The CUDA kernels: MMA rows (16), words (32), 16-byte loads (128), slices (512), token tiles of the decode
#: kernels (1, 2, 4, 8, 16) and of the GEMM (32, 64, 128).
CUDA = Space(
    tokens=(*range(18), 24, 31, 32, 33, 40, 65, 129, 200),
    cols=(1, 7, 31, 32, 33, 100, 127, 128, 129, 257, 511, 512, 513, 1024, 1100, 2049),
    rows=(1, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 130, 257, 513),
    paths=(None, 1, 1, 2, 2, 3, 5),
    eighths=(*range(1, 21), *(64, 65, 130) * 10),
    layouts=("contiguous",),
)

#: The Triton kernels: words (32), 16-byte loads (128), chunks (256 and 512), word blocks (up to 1024), row
#: blocks (16 to 64), token blocks (4, 16, 32), and the switches of kernels (4, 8).
TRITON = Space(
    tokens=(0, 1, 1, 1, 2, 3, 4, 5, 5, 7, 8, 9, 17),
    cols=(1, 7, 31, 32, 33, 100, 127, 128, 129, 256, 257, 300, 511, 512, 513, 1030),
    rows=(1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129),
    paths=(None, 1, 1, 1, 2, 2, 3, 5),
    eighths=(*range(1, 11), *(33,) * 5),
    word_layouts=("dense", "aligned", "pitched", "misaligned"),
)

#: Two stages and a few tokens, with ranks around words and blocks of them.
TRITON_DECODE = Space(
    tokens=(1, 1, 2, 4),
    cols=TRITON.cols,
    rows=TRITON.rows,
    paths=(1, 1, 2, 2, 3, 4),
    eighths=(1, 3, 4, 5, 8, 9, 16, 17),
    outliers=(0, 3),
    layouts=("contiguous", "pitched", "offset"),
    word_layouts=TRITON.word_layouts,
)


def random_problem(rng: torch.Generator, space: Space = PORTABLE) -> tuple[torch.Tensor, PackedLinear]:
    """Draw ``(x, packed)`` on the CPU."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    paths = draw.choice(space.paths)
    sharing = "apart" if paths in (None, 1) else draw.choice(space.sharing)
    ranks = None
    if paths is not None:
        ranks = [8 * draw.choice(space.eighths) for _ in range(paths)]
        ranks = [ranks[0]] * paths if sharing in ("shared", "mixed") else ranks
    cols = draw.choice(space.cols)
    x, packed = make_problem(
        draw.choice(space.tokens),
        cols,
        draw.choice(space.rows),
        ranks,
        dtype=draw.choice(space.dtypes),
        outliers=min(cols, draw.choice(space.outliers)),
        bias=draw.random() < 0.5,
        share_v=sharing == "shared",
        generator=rng,
    )
    packed = scaled_down(packed) if space.scaled else packed
    if sharing in ("stacked", "mixed"):
        packed = with_equal_in_scales(packed, share_last=sharing == "mixed")
    packed = with_word_layout(packed, draw.choice(space.word_layouts))
    return with_input_layout(x, draw.choice(space.layouts)), packed


def pick(rng: torch.Generator, options: Sequence[T]) -> T:
    """Draw one of ``options``."""
    return options[int(torch.randint(len(options), (), generator=rng))]


def scaled_down(packed: PackedLinear) -> PackedLinear:
    """The layer divided by 256, so that large ones stay in the range of float16."""
    paths = [PackedPath(p.v, p.in_scale, p.out_scale / 256, p.u, p.latent_scale) for p in packed.paths]
    return PackedLinear(tuple(paths), None if packed.bias is None else packed.bias / 256)


def with_equal_in_scales(packed: PackedLinear, *, share_last: bool = False) -> PackedLinear:
    """Give all paths the first one's in_scale by value, which stacks their V; the last may share a V."""
    paths = [packed.paths[0]]
    for path in packed.paths[1:]:
        paths.append(PackedPath(path.v, paths[0].in_scale.clone(), path.out_scale, path.u, path.latent_scale))
    if share_last:
        last = paths[-1]
        paths[-1] = PackedPath(paths[-2].v, paths[-2].in_scale, last.out_scale, last.u, last.latent_scale)
    return PackedLinear(tuple(paths), packed.bias)


def with_word_layout(packed: PackedLinear, layout: str) -> PackedLinear:
    """The same words: ``dense``, rows ``aligned`` to 16 bytes, ``pitched`` by one word, or ``misaligned``."""

    def place(words: torch.Tensor | None) -> torch.Tensor | None:
        if words is None or layout == "dense":
            return words
        rows, count = words.shape
        pitch = -(-count // 4) * 4 if layout == "aligned" else count + 1
        start = 1 if layout == "misaligned" else 0
        # What lies between the rows must not matter.
        room = torch.full((rows * pitch + start,), -1, dtype=torch.int32, device=words.device)
        view = room[start:].view(rows, pitch)[:, :count]
        view.copy_(words)
        return view

    placed: dict[int, torch.Tensor | None] = {}
    paths = []
    for path in packed.paths:
        v = placed.setdefault(id(path.v), place(path.v))
        paths.append(PackedPath(v, path.in_scale, path.out_scale, place(path.u), path.latent_scale))
    return PackedLinear(tuple(paths), packed.bias)


def with_input_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values ``[M, K]`` with other strides, storage offset, or leading dimensions (``batched``)."""
    tokens, cols = x.shape
    if layout == "pitched":
        return torch.cat([x, x[:, :3]], dim=1)[:, :cols]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(tokens, cols)
    if layout == "batched":
        return x.reshape(2, tokens // 2, cols) if tokens % 2 == 0 else x.reshape(1, tokens, 1, cols)
    return x


def describe(x: torch.Tensor, packed: PackedLinear) -> str:
    """What a failing assertion reports of its problem."""
    return (
        f"x {list(x.shape)} {x.dtype} strides {x.stride()}, N {packed.out_features}, ranks {packed.ranks}, "
        f"single_stage {packed.single_stage}, shares {packed.shares}, bias {packed.bias is not None}, "
        f"V pitch {packed.paths[0].v.stride(0)}"
    )
