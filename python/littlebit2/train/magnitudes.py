"""How far trained latents are from flipping, which a packed layer does not say, in files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .model import trainable_layers

__all__ = ["LATENTS", "kept_magnitudes", "magnitudes", "set_magnitudes"]

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


def set_magnitudes(model: nn.Module, values: Mapping[str, torch.Tensor], prefix: str = "") -> int:
    """Give latents the absolute values of :func:`magnitudes`; signs stay as they are.

    Args:
        model: with trainable layers.
        values: by name; latents that are not among them stay as they are.
        prefix: as for :func:`magnitudes`.

    Returns:
        How many latents have been given values.

    Raises:
        ValueError: a shape differs; the message names the latent.
    """
    done = 0
    with torch.no_grad():
        for name, layer in trainable_layers(model).items():
            for inner, latent in layer.latents().items():
                key = f"{prefix}{name}.{inner}"
                if key not in values:
                    continue
                value = values[key]
                if value.shape != latent.shape:
                    raise ValueError(
                        f"latent {key} must have shape {list(latent.shape)}, got {list(value.shape)}"
                    )
                # A zero would make a negative sign positive.
                size = value.to(latent.device, latent.dtype).clamp_min(torch.finfo(torch.float32).tiny)
                latent.copy_(torch.where(latent < 0, -size, size))
                done += latent.numel()
    return done


def kept_magnitudes(checkpoint: Path) -> Iterable[dict[str, torch.Tensor]]:
    """Yield what a packed checkpoint keeps of :func:`magnitudes`, one file at a time."""
    for path in sorted((checkpoint / LATENTS).glob("*.safetensors")):
        yield load_file(path)
