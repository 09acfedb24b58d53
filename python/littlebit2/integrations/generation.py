"""``littlebit2.generate``: text or token ids from a model, with the figures that matter for speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from littlebit2._messages import SettingError, hub_hint
from littlebit2.quantize.device import check_device

from .decoding import CACHES, LOOPS, GrowingDecoder, StaticDecoder, Way, choose_way
from .decoding.clock import Clock
from .decoding.prompts import Prompt, as_messages, check_prompt, encode, pad_left, tokenizer_of
from .decoding.sampling import Picker, Sampling
from .loading import load

__all__ = ["Generation", "generate", "generate_batch", "resident_memory"]


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        text: the new text, or ``None`` without a tokenizer.
        token_ids: the new tokens.
        prompt_tokens: length of the prompt.
        load_seconds: to load the model; 0 for a model that was given.
        prefill_seconds: from the call to the first new token; of a batch, that of all.
        decode_seconds: from the first to the last new token; of a batch, that of all.
        resident_bytes: resident memory of this process afterwards, ``None`` where it cannot be told.
        peak_resident_bytes: the most it ever was.
        way: how the tokens were decoded, and why.
        out_of_positions: whether the text ends because the model has no more positions.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float
    resident_bytes: int | None
    peak_resident_bytes: int | None
    way: Way
    out_of_positions: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, first token excluded; ``None`` for fewer than two tokens."""
        if len(self.token_ids) < 2:
            return None
        return (len(self.token_ids) - 1) / self.decode_seconds


def generate(
    model: PreTrainedModel | str | Path,
    prompt: Prompt,
    *,
    stream: Callable[[str], object] | None = None,
    **settings: Any,
) -> Generation:
    """Continue one prompt, greedily unless ``do_sample``.

    Args:
        model: a loaded model, or a directory for :func:`.loading.load`.
        prompt: text, or messages ``[{"role": "user", "content": ...}, ...]`` for the tokenizer's chat
            template, both of which need a tokenizer; or token ids ``[T]``.
        stream: called with each piece of new text as it becomes final (of token ids in decimal, with a
            space after each, if there is no tokenizer).
        **settings: of :func:`generate_batch`.

    Raises:
        TypeError, ValueError, CheckpointError, FileNotFoundError: as :func:`generate_batch`.
    """
    return _generate(model, [prompt], stream=stream, **settings)[0]


def generate_batch(
    model: PreTrainedModel | str | Path,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | None = None,
    **settings: Any,
) -> list[Generation]:
    """Continue several prompts together, padded on the left to one length.

    Args:
        model: as for :func:`generate`.
        prompts: each as for :func:`generate`.
        batch_size: prompts at a time, by default all.
        **settings: any of these.

            * ``max_new_tokens``: at least 1, by default 128; generation stops earlier where the model has no
              more positions.
            * ``tokenizer``: by default that of the model's directory, if it has one.
            * ``chat``, ``system``: take text for what the user says, after what the system says.
            * ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty``: as of
              transformers; what is not given is as in the model's ``generation_config``, but that tokens are
              drawn only with ``do_sample``.
            * ``seed``: for sampling; sets and restores the global random state.
            * ``cache``, ``step``: how to decode, names of :data:`.ways.CACHES` and :data:`.ways.LOOPS`. By
              default the fastest that is sure to be right, see :func:`.ways.choose_way`.
            * ``ignore_eos``: continue to ``max_new_tokens`` past an end-of-text token, for speed tests.
            * all others: of :func:`.loading.load`, with a directory.

    Returns:
        One :class:`Generation` for each prompt. Each ends with its own end-of-text token.

    Raises:
        TypeError: options for loading are given with a loaded model.
        ValueError: an argument is out of range or cannot run, there are no prompts, a prompt is text or
            messages and there is no tokenizer or no chat template, or it fills the model's positions.
        CheckpointError, FileNotFoundError: as :func:`.loading.load`.
    """
    if isinstance(prompts, (str, torch.Tensor)) or not len(prompts):
        raise ValueError(f"prompts must be a sequence of one prompt or more, got {prompts!r}")
    if any(isinstance(prompt, (Mapping, int)) for prompt in prompts):
        raise ValueError("prompts must hold prompts, got what looks like one prompt: put it into a list")
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, got {batch_size}")
    return _generate(model, list(prompts), stream=None, batch_size=batch_size, **settings)


def _check_settings(
    max_new_tokens: int, sampling: Sampling, cache: str | None = None, step: str | None = None
) -> None:
    """Raise :class:`SettingError` for a setting that no model takes."""
    if max_new_tokens < 1:
        raise SettingError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for name, value, known in (("cache", cache, CACHES), ("step", step, LOOPS)):
        if value is not None and value not in known:
            raise SettingError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if step in ("compile", "graph") and cache == "dynamic":
        raise SettingError(f"cache must be static for step={step!r}, got 'dynamic'")
    sampling.check()


