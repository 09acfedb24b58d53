"""Inputs for tiny models: tensors of the right shapes for the names that a model's ``forward`` takes."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers

__all__ = ["inputs_of"]

Inputs = dict[str, torch.Tensor]

#: Names that are given together with the first, where ``forward`` takes them, in the order of trial.
_TOGETHER = (
    (),
    ("decoder_input_ids",),
    ("input_ids",),
    ("input_ids", "bbox"),
    ("input_ids", "bbox", "decoder_input_ids"),
    ("input_ids", "bbox", "pixel_values"),
    ("input_ids", "pixel_values"),
    ("input_ids", "pixel_values", "image_embeds_position_mask"),
    ("input_ids", "input_values"),
    ("input_ids", "input_features"),
    ("pixel_values", "decoder_input_ids"),
    ("input_values", "decoder_input_ids"),
    ("input_features", "decoder_input_ids"),
    ("input_values",),
    ("input_features",),
    ("input_features", "input_features_mask"),
    ("visual_feats", "visual_pos"),
    ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ("pixel_values",),
    ("pixel_values", "spatial_shapes", "pixel_attention_mask"),
    ("hidden_states", "grid_thw"),
    ("pixel_values", "grid_thw"),
    ("pixel_values", "image_grid_thw"),
    ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"),
)
#: Most inputs that are tried on one model.
_MOST = 60
_ROWS, _TOKENS = 1, 7


def inputs_of(model: Any) -> list[Inputs]:
    """Return inputs to try on a model, most likely first."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken = [name for name, one in parameters.items() if one.kind not in open_ended]
    required = [name for name in taken if parameters[name].default is inspect.Parameter.empty]
    main = getattr(model, "main_input_name", "input_ids")
    first = [*required, *([main] if main in taken and main not in required else [])]
    makers = _Makers(model.config)
    found: list[Inputs] = []
    seen: set[tuple[str, ...]] = set()
    for base in (first, required):
        for more in _TOGETHER:
            names = tuple(dict.fromkeys([*base, *(name for name in more if name in taken)]))
            if not names or names in seen:
                continue
            seen.add(names)
            choices = [makers.alternatives(name) for name in names]
            if all(choices):
                found += [dict(zip(names, one, strict=True)) for one in itertools.product(*choices)]
    return found[:_MOST]


