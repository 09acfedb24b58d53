"""Decode with a model: seconds of the steps, and the parts of the model in which they are spent.

Two ways to decode: ``generate`` of transformers, whose steps a streamer tells apart (a step is everything
from one token to the next, the code of ``generate`` included), and ``littlebit2``'s static cache, whose
steps run by Python, through ``torch.compile`` or as one CUDA graph.

The profile wraps the forward methods of modules' classes with two clock readings each. A module's share is
its own time, without the wrapped modules inside it, and the rest of a step is a part of its own, so that
the parts sum to the step. With a few hundred wrapped calls a step this costs some tenths of a percent;
``torch.profiler`` records thousands of operators and inflates exactly the short ones. Calls that compute
norms, activations and residual sums together with linear layers count as linear layers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Call, Setup, Turn
from littlebit2.architecture.decoder import fused
from littlebit2_kernels import LittleBitLinear

__all__ = [
    "PARTS",
    "Decode",
    "DecodeTimer",
    "GenerateDecode",
    "Generation",
    "LoadedDecode",
    "Profile",
    "StaticDecode",
    "generate",
    "profile_decode",
]

LINEAR, HEAD, ATTENTION, NORMS, EMBEDDING, GLUE, LOOP = PARTS = (
    "linear layers",
    "lm_head",
    "attention (rotary, cache, sdpa)",
    "norms, activation",
    "embedding",
    "model code (residual sums, mask, calls)",
    "generate (inputs, argmax, stopping)",
)


@dataclass(frozen=True)
class Generation:
    """What one call of a :class:`Decode` did.

    Attributes:
        tokens: the new tokens of the first row.
        prefill: seconds up to the first token.
        steps: seconds of each further token.
    """

    tokens: list[int]
    prefill: float
    steps: list[float]


class _StepClock:
    """A streamer: ``generate`` puts the prompt and then every token into it."""

    def __init__(self, on_token: Callable[[], object]) -> None:
        self.prompted = False
        self.times: list[float] = []
        self._on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        if self.prompted:
            self.times.append(time.perf_counter())
            self._on_token()
        self.prompted = True

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: torch.Tensor,
    tokens: int,
    *,
    on_token: Callable[[], object] = lambda: None,
    **more: Any,
) -> Generation:
    """Decode greedily.

    Args:
        model: a transformers model for causal language modeling.
        prompt: ``[1, T]`` token ids.
        tokens: number of new tokens, at least 2.
        on_token: called after each new token.
        more: further arguments of the model's ``generate``.

    Raises:
        ValueError: ``tokens`` is below 2, or the model stopped early.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, the first one being the prefill's, got {tokens}")
    clock = _StepClock(on_token)
    start = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
        **more,
    )
    if len(clock.times) != tokens:
        raise ValueError(f"generate must make {tokens} tokens, it stopped after {len(clock.times)}")
    times = clock.times
    steps = [after - before for before, after in itertools.pairwise(times)]
    return Generation(output[0, prompt.shape[1] :].tolist(), times[0] - start, steps)


class Decode(ABC):
    """A candidate for :func:`benchmarks.timing.time_interleaved`; remembers all that it measured.

    Attributes:
        model: a transformers model for causal language modeling.
        prompt: ``[rows, T]`` token ids.
        tokens: new tokens of one call, the first of which ends the prefill.
        generations: one per call.
    """

    #: Calls before anything is measured.
    warm_ups = 1

    def __init__(self, model: Any, prompt: torch.Tensor, tokens: int) -> None:
        self.model = model
        self.prompt = prompt
        self.tokens = tokens
        self.generations: list[Generation] = []

    @abstractmethod
    def run(self) -> Generation:
        """Decode once."""

    def __call__(self) -> float:
        """Decode once; returns the median of the seconds per step."""
        generation = self.run()
        self.generations.append(generation)
        return statistics.median(generation.steps)

    @property
    def steps(self) -> list[float]:
        """Seconds of every step of every call."""
        return [seconds for generation in self.generations for seconds in generation.steps]


class GenerateDecode(Decode):
    """Decodes through ``generate``."""

    def run(self, on_token: Callable[[], object] = lambda: None) -> Generation:
        """See :class:`Decode`; ``on_token`` is called after each new token."""
        return generate(self.model, self.prompt, self.tokens, on_token=on_token)


class LoadedDecode(Decode):
    """Decodes as ``littlebit2.generate`` does by default."""

    def run(self, on_token: Callable[[], object] = lambda: None) -> Generation:
        """See :class:`Decode`; ``on_token`` is called after each new token."""
        import littlebit2

        times: list[float] = []

        def stream(text: str) -> None:
            times.append(time.perf_counter())
            on_token()

        start = time.perf_counter()
        made = littlebit2.generate(
            self.model,
            self.prompt,
            max_new_tokens=self.tokens,
            stream=stream,
            ignore_eos=True,
        )
        steps = [after - before for before, after in itertools.pairwise(times)]
        return Generation(list(made.token_ids), times[0] - start, steps)


