"""How the next token is chosen: settings, and the same choice as the model library's own loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from littlebit2._messages import SettingError

__all__ = ["Picker", "Sampling", "unserved"]

#: What the library takes where neither the caller nor the model says anything.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
#: Settings of a model that :class:`Picker` and the loop follow, or that do not change tokens.
_SERVED = {
    *_DEFAULTS,
    *("do_sample", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"),
    *("transformers_version", "output_attentions", "output_hidden_states", "output_scores"),
}


@dataclass(frozen=True)
class Sampling:
    """What a caller asks for; ``None`` for what the model's ``generation_config`` says.

    Attributes:
        do_sample: draw tokens instead of taking the likeliest.
        temperature: sampling temperature, positive.
        top_k: draw from this many likeliest tokens, 0 for all.
        top_p: draw from the likeliest tokens that together have this probability.
        repetition_penalty: divides the scores of tokens that were there already; also without sampling.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def check(self) -> None:
        """Raise :class:`SettingError` for a value out of range."""
        if self.temperature is not None and not self.temperature > 0:
            raise SettingError(f"temperature must be positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise SettingError(f"top_k must be at least 0, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise SettingError(f"repetition_penalty must be positive, got {self.repetition_penalty}")

    def given(self) -> dict[str, Any]:
        """The settings as arguments of the library's ``generate``."""
        names = ["repetition_penalty", *(["temperature", "top_k", "top_p"] if self.do_sample else [])]
        values = {name: getattr(self, name) for name in names}
        return {"do_sample": self.do_sample, **{k: v for k, v in values.items() if v is not None}}

    def resolved(self, config: GenerationConfig) -> dict[str, Any]:
        """All values, those of the model's configuration and the library's defaults included."""
        values = {}
        for name, default in _DEFAULTS.items():
            own, models = getattr(self, name), getattr(config, name, None)
            values[name] = own if own is not None else models if models is not None else default
        return values


def unserved(config: GenerationConfig) -> list[str]:
    """Names of settings of a model's generation_config that only the library's own loop follows."""
    plain = GenerationConfig().to_dict()
    defaults = {**plain, "num_beams": 1, "use_cache": True, "min_length": 0, "num_return_sequences": 1}
    return sorted(
        name
        for name, value in config.to_dict().items()
        if name not in _SERVED
        and not name.startswith("_")
        and value not in (None, plain.get(name), defaults.get(name))
    )


class Picker:
    """Chooses the next token of every row, as the library's loop does.

    Args:
        sampling: what was asked for.
        config: of the model.
        never: tokens that are never chosen.
    """

    def __init__(self, sampling: Sampling, config: GenerationConfig, never: list[int]) -> None:
        values = sampling.resolved(config)
        self._samples = sampling.do_sample
        self._never = never
        self._change = LogitsProcessorList()
        if values["repetition_penalty"] != 1:
            self._change.append(RepetitionPenaltyLogitsProcessor(float(values["repetition_penalty"])))
        self._warp = LogitsProcessorList()
        if sampling.do_sample:
            if values["temperature"] != 1:
                self._warp.append(TemperatureLogitsWarper(float(values["temperature"])))
            if values["top_k"] != 0:
                self._warp.append(TopKLogitsWarper(int(values["top_k"])))
            if values["top_p"] < 1:
                self._warp.append(TopPLogitsWarper(float(values["top_p"])))

    @property
    def reads_tokens(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return len(self._change) > 0

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the next tokens ``[rows]`` after ``ids`` ``[rows, T]``, by logits ``[rows, vocabulary]``."""
        scores = logits.to(torch.float32, copy=True)
        change: Any = self._change  # typed as if there were other tensors
        scores = change(ids, scores)
        if self._never:
            scores[:, self._never] = -torch.inf
        if not self._samples:
            return scores.argmax(-1)
        warp: Any = self._warp
        return torch.multinomial(warp(ids, scores).softmax(-1), 1)[:, 0]
