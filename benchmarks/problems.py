"""What is measured: shapes of real models, ranks by bits per weight, seeded random layers and activations."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch

from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import PackedLinear
from littlebit2_kernels.testing import make_packed

__all__ = ["LARGE_SHAPES", "SHAPES", "Problem", "Shape", "parse_dtype", "parse_shape"]

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A linear layer of a model: ``[M, K] -> [M, N]``."""

    name: str
    in_features: int
    out_features: int

    @property
    def label(self) -> str:
        """``K->N``."""
        return f"{self.in_features}->{self.out_features}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama2-7b-qo", 4096, 4096),
        Shape("llama2-7b-up", 4096, 11008),
        Shape("llama2-7b-down", 11008, 4096),
        Shape("llama2-70b-up", 8192, 28672),
        Shape("llama2-70b-down", 28672, 8192),
        Shape("llama3-8b-kv", 4096, 1024),
    )
}

#: "The four large shapes" of the goals.
LARGE_SHAPES = ("llama2-7b-up", "llama2-7b-down", "llama2-70b-up", "llama2-70b-down")


def parse_shape(text: str) -> Shape:
    """Return a shape by its name in :data:`SHAPES`, or of ``"K,N"``.

    Raises:
        ValueError: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"shape must be K,N or one of {', '.join(SHAPES)}, got {text!r}")
    return Shape(text, int(parts[0]), int(parts[1]))


def parse_dtype(text: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ValueError: the name is unknown.
    """
    if text not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


@dataclass(frozen=True)
class Problem:
    """A random layer of a shape and a counted bpw, the same one whenever it is asked for.

    Attributes:
        shape: the layer's K and N.
        bpw: counted bits per weight.
        paths: number of equal paths that share the budget.
        device: where its tensors are.
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
        """Rank of every path."""
        rank = rank_for_bpw(self.shape.in_features, self.shape.out_features, self.bpw, paths=self.paths)
        return [rank] * self.paths

    @property
    def latent_features(self) -> int:
        """Ranks of all paths together."""
        return sum(self.ranks)

    @cached_property
    def packed(self) -> PackedLinear:
        """The layer; made on first use."""
        packed = make_packed(
            self.shape.in_features, self.shape.out_features, self.ranks, generator=self._generator("layer")
        )
        return packed.to(self.device)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense layer, for one token."""
        return self.shape.in_features * self.shape.out_features

    @property
    def packed_macs(self) -> int:
        """Sign-accumulates of both stages of all paths, for one token."""
        return self.latent_features * (self.shape.in_features + self.shape.out_features)

    def activations(self, tokens: int, *, outliers: int = 0) -> torch.Tensor:
        """Normal activations ``[M, K]`` in float32; ``outliers`` channels are 50 times larger.

        As :func:`littlebit2_kernels.testing.make_problem` makes them, without making the layer again.
        """
        generator = self._generator(f"x {tokens} {outliers}")
        x = torch.randn(tokens, self.shape.in_features, generator=generator)
        if outliers:
            x[:, torch.randperm(self.shape.in_features, generator=generator)[:outliers]] *= 50
        return x.to(self.device)
