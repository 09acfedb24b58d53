"""How far trained latents are from flipping, which a packed layer does not say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .model import trainable_layers

__all__ = ["LATENTS", "magnitudes", "set_magnitudes"]

#: Folder of a packed checkpoint that holds its magnitudes, where they are kept: safetensors of any names.
LATENTS = "latents"


def magnitudes(model: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the absolute values of all latents, float16, by their names.

    Args:
        model: a model, or a part of one.
        prefix: what comes before the names in it.
    """
    return {
        f"{prefix}{name}.{inner}": latent.detach().abs().to(torch.float16).cpu().contiguous()
        for name, layer in trainable_layers(model).items()
        for inner, latent in layer.latents().items()
    }


def set_magnitudes(model: nn.Module, values: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Give latents the absolute values of :func:`magnitudes`; signs stay as they are.

    Args:
        model: with trainable layers.
        values: by name; latents that are not among them stay as they are.
        prefix: as for :func:`magnitudes`.

    Raises:
        ValueError: a name is no latent's, or a shape differs; the message names it.
    """
    latents = {
        f"{prefix}{name}.{inner}": latent
        for name, layer in trainable_layers(model).items()
        for inner, latent in layer.latents().items()
    }
    with torch.no_grad():
        for name, value in values.items():
            latent = latents.get(name)
            if latent is None:
                raise ValueError(f"latent {name}: the model has none of this name")
            if value.shape != latent.shape:
                raise ValueError(
                    f"latent {name} must have shape {list(latent.shape)}, got {list(value.shape)}"
                )
            # A zero would make a negative sign positive.
            size = value.to(latent.device, latent.dtype).clamp_min(torch.finfo(torch.float32).tiny)
            latent.copy_(torch.where(latent < 0, -size, size))