def _generate(
    model: PreTrainedModel | str | Path,
    prompts: list[Prompt],
    *,
    stream: Callable[[str], object] | None,
    batch_size: int | None = None,
    max_new_tokens: int = 128,
    tokenizer: Any = None,
    chat: bool = False,
    system: str | None = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    cache: str | None = None,
    step: str | None = None,
    ignore_eos: bool = False,
    **load_options: Any,
) -> list[Generation]:
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    _check_settings(max_new_tokens, sampling, cache, step)
    if chat or system is not None:
        prompts = [as_messages(prompt, system) for prompt in prompts]
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
        check_device(load_options.get("device", "cpu"))
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(directory)
    for prompt in prompts:  # before the model is loaded, which takes longer to fail
        check_prompt(prompt, tokenizer, directory)
    if not isinstance(model, PreTrainedModel):
        model = load(directory, **load_options)
    load_seconds = 0.0 if given else time.perf_counter() - started
    rows = [encode(prompt, tokenizer, model) for prompt in prompts]
    size = batch_size or len(rows)
    results = []
    # Once for all batches, which draw one after another.
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            run = _Run(model, batch, sampling, max_new_tokens, ignore_eos, cache, step, tokenizer)
            clock = Clock(stream, tokenizer)
            begun = time.perf_counter()
            with torch.inference_mode():
                new = run.by_library(clock) if run.way.step == "library" else run.by_steps(clock)
            now, peak = resident_memory()
            results += [
                Generation(
                    text=None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True),
                    token_ids=tuple(tokens),
                    prompt_tokens=len(row),
                    load_seconds=load_seconds,
                    prefill_seconds=clock.first - begun,
                    decode_seconds=clock.last - clock.first,
                    resident_bytes=now,
                    peak_resident_bytes=peak,
                    way=run.way,
                    out_of_positions=len(tokens) == run.count < max_new_tokens and not run.ended(tokens),
                )
                for row, tokens in zip(batch, new, strict=True)
            ]
    return results


class _Run:
    """Prompts that are decoded together."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[torch.Tensor],
        sampling: Sampling,
        max_new_tokens: int,
        ignore_eos: bool,
        cache: str | None,
        step: str | None,
        tokenizer: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        config: Any = model.generation_config
        self.ignore_eos = ignore_eos
        ends = config.eos_token_id
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        # One prompt is never padded; a value keeps the library from warning that it chose one.
        embedding: Any = model.get_input_embeddings()
        known = range(embedding.weight.shape[0])
        named = [config.pad_token_id, *self.ends]
        self.padding = next((token for token in named if token is not None and token in known), 0)
        ids, mask = pad_left(rows, self.padding)
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)
        self.padded = not bool(mask.all())
        self.count = _within_positions(model, ids.shape[1], max_new_tokens)
        penalty = sampling.resolved(config)["repetition_penalty"]
        self.way = choose_way(
            model,
            new_tokens=self.count,
            padded=self.padded,
            penalized=penalty != 1,
            cache=cache,
            step=step,
        )

    def by_library(self, clock: Clock) -> list[list[int]]:
        """Decode with the model's own ``generate``."""
        config = self.model.generation_config
        # One row of tokens for each prompt, whatever the model's configuration asks for.
        settings: dict[str, Any] = {
            **self.sampling.given(),
            "max_new_tokens": self.count,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "tokenizer": self.tokenizer,
        }
        if self.ignore_eos:
            settings["min_new_tokens"] = self.count
        if self.way.cache == "static":
            settings["cache_implementation"] = "static"
        if config.pad_token_id != self.padding:
            settings["pad_token_id"] = self.padding
        run: Any = self.model.generate  # typed as if it might be a tensor
        beams = (config.num_beams or 1) > 1
        output = run(self.ids, attention_mask=self.mask, streamer=None if beams else clock, **settings)
        # A decoder beside an encoder begins with a token of its own.
        first = 1 if self.model.config.is_encoder_decoder else self.ids.shape[1]
        if beams:  # all tokens come at the end
            clock.put(self.ids)
            clock.put(output[0, first:])
            clock.end()
        return [self._until_end(row) for row in output[:, first:].tolist()]

    def by_steps(self, clock: Clock) -> list[list[int]]:
        """Decode step by step."""
        picker = Picker(self.sampling, self.model.generation_config, self.ends if self.ignore_eos else [])
        clock.put(self.ids)
        decoder: Any
        if self.way.cache == "static":
            length = self.ids.shape[1] + self.count - 1
            decoder = StaticDecoder(self.model, length, rows=len(self.ids), step=self.way.step)
            logits = decoder.prefill(self.ids)
        else:
            decoder = GrowingDecoder(self.model)
            logits = decoder.prefill(self.ids, self.mask if self.padded else None)
        ids, new, open_rows = self.ids, [], [True] * len(self.ids)
        while True:
            tokens = picker(ids, logits)
            values = [
                token if still else self.padding
                for token, still in zip(tokens.tolist(), open_rows, strict=True)
            ]
            new.append(values)
            clock.put(tokens)
            if not self.ignore_eos:
                open_rows = [
                    still and token not in self.ends for token, still in zip(values, open_rows, strict=True)
                ]
            if len(new) == self.count or not any(open_rows):
                clock.end()
                return [self._until_end(list(row)) for row in zip(*new, strict=True)]
            if len(values) > 1:
                tokens = torch.tensor(values, device=tokens.device)
            if picker.reads_tokens:
                ids = torch.cat([ids, tokens[:, None]], -1)
            logits = decoder.step(tokens)

    def ended(self, row: list[int]) -> bool:
        """Whether a row of new tokens ends with an end-of-text token."""
        return not self.ignore_eos and row[-1] in self.ends

    def _until_end(self, row: list[int]) -> list[int]:
        """A row of new tokens without what comes after its end-of-text token."""
        if self.ignore_eos:
            return row
        ends = (index + 1 for index, token in enumerate(row) if token in self.ends)
        return row[: next(ends, len(row))]


def _within_positions(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """The number of new tokens that the model has positions for: what comes after is noise, or fails."""
    if model.config.is_encoder_decoder:
        return max_new_tokens  # the prompt takes positions of the encoder
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


def resident_memory() -> tuple[int | None, int | None]:
    """Return this process's resident memory and its peak, in bytes; ``None`` where Linux's /proc is not."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return None, None
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS:", "VmHWM:"))}
    return int(sizes["VmRSS"]) * 1024, int(sizes["VmHWM"]) * 1024