class _Makers:
    """Tensors by the name of the input, for one configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(1)

    def alternatives(self, name: str) -> list[torch.Tensor]:
        """Return tensors that may fit an input, most likely first; none if nothing is known of it."""
        maker = getattr(self, f"_{name}", None)
        return [] if maker is None else maker()

    def _number(self, *names: str, default: int) -> int:
        """An integer of the configuration, or of one of its parts."""
        for config in _with_parts(self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _input_ids(self) -> list[torch.Tensor]:
        books = self._number("num_codebooks", "num_channels", default=1)
        shapes = [(_ROWS, _TOKENS), (_ROWS, _TOKENS, books), (_ROWS * books, _TOKENS)]
        return [torch.randint(3, 60, shape, generator=self.generator) for shape in dict.fromkeys(shapes)]

    _decoder_input_ids = _input_ids

    def _bbox(self) -> list[torch.Tensor]:
        box = torch.tensor([1, 2, 8, 9]).expand(_ROWS, _TOKENS, 4).contiguous()
        return [box, box / 10]

    def _image_embeds_position_mask(self) -> list[torch.Tensor]:
        mask = torch.zeros(1, _TOKENS, dtype=torch.bool)
        mask[:, : self._number("latent_query_num", default=1)] = True
        return [mask]

    def _picture(self) -> tuple[int, int, int, int]:
        """Channels, height and width, and size of a patch."""
        height = self._number("image_size", "img_size", default=64)
        size = getattr(self.config, "image_size", None)
        width = size[-1] if isinstance(size, (list, tuple)) else height
        patch = self._number("patch_size", default=8)
        return self._number("num_channels", "in_channels", "in_chans", default=3), height, width, patch

    def _pixel_values(self) -> list[torch.Tensor]:
        channels, height, width, patch = self._picture()
        across = max(height // patch, 1)
        row = channels * patch * patch
        stack = row * self._number("temporal_patch_size", default=1)
        return [
            self._random(1, channels, height, width),
            *self._pixel_values_videos(),
            self._random(1, 16, row),
            self._random(across * across, stack),
            self._random(16, row),
            self._random(16, 2 * row),
            self._random(1, 3, 64, 64),
            self._random(1, 3, 224, 224),
            self._random(1, 2, channels, height, width),
        ]

    def _pixel_values_videos(self) -> list[torch.Tensor]:
        channels, height, width, _ = self._picture()
        frames = self._number("num_frames", "frames_per_clip", default=4)
        return [self._random(1, frames, channels, height, width)]

    def _hidden_states(self) -> list[torch.Tensor]:
        channels, _, _, patch = self._picture()
        frames = self._number("temporal_patch_size", default=1)
        row = channels * patch * patch
        return [self._random(16, frames * row), self._random(16, 2 * row)]

    def _query_embeds(self) -> list[torch.Tensor]:
        return [self._random(1, 8, self._number("hidden_size", default=64))]

    def _spatial_shapes(self) -> list[torch.Tensor]:
        return [torch.tensor([[4, 4]])]

    def _pixel_attention_mask(self) -> list[torch.Tensor]:
        return [torch.ones(1, 16, dtype=torch.long)]

    def _grid_thw(self) -> list[torch.Tensor]:
        return [torch.tensor([[1, 4, 4]])]

    _image_grid_thw = _grid_thw

    def _input_values(self) -> list[torch.Tensor]:
        mels = self._number("num_mel_bins", "feature_size", "n_mels", default=128)
        frames = self._number("max_length", "max_time_bins", default=128)
        return [
            self._random(1, 4000),
            self._random(1, 1, 4000),
            self._random(1, frames, mels),
            self._random(1, 1, frames, mels),
            self._random(1, 16000),
            self._random(1, 1, 3840),
            self._random(1, 3840),
        ]

    def _input_features(self) -> list[torch.Tensor]:
        mels = self._number(
            "num_mel_bins",
            "feature_projection_input_dim",
            "feature_size",
            "n_mels",
            "input_feat_per_channel",
            "input_dim",
            default=80,
        )
        frames = 2 * self._number("max_source_positions", default=50)
        size = self._number("spec_size", default=64)
        return [
            self._random(1, mels, frames),
            self._random(1, frames, mels),
            self._random(1, 40, mels),
            self._random(1, mels, 40),
            self._random(1, 1, 4 * size, mels),
            self._random(1, 40, 2 * mels),
            self._random(1, 40, 128),
            self._random(1, 128, 200),
        ]

    def _input_features_mask(self) -> list[torch.Tensor]:
        frames = 2 * self._number("max_source_positions", default=50)
        return [torch.ones(1, frames, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)]

    def _audio_mel(self) -> list[torch.Tensor]:
        return [self._random(1, 40, self._number("input_feat_size", default=128))]

    def _audio_mel_mask(self) -> list[torch.Tensor]:
        return [torch.zeros(1, 40, dtype=torch.bool)]

    def _latents(self) -> list[torch.Tensor]:
        size = self._number("hidden_size", default=64)
        return [self._random(1, size, 8), self._random(1, 8, size)]

    def _history(self) -> int:
        context = self._number("context_length", "seq_length", default=32)
        lags = getattr(self.config, "lags_sequence", None) or [0]
        return context + max(lags)

    def _past_values(self) -> list[torch.Tensor]:
        channels = self._number("num_input_channels", "input_size", default=1)
        rows = (_ROWS, self._history())
        return [self._random(*rows, channels), self._random(*rows)]

    def _past_observed_mask(self) -> list[torch.Tensor]:
        values = self._past_values()
        return [torch.ones_like(values[-1 if self._number("input_size", default=1) == 1 else 0])]

    def _past_time_features(self) -> list[torch.Tensor]:
        return [self._random(_ROWS, self._history(), self._number("num_time_features", default=1))]

    def _future_values(self) -> list[torch.Tensor]:
        return [self._random(_ROWS, self._number("prediction_length", default=8))]

    def _future_time_features(self) -> list[torch.Tensor]:
        features = self._number("num_time_features", default=1)
        return [self._random(_ROWS, self._number("prediction_length", default=8), features)]

    def _visual_feats(self) -> list[torch.Tensor]:
        return [self._random(_ROWS, 3, self._number("visual_feat_dim", default=2048))]

    def _visual_pos(self) -> list[torch.Tensor]:
        return [self._random(_ROWS, 3, self._number("visual_pos_dim", default=4))]

    def _states(self) -> list[torch.Tensor]:
        return [self._random(1, 5, self._number("state_dim", default=17))]

    def _actions(self) -> list[torch.Tensor]:
        return [self._random(1, 5, self._number("act_dim", default=4))]

    def _returns_to_go(self) -> list[torch.Tensor]:
        return [self._random(1, 5, 1)]

    _rewards = _returns_to_go

    def _timesteps(self) -> list[torch.Tensor]:
        return [torch.arange(5)[None]]


def _with_parts(config: Any) -> Iterator[Any]:
    """A configuration and its parts, outer ones first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from _with_parts(value)
