"""Weights as files hold them: whole tensors, or parts of tensors that hold several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["ExpertPart", "Load", "Part", "Transposed", "Whole"]


class Load(Protocol):
    """Returns a tensor of the checkpoint by name, or ``tensor[index]`` of it."""

    def __call__(self, name: str, index: int | None = None, /) -> torch.Tensor:
        """Return it; it may be mapped."""
        ...


class Part(Protocol):
    """A weight or bias, and how to read it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the tensors that it is made of."""
        ...

    def read(self, load: Load) -> torch.Tensor:
        """Return the tensor; it may be a view of what ``load`` gives."""
        ...


@dataclass(frozen=True)
class Whole:
    """A tensor as it is.

    Attributes:
        name: of the tensor.
    """

    name: str

    @property
    def files(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.name,)

    def read(self, load: Load) -> torch.Tensor:
        """Return it."""
        return load(self.name)


@dataclass(frozen=True)
class ExpertPart:
    """The weight or bias of one projection of one expert in a tensor of all of them.

    Attributes:
        name: of the fused tensor, ``[E, out, in]``, ``[E, in, out]`` or ``[E, out]``.
        index: of the expert.
        rows: of its outputs, as ``(start, stop, step)``.
        transposed: whether the tensor is ``[E, in, out]``.
    """

    name: str
    index: int
    rows: tuple[int | None, int | None, int | None]
    transposed: bool

    @property
    def files(self) -> tuple[str, ...]:
        """The fused tensor."""
        return (self.name,)

    def read(self, load: Load) -> torch.Tensor:
        """Return the part; only its own bytes of the fused tensor are read."""
        matrix = load(self.name, self.index)
        return (matrix.T if self.transposed else matrix)[slice(*self.rows)]


@dataclass(frozen=True)
class Transposed:
    """A weight ``[N, K]`` that files hold as ``[K, N]``.

    Attributes:
        part: what files hold.
    """

    part: Part

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the part."""
        return self.part.files

    def read(self, load: Load) -> torch.Tensor:
        """Return a view of the part."""
        return self.part.read(load).T