class StaticDecode(Decode):
    """Decodes through ``littlebit2``'s static cache; all steps of a call have the same, mean time.

    A step takes its token from the one before it on the device: nothing waits for the host except what this
    kind of step itself waits for.

    Args:
        model: see :class:`Decode`.
        prompt: see :class:`Decode`.
        tokens: see :class:`Decode`.
        step: ``eager``, ``compile`` or ``graph``.
    """

    #: Steps are compiled in the first call and captured in the second.
    warm_ups = 2

    def __init__(self, model: Any, prompt: torch.Tensor, tokens: int, step: str) -> None:
        from littlebit2.integrations.decoding import StaticDecoder

        super().__init__(model, prompt, tokens)
        rows, length = prompt.shape
        self._decoder = StaticDecoder(model, length + tokens, rows=rows, step=step)

    def run(self) -> Generation:
        """See :class:`Decode`."""
        start = self._now()
        token = self._decoder.prefill(self.prompt).argmax(-1)
        begun = self._now()
        made = [token]
        for _ in range(self.tokens - 1):
            made.append(self._decoder.step(made[-1]).argmax(-1))
        step = (self._now() - begun) / (self.tokens - 1)
        return Generation(torch.stack(made, 1)[0].tolist(), begun - start, [step] * (self.tokens - 1))

    def _now(self) -> float:
        if self.prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class DecodeTimer:
    """A :class:`benchmarks.timing.Timer` of :class:`Decode`: a turn is one call, which times itself."""

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        """Warm up. A step reads all weights of its model, so nothing needs to be made cold."""
        (decode,) = runs
        if not isinstance(decode, Decode):
            raise TypeError(f"runs must hold one Decode, got {type(decode).__name__}")
        for _ in range(decode.warm_ups):
            decode()
        decode.generations.clear()
        return decode


@dataclass(frozen=True)
class Profile:
    """Where the time of a step goes.

    Attributes:
        step: seconds of a step while the parts were measured.
        parts: seconds of each of :data:`PARTS`; their sum is ``step``.
        plain: seconds of a step without the clocks, decoded in turn with the others.
    """

    step: float
    parts: dict[str, float]
    plain: float

    @property
    def shares(self) -> dict[str, float]:
        """Fraction of ``step`` of each part."""
        return {name: seconds / self.step for name, seconds in self.parts.items()}


def _part(name: str, module: nn.Module) -> str | None:
    if name.startswith("lm_head"):
        return HEAD
    if isinstance(module, LittleBitLinear | nn.Linear):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    last = name.rpartition(".")[2]
    if last in ("self_attn", "rotary_emb"):
        return ATTENTION
    if last.endswith("norm") or last in ("mlp", "act_fn"):
        # Of the MLP only what is not a linear layer: the product of gate and up.
        return NORMS
    return GLUE if name == "" else None


class _Spans:
    """Own time of each part since the last :meth:`take`."""

    def __init__(self) -> None:
        self._own = dict.fromkeys(PARTS, 0.0)
        # Time of wrapped calls inside each running call.
        self._inner: list[float] = []

    def wrap(self, forward: Callable[..., Any], parts: Mapping[int, str] | str) -> Callable[..., Any]:
        """Take the time of a function, or of a method for the instances that ``parts`` names by ``id``."""
        inner, clock = self._inner, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            part = parts if isinstance(parts, str) else parts.get(id(args[0]))
            if part is None:
                return forward(*args, **kwargs)
            inner.append(0.0)
            start = clock()
            try:
                return forward(*args, **kwargs)
            finally:
                total = clock() - start
                self._own[part] += total - inner.pop()
                if inner:
                    inner[-1] += total

        return timed

    def take(self) -> dict[str, float]:
        own, self._own = self._own, dict.fromkeys(PARTS, 0.0)
        return own


@contextmanager
def _wrapped(model: nn.Module, spans: _Spans) -> Iterator[None]:
    # On the classes: a module with a method of its own is not computed together with others.
    named = ((module, _part(name, module)) for name, module in model.named_modules())
    parts = {id(module): (type(module), part) for module, part in named if part is not None}
    by_id = {key: part for key, (_, part) in parts.items()}
    owners: list[tuple[Any, str, Mapping[int, str] | str]] = [
        (kind, "forward", by_id) for kind in dict.fromkeys(kind for kind, _ in parts.values())
    ]
    owners += [(fused, name, LINEAR) for name in ("linears_together", "mlp_together")]
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, which in owners:
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, spans.wrap(getattr(owner, name), which))
        yield
    finally:
        for owner, name, own in reversed(before):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def profile_decode(decode: GenerateDecode | LoadedDecode, rounds: int = 3) -> Profile:
    """Decode with and without clocks in the modules, and tell in which parts the steps are spent.

    The figures are means over the faster half of all steps: medians would not sum up, and on a shared machine
    a disturbance hits one part by chance.

    Args:
        decode: its ``generations`` stay as they are.
        rounds: how often to decode with the clocks, and without.
    """
    plain: list[float] = []
    steps: list[tuple[float, dict[str, float]]] = []
    for _ in range(rounds):
        plain += decode.run().steps
        steps += _clocked_steps(decode)
    faster = sorted(steps, key=lambda step: step[0])[: (len(steps) + 1) // 2]
    step = statistics.fmean(seconds for seconds, _ in faster)
    parts = {name: statistics.fmean(own[name] for _, own in faster) for name in PARTS}
    parts[LOOP] = step - sum(parts.values())
    return Profile(step, parts, statistics.fmean(sorted(plain)[: (len(plain) + 1) // 2]))


def _clocked_steps(decode: GenerateDecode | LoadedDecode) -> list[tuple[float, dict[str, float]]]:
    spans = _Spans()
    taken: list[dict[str, float]] = []
    with _wrapped(decode.model, spans):
        generation = decode.run(on_token=lambda: taken.append(spans.take()))
    # The first token ends the prefill.
    return list(zip(generation.steps, taken[1:], strict=True))
