"""A whole model: quantise the selected ``nn.Linear`` modules in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from tqdm import tqdm

from littlebit2_kernels.format import PackedLinear

from .config import QuantConfig
from .quantizer import LayerReport, quantize_weight

__all__ = ["DEFAULT_EXCLUDE", "Replace", "check_patterns", "is_selected", "layer_config", "quantize_linears"]

#: The papers leave the output head dense.
DEFAULT_EXCLUDE = ("*lm_head*",)

_KV_SUFFIXES = ("k_proj", "v_proj")

#: Makes the module that takes the place of a quantised ``nn.Linear``.
Replace = Callable[[nn.Linear, PackedLinear], nn.Module]


@dataclass(frozen=True)
class _Job:
    """One linear module to quantise: all names it goes by, and its ranks."""

    names: tuple[str, ...]
    config: QuantConfig


def quantize_linears(
    model: nn.Module,
    config: QuantConfig,
    replace_module: Replace,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantise the selected linear modules of ``model`` in place.

    Selected is every module of exactly the type ``nn.Linear`` (a subclass may compute something
    else) with a name that matches a pattern of ``include`` and none of ``exclude``. Ranks of all
    layers are settled before the first one is touched, so that a budget that does not fit leaves the
    model as it was. Each layer's seed comes from ``config.seed`` and its name: the result depends
    neither on the order nor on the selection. A module registered under several names is quantised
    once and replaced under all of them; each dense weight can be freed as soon as it is replaced.

    Args:
        model: any module that holds linear modules below its root.
        config: as for :func:`.quantize_weight`; ``kv_factor`` applies to names ending in ``k_proj`` or
            ``v_proj``.
        replace_module: called with the dense module and its packed weight (on the dense module's
            device), returns what replaces it.
        include: shell-style pattern or patterns on the full module name, case-sensitive.
        exclude: likewise; wins over ``include``.
        device: where to compute, by default where each weight is.
        progress: whether to show a progress bar.

    Returns:
        One report per quantised module, with its (first) name, in the order of ``named_modules``.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: no module is selected, ``model`` itself is the linear module, or a layer cannot be
            quantised (the message names it; layers before it stay replaced).
        RuntimeError: the decomposition of a layer did not converge (the message names it).
    """
    jobs = _plan(model, config, check_patterns("include", include), check_patterns("exclude", exclude))
    reports = []
    for job in tqdm(jobs, desc="quantize", unit="layer", disable=not progress):
        linear = model.get_submodule(job.names[0])
        assert isinstance(linear, nn.Linear)
        report, packed = _quantize(linear, job, device)
        substitute = replace_module(linear, packed)
        for name in job.names:
            model.set_submodule(name, substitute)
        reports.append(report)
    return reports


def check_patterns(name: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return ``patterns`` as a tuple; ``TypeError`` naming the argument ``name`` unless all are strings."""
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must hold strings, got {pattern!r}")
    return listed


def _plan(
    model: nn.Module, config: QuantConfig, include: Sequence[str], exclude: Sequence[str]
) -> list[_Job]:
    names_of: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and is_selected(name, include, exclude):
            names_of.setdefault(module, []).append(name)
    if not names_of:
        raise ValueError(
            f"include must select at least one nn.Linear of the model, got include={list(include)}, "
            f"exclude={list(exclude)}"
        )
    if isinstance(model, nn.Linear):
        raise ValueError("model must hold its linear modules below its root, got an nn.Linear itself")
    return [_job(linear, tuple(names), config) for linear, names in names_of.items()]


def layer_config(name: str, in_features: int, out_features: int, config: QuantConfig) -> QuantConfig:
    """Return the configuration of one layer of a model: its ranks and its own seed settled.

    The seed comes from ``config.seed`` and the name, so that a layer's result depends neither on the order
    of the layers nor on which others are quantised. ``config.kv_factor`` applies to names ending in
    ``k_proj`` or ``v_proj``.

    Args:
        name: full module name.
        in_features: K.
        out_features: N.
        config: of the model.

    Raises:
        ValueError: the budget does not fit the layer; the message names it.
    """
    try:
        ranks = config.ranks_for(in_features, out_features, is_kv=name.endswith(_KV_SUFFIXES))
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1  # a generator takes 63 bits
    return replace(config, bpw=None, ranks=ranks, seed=seed)


def _job(linear: nn.Linear, names: tuple[str, ...], config: QuantConfig) -> _Job:
    return _Job(names, layer_config(names[0], linear.in_features, linear.out_features, config))


def _quantize(
    linear: nn.Linear, job: _Job, device: torch.device | str | None
) -> tuple[LayerReport, PackedLinear]:
    name = job.names[0]
    home = linear.weight.device
    try:
        if linear.weight.is_meta:
            raise ValueError("weight must hold values, got a tensor on the meta device")
        weight = linear.weight.detach().to(device or home)
        quantized = quantize_weight(weight, linear.bias, config=job.config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error
    return replace(quantized.report, name=name), quantized.packed.to(home)


def is_selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether ``name`` matches a shell-style pattern of ``include`` and none of ``exclude``."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return matches(include) and not matches(exclude)
