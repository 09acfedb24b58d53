"""Inputs for tiny models."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["inputs_of"]


def inputs_of(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return inputs to try on a model, most likely first."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 7), generator=generator)
    size = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", 32
    )
    size = size if isinstance(size, int) else 32
    channels = getattr(config, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    pixels = torch.randn(1, channels, size, size, generator=generator)
    text = {"input_ids": ids}
    both = {**text, "decoder_input_ids": ids}
    mels = getattr(config, "num_mel_bins", 80)
    mels = mels if isinstance(mels, int) else 80
    features = torch.randn(1, mels, 2 * getattr(config, "max_source_positions", 50), generator=generator)
    wave = torch.randn(1, 4000, generator=generator)
    sound = {"input_features": features, "decoder_input_ids": ids[:1]}
    main = getattr(model, "main_input_name", "input_ids")
    tries = {
        "input_ids": [text, both],
        "pixel_values": [{"pixel_values": pixels}, {"pixel_values": pixels, "input_ids": ids[:1]}],
        "input_values": [{"input_values": wave}, {"input_values": torch.randn(1, 1024, 128)}],
        "input_features": [sound, {"input_features": features}, {"input_features": features.mT}],
    }
    first = tries.pop(main, [])
    return [*first, *(one for group in tries.values() for one in group)]
