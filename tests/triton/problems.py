"""What the tests of the Triton kernels share: problems, bounds, the rounded modes in float64."""

from __future__ import annotations

import random

import torch

from littlebit2_kernels import PackedLinear, littlebit_linear
from littlebit2_kernels.format import unpack_signs_reference
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import (
    TOLERANCE,
    make_problem,
    max_allowed_error,
    relative_error,
    typical_norm,
)
from tests.cuda.problems import SLICE, with_input_layout, with_word_layout
from tests.kernels.problems import scaled_down

MODES = ("exact", "float16", "int8", "sign")

#: Relative Frobenius error of a mode, both stages, before the rounding of the output: of int8 and sign
#: against float64 arithmetic of what they are defined to be, where a rounding may go the other way now and
#: then.
BOUND = {"exact": 2e-6, "float16": 5e-4, "int8": 2e-3, "sign": 1e-5}

#: Around words (32), 16-byte loads (128), chunks (256 and 512) and word blocks (up to 1024).
COLS = (1, 7, 31, 32, 33, 100, 127, 128, 129, 256, 257, 300, 511, 512, 513, 1030)
#: Around the row blocks (16 to 64).
ROWS = (1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129)
#: Around the token blocks (4, 16, 32), and the switches of kernels (4, 8).
TOKENS = (0, 1, 1, 1, 2, 3, 4, 5, 5, 7, 8, 9, 17)


def random_problem(rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear, str]:
    """Draw a problem on the CPU, its layouts, and the mode to run it in."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    count = draw.choice((None, 1, 1, 1, 2, 2, 3, 5))
    share = count is not None and draw.random() < 0.3
    ranks = None
    if count is not None:
        ranks = [8 * draw.choice((draw.randint(1, 10), draw.randint(1, 10), 33)) for _ in range(count)]
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
    packed = with_word_layout(scaled_down(packed), draw.choice(("dense", "aligned", "pitched", "misaligned")))
    layout = draw.choice(("contiguous", "pitched", "transposed", "offset", "batched"))
    return with_input_layout(x, layout), packed, draw.choice(MODES)


def random_decode_problem(rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    """Draw a problem of two stages and a few tokens, with ranks around words and blocks of them."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    count = draw.choice((1, 1, 2, 2, 3, 4))
    share = draw.random() < 0.3
    ranks = [8 * draw.choice((1, 3, 4, 5, 8, 9, 16, 17)) for _ in range(count)]
    cols = draw.choice(COLS)
    x, packed = make_problem(
        draw.choice((1, 1, 2, 4)),
        cols,
        draw.choice(ROWS),
        [ranks[0]] * count if share else ranks,
        dtype=draw.choice(tuple(TOLERANCE)),
        outliers=min(cols, draw.choice((0, 3))),
        bias=draw.random() < 0.5,
        share_v=share,
        generator=rng,
    )
    packed = with_word_layout(scaled_down(packed), draw.choice(("dense", "aligned", "pitched", "misaligned")))
    return with_input_layout(x, draw.choice(("contiguous", "pitched", "offset"))), packed


def run(x: torch.Tensor, packed: PackedLinear, device: torch.device, mode: str = "auto") -> torch.Tensor:
    """The layer by the Triton backend; the result on the CPU."""
    moved = (
        x if x.device == device else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    )
    if moved is not x:
        moved.copy_(x)
    return littlebit_linear(moved, packed.to(device), backend="triton", activation=mode).cpu()


def expected(x: torch.Tensor, packed: PackedLinear, mode: str) -> torch.Tensor:
    """What ``mode`` approximates, in float64: of int8 and sign the layer of operands rounded by slices."""
    if mode not in ("int8", "sign"):
        return linear_reference(x, packed)
    x = x.double()
    y = x.new_zeros((*x.shape[:-1], packed.out_features))
    for path in packed.paths:
        z = _product(x * path.in_scale.double(), path.v, mode)
        if path.u is not None and path.latent_scale is not None:
            z = _product(z * path.latent_scale.double(), path.u, mode)
        y = y + z * path.out_scale.double()
    return y if packed.bias is None else y + packed.bias.double()


def _product(z: torch.Tensor, words: torch.Tensor, mode: str) -> torch.Tensor:
    """Integers times signs slice by slice, then scaled: what is zero is exactly zero, with the sign +1."""
    total = z.new_zeros((*z.shape[:-1], words.shape[0]))
    signs = unpack_signs_reference(words, z.shape[-1], torch.float64)
    for part, matrix in zip(z.split(SLICE, dim=-1), signs.split(SLICE, dim=-1), strict=True):
        if mode == "sign":
            scale, integers = part.abs().mean(-1, keepdim=True), torch.where(part < 0, -1.0, 1.0).double()
        else:
            scale = part.abs().amax(-1, keepdim=True) / 127
            integers = torch.where(scale == 0, 0.0, part / scale).round()
        total += integers @ matrix.T * scale
    return total


def error_of(y: torch.Tensor, x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """Relative error of ``y``; small results by chance are compared with the typical ones."""
    return relative_error(y, expected(x, packed, mode), typical_norm(x, packed))


def allowed(x: torch.Tensor, packed: PackedLinear, mode: str) -> float:
    """The bound of a mode and the rounding of the output; for ``auto`` or PyTorch's own error."""
    if mode == "auto":
        return max_allowed_error(x, packed, linear_reference(x, packed))
    return BOUND[mode] + TOLERANCE[x.dtype]


def describe(x: torch.Tensor, packed: PackedLinear, mode: str) -> str:
    """What a failing assertion says of its problem."""
    return (
        f"{mode}, x {list(x.shape)} {x.dtype} strides {x.stride()}, N {packed.out_features}, "
        f"ranks {packed.ranks}, single_stage {packed.single_stage}, shares {packed.shares}, "
        f"bias {packed.bias is not None}, V pitch {packed.paths[0].v.stride(0)}"
    )
