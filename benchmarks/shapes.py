"""Sizes of the layers and models that are measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "GOAL_BPWS",
    "LARGE_SHAPES",
    "LLAMA_SHAPES",
    "SHAPES",
    "LlamaShape",
    "Shape",
    "parse_llama_shape",
    "parse_shape",
]


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

#: Bits per weight of the goals.
GOAL_BPWS = (0.1, 0.3, 0.55, 1.0)
#: "The four large shapes" of the goals.
LARGE_SHAPES = ("llama2-7b-up", "llama2-7b-down", "llama2-70b-up", "llama2-70b-down")


def parse_shape(text: str) -> Shape:
    """Return a shape of :data:`SHAPES` by its name, or the shape ``"K,N"``.

    Raises:
        ValueError: it is neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"shape must be K,N or one of {', '.join(SHAPES)}, got {text!r}")
    return Shape(text, int(parts[0]), int(parts[1]))


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model; ``kv_heads`` heads for keys and values, by default as many as for queries."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    kv_heads: int | None = None

    @property
    def kv_size(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.hidden // self.heads * (self.kv_heads or self.heads)

    def linear_macs(self, layers: int) -> int:
        """Weights of the linear layers of ``layers`` decoder layers: multiply-accumulates of one token."""
        attention = 2 * self.hidden * (self.hidden + self.kv_size)
        return layers * (attention + 3 * self.hidden * self.intermediate)


LLAMA_SHAPES = {
    shape.name: shape
    for shape in (
        LlamaShape("llama2-7b", 4096, 11008, 32, 32, 32000),
        LlamaShape("llama2-13b", 5120, 13824, 40, 40, 32000),
        LlamaShape("llama3-8b", 4096, 14336, 32, 32, 128256, kv_heads=8),
        # For tests and trials: it has every part, and takes no time.
        LlamaShape("tiny", 256, 704, 2, 4, 512),
    )
}


def parse_llama_shape(text: str) -> LlamaShape:
    """Return a shape of :data:`LLAMA_SHAPES` by its name.

    Raises:
        ValueError: the name is unknown.
    """
    if text not in LLAMA_SHAPES:
        raise ValueError(f"shape must be one of {', '.join(LLAMA_SHAPES)}, got {text!r}")
    return LLAMA_SHAPES[text]
