"""What a checkpoint says about its packed layers, without their data; and dense columns beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from littlebit2_kernels.format import LayerShape

__all__ = ["ColumnsSpec", "Int8Spec", "LayerSpec", "SalientColumns", "packed_part"]


@dataclass(frozen=True)
class LayerSpec:
    """One packed linear layer, known from tensor headers alone.

    Attributes:
        name: module path, for example ``"model.layers.0.mlp.up_proj"``.
        shape: sizes, ranks and shared first stages.
        bias: whether the layer has a bias.
    """

    name: str
    shape: LayerShape
    bias: bool


@dataclass(frozen=True)
class ColumnsSpec:
    """Columns of one layer that stay dense beside its packed part, known from tensor headers alone.

    Attributes:
        name: module path of the whole layer; its packed part is the layer :attr:`layer`.
        out_features: N.
        count: S, the number of columns.
    """

    name: str
    out_features: int
    count: int

    @property
    def layer(self) -> str:
        """Name of the packed part."""
        return packed_part(self.name)


@dataclass(frozen=True)
class Int8Spec:
    """A head or an embedding in int8 rows, known from tensor headers alone.

    Attributes:
        name: module path.
        rows: N, or the number of embeddings.
        columns: K, or the dimension of an embedding.
    """

    name: str
    rows: int
    columns: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the rows and their float32 scales."""
        return self.rows * (self.columns + 4)


@dataclass(frozen=True)
class SalientColumns:
    """Columns of one layer: it computes ``packed part(x) + x[..., index] @ weight.T``.

    Attributes:
        index: int32 ``[S]``, different columns.
        weight: float32, float16 or bfloat16 ``[N, S]``.
    """

    index: torch.Tensor
    weight: torch.Tensor


def packed_part(name: str) -> str:
    """Name of the packed part of a layer that has salient columns too."""
    return f"{name}.linear"
