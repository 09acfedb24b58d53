"""The repeated layers of a model, found by structure."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from littlebit2.architecture.tensors import LayerSource

__all__ = ["find_blocks"]


def find_blocks(model: nn.Module, layers: Sequence[LayerSource]) -> str:
    """Return the name of the list of modules that holds most of the weights that are to be packed.

    Args:
        model: the model, with or without values.
        layers: what is packed; ``module`` of each is its name in the model.

    Raises:
        ValueError: no list of modules holds any of them.
    """
    held: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in held):
            continue
        weights = sum(
            layer.in_features * layer.out_features for layer in layers if layer.module.startswith(f"{name}.")
        )
        if weights:
            held[name] = weights
    if not held:
        raise ValueError(
            f"method blockwise needs a model of repeated blocks, got {type(model).__name__}, whose layers to "
            "pack lie in no list of modules: use --method admm"
        )
    return max(held, key=lambda name: held[name])
