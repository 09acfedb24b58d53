"""What is measured: ranks by bits per weight, seeded random layers and activations."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.shapes import Shape
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import PackedLinear, PackedPath
from littlebit2_kernels.format import words_per_row
from littlebit2_kernels.testing import make_packed

__all__ = ["Problem", "dtype_name", "parse_dtype", "random_packed"]

CPU = torch.device("cpu")
#: Standard deviation of the logarithm of a random scale.
SCALE_SPREAD = 0.3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_dtype(text: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Problem:
    """A random layer of a shape and a counted bpw; equal problems make equal layers.

    Attributes:
        shape: the layer's K and N.
        bpw: counted bits per weight.
        paths: P, paths of equal rank that share the budget.
        device: device of its tensors.
    """

    shape: Shape
    bpw: float
    paths: int = 2
    device: torch.device = CPU

    def _generator(self, purpose: str) -> torch.Generator:
        seed = f"{self.shape.label} {self.bpw} {self.paths} {purpose}"
        return torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    @property
    def ranks(self) -> list[int]:
        """Rank of each path."""
        rank = rank_for_bpw(self.shape.in_features, self.shape.out_features, self.bpw, paths=self.paths)
        return [rank] * self.paths

    @property
    def latent_features(self) -> int:
        """Sum of the ranks."""
        return sum(self.ranks)

    @cached_property
    def packed(self) -> PackedLinear:
        """The layer; made on first use."""
        packed = make_packed(
            self.shape.in_features, self.shape.out_features, self.ranks, generator=self._generator("layer")
        )
        return packed.to(self.device)

    def quick_packed(self) -> PackedLinear:
        """A layer of the same sizes with other random signs and scales, made in a moment."""
        k, n = self.shape.in_features, self.shape.out_features
        return random_packed(k, n, self.ranks, std=0.02, generator=self._generator("quick layer"))

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense layer for one token."""
        return self.shape.in_features * self.shape.out_features

    @property
    def packed_macs(self) -> int:
        """Sign-accumulates of both stages of all paths for one token."""
        return self.latent_features * (self.shape.in_features + self.shape.out_features)

    def activations(self, tokens: int, *, outliers: int = 0) -> torch.Tensor:
        """Normal activations ``[M, K]`` in float32; ``outliers`` channels are 50 times larger.

        The same distribution as :func:`littlebit2_kernels.testing.make_problem`, without making the layer.
        """
        generator = self._generator(f"x {tokens} {outliers}")
        x = torch.randn(tokens, self.shape.in_features, generator=generator)
        if outliers:
            x[:, torch.randperm(self.shape.in_features, generator=generator)[:outliers]] *= 50
        return x.to(self.device)


def random_packed(
    in_features: int, out_features: int, ranks: list[int], *, std: float, generator: torch.Generator
) -> PackedLinear:
    """Make a packed layer of random signs whose dense weight has standard deviation ``std``.

    Signs are drawn as words: :func:`littlebit2_kernels.testing.make_packed` draws one number per sign, which
    takes minutes for a model.

    Args:
        in_features: K.
        out_features: N.
        ranks: one per path.
        std: standard deviation of the dense weight's elements.
        generator: source of randomness; the layer is made on its device.
    """

    def signs(rows: int, cols: int) -> torch.Tensor:
        words = torch.randint(
            -(2**31),
            2**31,
            (rows, words_per_row(cols)),
            dtype=torch.int32,
            generator=generator,
            device=generator.device,
        )
        if cols % 32:
            words[:, -1] &= (1 << cols % 32) - 1
        return words

    def scale(size: int, magnitude: float = 1.0) -> torch.Tensor:
        normal = torch.randn(size, generator=generator, device=generator.device)
        values = torch.exp(SCALE_SPREAD * normal - SCALE_SPREAD**2)
        return magnitude * values

    # A sum of as many +-1 products as all ranks together, each scaled three times with root mean square 1.
    latent = std / sum(ranks) ** 0.5
    return PackedLinear(
        tuple(
            PackedPath(
                v=signs(rank, in_features),
                in_scale=scale(in_features),
                out_scale=scale(out_features),
                u=signs(out_features, rank),
                latent_scale=scale(rank, latent),
            )
            for rank in ranks
        ),
        None,
    )
