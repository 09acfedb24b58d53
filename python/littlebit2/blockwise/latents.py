"""How far the latents of a tuned block are from flipping: what a packed layer does not say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from littlebit2.train.model import trainable_layers

__all__ = ["magnitudes", "set_magnitudes"]


def magnitudes(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return the absolute values of all latents of a block, float16, by their names in it."""
    found = {}
    for name, layer in trainable_layers(block).items():
        for inner, latent in layer.latents().items():
            found[f"{name}.{inner}"] = latent.detach().abs().to(torch.float16).cpu().contiguous()
    return found


def set_magnitudes(block: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give the latents of a block the absolute values of :func:`magnitudes`; signs stay as they are.

    Args:
        block: with trainable layers.
        values: by name; latents that are not among them stay as they are.
    """
    with torch.no_grad():
        for name, layer in trainable_layers(block).items():
            for inner, latent in layer.latents().items():
                value = values.get(f"{name}.{inner}")
                if value is not None:
                    # A zero would make a negative sign positive.
                    size = value.to(latent.device, latent.dtype).clamp_min(torch.finfo(torch.float32).tiny)
                    latent.copy_(torch.where(latent < 0, -size, size))
