"""``littlebit2.generate``: text or token ids from a model, with the figures that matter for speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer, TextStreamer

from littlebit2._messages import hub_hint
from littlebit2.quantize.device import check_device

from .decoding import STEPS, StaticDecoder
from .loading import load

__all__ = ["Generation", "generate", "resident_memory"]

#: Any of these makes a directory one with a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

_CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        text: the new text, or ``None`` without a tokenizer.
        token_ids: the new tokens.
        prompt_tokens: length of the prompt.
        load_seconds: to load the model; 0 for a model that was given.
        prefill_seconds: from the call to the first new token.
        decode_seconds: from the first to the last new token.
        resident_bytes: resident memory of this process afterwards, ``None`` where it cannot be told.
        peak_resident_bytes: the most it ever was.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    resident_bytes: int | None
    peak_resident_bytes: int | None

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, first token excluded; ``None`` for fewer than two tokens."""
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / self.decode_seconds


def generate(
    model: PreTrainedModel | str | Path,
    prompt: str | Sequence[int] | torch.Tensor,
    *,
    max_new_tokens: int = 128,
    tokenizer: Any = None,
    stream: Callable[[str], object] | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache: str = "dynamic",
    step: str | None = None,
    ignore_eos: bool = False,
    **load_options: Any,
) -> Generation:
    """Continue one prompt, greedily unless ``do_sample``.

    Args:
        model: a loaded model, or a directory for :func:`.loading.load`.
        prompt: text, which needs a tokenizer, or token ids ``[T]``.
        max_new_tokens: at least 1; generation stops earlier where the model has no more positions.
        tokenizer: by default that of the model's directory, if it has one.
        stream: called with each piece of new text as it becomes final (of token ids in decimal, with a
            space after each, if there is no tokenizer).
        do_sample: draw tokens instead of taking the likeliest.
        temperature: sampling temperature.
        top_p: probability mass for nucleus sampling.
        seed: seed for sampling; sets and restores the global random state.
        cache: ``"dynamic"``, or ``"static"`` for a key/value cache of fixed size.
        step: how a step runs, one of :data:`.decoding.STEPS`, with the static cache and without the model
            library's own loop: on a GPU, ``"graph"`` replays one CUDA graph per token. By default the
            library's loop.
        ignore_eos: continue to ``max_new_tokens`` past an end-of-text token, for speed tests.
        **load_options: of :func:`.loading.load`, with a directory.

    Raises:
        TypeError: ``load_options`` are given with a loaded model.
        ValueError: an argument is out of range, ``prompt`` is text and there is no tokenizer, or it fills the
            model's positions.
        CheckpointError, FileNotFoundError: as :func:`.loading.load`.
    """
    _check_settings(max_new_tokens, cache, step, temperature, top_p)
    started = time.perf_counter()
    given = isinstance(model, PreTrainedModel)
    if isinstance(model, PreTrainedModel):
        if load_options:
            raise TypeError(f"{', '.join(sorted(load_options))} must not be given with a loaded model")
        directory = Path(model.config.name_or_path or "")
    else:
        directory = Path(model)
        if not directory.is_dir():
            raise FileNotFoundError(
                f"model must be a checkpoint directory, got {model}, which is none{hub_hint(model)}"
            )
        # Before the model, which takes longer to fail.
        check_device(load_options.get("device", "cpu"))
        tokenizer = tokenizer if tokenizer is not None else _tokenizer(directory)
        _check_prompt(prompt, tokenizer, directory)
        model = load(directory, **load_options)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(directory)
    _check_prompt(prompt, tokenizer, directory)
    loaded = time.perf_counter()
    prompt_ids = _encode(prompt, tokenizer, model).to(model.device)
    max_new_tokens = _within_positions(model, prompt_ids.shape[1], max_new_tokens)
    clock = _Clock(stream, tokenizer)
    begun = time.perf_counter()
    with torch.random.fork_rng(enabled=seed is not None), torch.inference_mode():
        if seed is not None:
            torch.manual_seed(seed)
        if step is not None:
            warpers = _warpers(temperature, top_p) if do_sample else None
            new = _by_steps(model, prompt_ids, max_new_tokens, step, warpers, ignore_eos, clock)
        else:
            settings: dict[str, Any] = {"do_sample": do_sample, "max_new_tokens": max_new_tokens}
            if do_sample:
                drawn = {"temperature": temperature, "top_p": top_p}
                settings |= {key: value for key, value in drawn.items() if value is not None}
            if ignore_eos:
                settings["min_new_tokens"] = max_new_tokens
            if cache == "static":
                settings["cache_implementation"] = "static"
            if model.generation_config.pad_token_id is None:
                # One prompt is never padded; a value keeps the library from warning that it chose one.
                settings["pad_token_id"] = 0
            run: Any = model.generate  # typed as if it might be a tensor
            output = run(prompt_ids, attention_mask=torch.ones_like(prompt_ids), streamer=clock, **settings)
            new = output[0, prompt_ids.shape[1] :].tolist()
    now, peak = resident_memory()
    return Generation(
        text=None if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True),
        token_ids=tuple(new),
        prompt_tokens=prompt_ids.shape[1],
        load_seconds=0.0 if given else loaded - started,
        prefill_seconds=clock.first - begun,
        decode_seconds=clock.last - clock.first,
        resident_bytes=now,
        peak_resident_bytes=peak,
    )


