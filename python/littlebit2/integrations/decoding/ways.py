"""How tokens are decoded: the model library's loop or ours, which cache, and how a step runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache

from littlebit2.architecture.experts import LittleBitExperts

from . import static
from .sampling import unserved

__all__ = ["CACHES", "LOOPS", "Way", "choose_way"]

CACHES = ("dynamic", "static")
#: How a step runs, by name; ``library`` is the model library's loop.
LOOPS = ("library", *static.STEPS)

#: Fewest new tokens that a CUDA graph is captured for: that takes about as long as five steps.
GRAPH_TOKENS = 16

_LIBRARY = "the model library's loop does more in Python for every token"


@dataclass(frozen=True)
class Way:
    """How tokens are decoded, and why.

    Attributes:
        step: a name of :data:`LOOPS`.
        cache: a name of :data:`CACHES`.
        reason: why.
        alternatives: why not, for every other name of :data:`LOOPS`.
    """

    step: str
    cache: str
    reason: str
    alternatives: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The choice, its reason and the alternatives, a line each."""
        lines = [f"step {self.step}, {self.cache} cache: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.alternatives.items()]
        return "\n".join(lines)


def choose_way(
    model: PreTrainedModel,
    *,
    new_tokens: int,
    padded: bool = False,
    penalized: bool = False,
    cache: str | None = None,
    step: str | None = None,
) -> Way:
    """Choose how to decode.

    Args:
        model: the model.
        new_tokens: most tokens to come.
        padded: whether prompts have different lengths.
        penalized: whether repetitions are.
        cache: a name of :data:`CACHES` that was asked for; not ``"dynamic"`` for steps that are compiled or
            captured.
        step: a name of :data:`LOOPS` that was asked for.

    Raises:
        ValueError: what was asked for cannot run; the message says why.
    """
    refusals = _refusals(model, padded, penalized)
    if step is not None:
        if step in refusals:
            raise ValueError(f"step={step!r} cannot run: {refusals[step]}")
        if step == "eager" and cache == "static" and padded:
            raise ValueError("cache must be dynamic for prompts of different lengths, got 'static'")
        return Way(step, cache or ("static" if step in ("compile", "graph") else "dynamic"), "asked for")
    why_not = {
        "library": _LIBRARY,
        "eager": "a step is many short kernels, each launched from Python",
        "compile": "compiling takes tens of seconds: --step compile for many tokens in one process",
        "graph": "capturing it takes as long as about five steps",
        **refusals,
    }
    if "eager" in refusals or (padded and cache == "static"):
        way, reason = ("library", cache or "dynamic"), why_not["eager"]
        if "eager" not in refusals:
            reason = "prompts of different lengths with a static cache"
    elif "graph" not in refusals and cache != "dynamic" and new_tokens >= GRAPH_TOKENS:
        way, reason = ("graph", "static"), "one launch replays the kernels of a whole step"
    else:
        way = ("eager", cache or "dynamic")
        reason = "the least Python around a step, and nothing to wait for before the first one"
    alternatives = {name: text for name, text in why_not.items() if name != way[0]}
    return Way(*way, reason, alternatives)


def _refusals(model: PreTrainedModel, padded: bool, penalized: bool) -> dict[str, str]:
    """Why a step cannot run, for those that cannot."""
    own = _not_ours(model)
    if own is None and padded and penalized:
        own = "repetitions are counted without padding in the model library's loop alone"
    if own is not None:
        return dict.fromkeys(static.STEPS, own)
    found = {}
    if padded:
        found["compile"] = found["graph"] = "a static cache takes prompts of one length"
    reason = static.no_graph_reason(model)
    if reason is None and any(isinstance(module, LittleBitExperts) for module in model.modules()):
        reason = "which experts run is decided on the host"
    if reason is None:
        reason = static.uncountable(model, StaticCache(config=model.config, max_cache_len=1))
    if reason is not None:
        found["graph"] = reason
    return found


def _not_ours(model: PreTrainedModel) -> str | None:
    """Why a model is decoded by the library's loop alone, or ``None``."""
    kind: Any = type(model)
    mixin: Any = GenerationMixin
    if model.config.is_encoder_decoder:
        return "the model is an encoder and a decoder"
    for name in ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"):
        if getattr(kind, name, None) is not getattr(mixin, name, None):
            return f"{kind.__name__} has a {name} of its own"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return f"{kind.__name__} makes positions of its own where it gets none"
    if getattr(kind, "_is_stateful", False):
        return f"{kind.__name__} keeps a state of its own"
    layers = DynamicCache(config=model.config).layers
    others = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if others:
        return f"{kind.__name__} has a cache of {', '.join(sorted(others))}"
    settings = unserved(model.generation_config)
    if settings:
        return f"the model's generation_config asks for {', '.join(settings)}"
    return None
