"""What a checkpoint says about its packed layers, without their data."""

from __future__ import annotations

from dataclasses import dataclass

from littlebit2_kernels.format import LayerShape

__all__ = ["LayerSpec"]


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
