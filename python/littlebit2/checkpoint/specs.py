"""What a checkpoint says of its packed layers, without their data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerSpec"]


@dataclass(frozen=True)
class LayerSpec:
    """One packed linear layer, known from tensor headers alone.

    Attributes:
        name: module path, for example ``"model.layers.0.mlp.up_proj"``.
        in_features: K.
        out_features: N.
        ranks: rank of every path, or ``None`` for a single-stage (OneBit-like) layer.
        shares: for each path, the path whose first stage it uses: itself unless it shares one.
        bias: whether the layer has a bias.
    """

    name: str
    in_features: int
    out_features: int
    ranks: tuple[int, ...] | None
    shares: tuple[int, ...]
    bias: bool
