"""What the tests on a GPU share: problems around the kernels' units, error bounds, the sign mode again."""

from __future__ import annotations

import random

import torch

from littlebit2_kernels import PackedLinear, PackedPath
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_problem, relative_error, typical_norm
from tests.kernels.problems import scaled_down

#: Columns with a common activation scale (csrc/cuda/params.h).
SLICE = 512

MODES = ("exact", "float16", "int16", "int8", "sign")

#: Relative Frobenius error of a mode over many outputs, both stages, before the rounding of the output.
BOUND = {"exact": 2e-6, "float16": 5e-4, "int16": 5e-4, "int8": 2e-2, "sign": 1e-5}

#: Around MMA rows (16), words (32), 16-byte loads (128), and slices (512).
COLS = (1, 7, 31, 32, 33, 100, 127, 128, 129, 257, 511, 512, 513, 1024, 1100, 2049)
ROWS = (1, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 130, 257, 513)
#: Around the token tiles of the decode kernels (1, 2, 4, 8, 16) and of the GEMM (32, 64, 128).
TOKENS = (*range(18), 24, 31, 32, 33, 40, 65, 129, 200)
#: Most tokens of the decode kernels in the modes that have a GEMM for more; bits change above.
SWITCH = 16
GEMM_MODES = ("exact", "float16", "int8")

Problem = tuple[torch.Tensor, PackedLinear]


def random_problem(rng: torch.Generator) -> tuple[Problem, str]:
    """Draw a problem on the CPU, and the mode to run it in."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    count = draw.choice((None, 1, 1, 2, 2, 3, 5))
    share = count is not None and draw.random() < 0.3
    ranks = None
    if count is not None:
        ranks = [
            8 * draw.choice((draw.randint(1, 20), draw.randint(1, 20), 64, 65, 130)) for _ in range(count)
        ]
        ranks = [ranks[0]] * count if share else ranks
    cols = draw.choice(COLS)
    x, packed = make_problem(
        draw.choice(TOKENS),
        cols,
        draw.choice(ROWS),
        ranks,
        dtype=draw.choice(tuple(TOLERANCE)),
        outliers=min(cols, draw.choice((0, 0, 3))),
        bias=draw.random() < 0.5,
        share_v=share,
        generator=rng,
    )
    return (x, scaled_down(packed)), draw.choice(MODES)


def expected(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """What ``mode`` approximates, in float64, on the CPU."""
    x, packed = x.cpu(), packed.to("cpu")
    return sign_reference(x, packed) if mode == "sign" else linear_reference(x, packed)


def sign_reference(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """The layer with every operand binarized: its signs, times its mean magnitude per token and slice."""
    x = x.double()
    y = x.new_zeros((*x.shape[:-1], packed.out_features))
    for path in packed.paths:
        z = multiply_binarized(x * path.in_scale.double(), path.v)
        if path.u is not None and path.latent_scale is not None:
            z = multiply_binarized(z * path.latent_scale.double(), path.u)
        y = y + z * path.out_scale.double()
    return y if packed.bias is None else y + packed.bias.double()


def multiply_binarized(z: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Signs of ``z`` (of zero: +1) times those of ``words``, counted, times the mean magnitude of the slice.

    Counted before they are scaled: a count of zero must be zero, for the sign that is taken of it next.
    """
    signs = unpack_signs_reference(words, z.shape[-1], torch.float64)
    total = z.new_zeros((*z.shape[:-1], signs.shape[0]))
    for part, columns in zip(z.split(SLICE, dim=-1), signs.split(SLICE, dim=-1), strict=True):
        total = total + torch.where(part < 0, -1.0, 1.0).double() @ columns.T * part.abs().mean(
            -1, keepdim=True
        )
    return total


def error_of(y: torch.Tensor, x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """Relative error of ``y``; small results by chance are compared with the typical ones."""
    x, packed = x.cpu(), packed.to("cpu")
    return relative_error(y.cpu(), expected(x, packed, mode), typical_norm(x, packed))


def allowed(dtype: torch.dtype, mode: str, outputs: int) -> float:
    """The bound of a mode, and the rounding of the output.

    The error of a mode is random from output to output: one alone, or the norm of a few, lies further out.
    """
    return BOUND[mode] * (1 + 3 / max(outputs, 1) ** 0.5) + TOLERANCE[dtype]


def describe(x: torch.Tensor, packed: PackedLinear, mode: str) -> str:
    """What a failing assertion says of its problem."""
    return (
        f"{mode}, x {list(x.shape)} {x.dtype} strides {x.stride()}, N {packed.out_features}, "
        f"ranks {packed.ranks}, single_stage {packed.single_stage}, shares {packed.shares}, "
        f"bias {packed.bias is not None}"
    )


def with_word_layout(packed: PackedLinear, layout: str) -> PackedLinear:
    """The same words ``aligned`` to 16 bytes with padded rows, ``pitched`` by one word, or ``misaligned``."""

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
    """The same values with other strides, dimensions or storage offset."""
    tokens, cols = x.shape
    if layout == "pitched":
        return torch.cat([x, x[:, :3]], dim=1)[:, :cols]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(tokens, cols)
    if layout == "batched":
        return x.reshape(1, tokens, 1, cols)
    return x
