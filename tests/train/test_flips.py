"""Counting flips."""

from __future__ import annotations

import pytest
import torch

from littlebit2.train import FlipMeter


def test_counts_since_the_last_reading_and_since_the_start(rng: torch.Generator) -> None:
    latents = {"a": torch.randn(5, 13, generator=rng), "b": torch.randn(3, 40, generator=rng)}
    meter = FlipMeter(latents)
    assert meter.read(latents) == (0, 0, 185)
    latents["a"][0, :4] *= -1
    latents["b"][2, 39] *= -1
    assert meter.read(latents) == (5, 5, 185)
    latents["a"][0, :2] *= -1
    latents["b"][0, 0] *= -1
    saved = meter.state_dict()
    assert meter.read(latents) == (3, 4, 185)
    assert meter.read(latents) == (0, 4, 185)
    other = FlipMeter(latents)
    other.load_state_dict(saved)
    assert other.read(latents) == (3, 4, 185)


def test_magnitudes_do_not_count(rng: torch.Generator) -> None:
    latent = torch.randn(4, 8, generator=rng)
    meter = FlipMeter({"a": latent})
    assert meter.read({"a": latent * 7}) == (0, 0, 32)


def test_state_of_other_latents_is_refused() -> None:
    meter = FlipMeter({"a": torch.zeros(4, 8)})
    with pytest.raises(ValueError, match="state must be of the same latents"):
        meter.load_state_dict(FlipMeter({"a": torch.zeros(4, 80)}).state_dict())