def _within_positions(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """The number of new tokens that the model has positions for: what comes after is noise, or fails."""
    text = model.config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return max_new_tokens
    if prompt_tokens >= most:
        raise ValueError(
            f"prompt must leave room for a new token in the model's {most} positions, got {prompt_tokens} "
            "tokens"
        )
    return min(max_new_tokens, most - prompt_tokens)


def _by_steps(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    step: str,
    warpers: LogitsProcessorList | None,
    ignore_eos: bool,
    clock: _Clock,
) -> list[int]:
    """Decode with a :class:`StaticDecoder`, likeliest tokens unless there are ``warpers`` to draw by."""
    decoder = StaticDecoder(model, prompt_ids.shape[1] + max_new_tokens - 1, step=step)
    given = model.generation_config.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    clock.put(prompt_ids)
    logits = decoder.prefill(prompt_ids)
    new: list[int] = []
    while True:
        scores = logits.float()
        if ignore_eos:
            scores[:, ends] = -torch.inf
        if warpers is None:
            token = scores.argmax(-1)
        else:
            warp: Any = warpers  # typed as if there were other tensors
            token = torch.multinomial(warp(prompt_ids, scores).softmax(-1), 1)[:, 0]
        new.append(int(token))
        clock.put(token)
        if len(new) == max_new_tokens or (new[-1] in ends and not ignore_eos):
            clock.end()
            return new
        logits = decoder.step(token)


def _warpers(temperature: float | None, top_p: float | None) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature is not None:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def resident_memory() -> tuple[int | None, int | None]:
    """Return this process's resident memory and its peak, in bytes; ``None`` where Linux's /proc is not."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return None, None
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return int(sizes["VmRSS"]) * 1024, int(sizes["VmHWM"]) * 1024


class _Clock(BaseStreamer):
    """Takes the time of every token and passes text on."""

    def __init__(self, stream: Callable[[str], object] | None, tokenizer: Any) -> None:
        self.first = self.last = 0.0
        self._prompt_seen = False
        self._stream = stream
        self._text = _TextStream(tokenizer, stream) if stream is not None and tokenizer is not None else None

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate() begins with the prompt
            self._prompt_seen = True
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self._text is not None:
            self._text.put(value)
        elif self._stream is not None:
            self._stream("".join(f"{token} " for token in value.flatten().tolist()))

    def end(self) -> None:
        if self._text is not None:
            self._text.end()


class _TextStream(TextStreamer):
    """The library's rules of when text is final, without its printing."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._sink = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._sink(text)


def _tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def _check_settings(
    max_new_tokens: int, cache: str, step: str | None, temperature: float | None, top_p: float | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if cache not in _CACHES:
        raise ValueError(f"cache must be one of {', '.join(_CACHES)}, got {cache!r}")
    if step is not None and step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _check_prompt(prompt: Any, tokenizer: Any, directory: Path) -> None:
    if isinstance(prompt, str) and tokenizer is None:
        raise ValueError(f"prompt must be token ids, for {directory} has no tokenizer; got text")
    if not isinstance(prompt, str) and not len(prompt):
        raise ValueError("prompt must hold at least one token id, got none")


def _encode(
    prompt: str | Sequence[int] | torch.Tensor, tokenizer: Any, model: PreTrainedModel
) -> torch.Tensor:
    """Return the prompt as int64 ``[1, T]``."""
    if not model.can_generate():
        raise ValueError(f"model must be one that generates, got {type(model).__name__}")
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    row = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    if row.numel() == 0:
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}, which holds none")
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    if not bool(((row >= 0) & (row < size)).all()):
        raise ValueError(f"prompt must hold token ids from 0 to {size - 1}, got {row.flatten().tolist()}")
    return row
