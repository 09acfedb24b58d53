"""A whole model: quantise the selected ``nn.Linear`` modules in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from littlebit2.architecture.experts import collapse_experts, expand_experts
from littlebit2.architecture.linears import choose_linears
from littlebit2.architecture.names import is_key_or_value
from littlebit2.architecture.select import DEFAULT_EXCLUDE, check_patterns
from littlebit2_kernels.format import PackedLinear

from .allocate import LayerSpectrum, RankAllocation, allocate_ranks, layer_spectrum, ranks_for_energy
from .batching import batch_key, batch_size, in_batches
from .budget import largest_rank
from .config import QuantConfig
from .device import check_device
from .importance import Importance
from .quantizer import DenseLayer, LayerReport, QuantizedLayer, quantize_together

__all__ = [
    "Replace",
    "check_budget",
    "layer_config",
    "needs_spectra",
    "quantize_linears",
    "settle_ranks",
    "spectrum_of",
]

#: Makes the module that takes the place of a quantised ``nn.Linear``.
Replace = Callable[[nn.Linear, PackedLinear], nn.Module]


@dataclass(frozen=True)
class _Job:
    """One linear module to quantise: all names it goes by, and its configuration."""

    names: tuple[str, ...]
    config: QuantConfig
    predicted_error: float | None


def quantize_linears(
    model: nn.Module,
    config: QuantConfig,
    replace_module: Replace,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    importance: Mapping[str, Importance] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantise the selected linear modules of ``model`` in place.

    Selected is every linear module with a name that matches a pattern of ``include`` and none of
    ``exclude``, unless it is tied, a router, the head (see ``exclude``) or read as a tensor by the model's
    own code (:func:`.dense_reasons`). Experts that the model holds as fused tensors become modules of their
    own (:class:`.LittleBitExperts`). Ranks of all
    layers are settled before the first one is touched, so that a budget that does not fit leaves the
    model as it was. Each layer's seed comes from ``config.seed`` and its name: the result depends
    neither on the order nor on the selection, nor on which small layers of one shape are worked on together
    (:mod:`.batching`). A module registered under several names is quantised once and replaced under all of
    them; each dense weight can be freed as soon as it is replaced.

    Args:
        model: any module that holds linear modules below its root.
        config: as for :func:`.quantize_weight`; ``kv_factor`` applies to names ending in ``k_proj`` or
            ``v_proj``.
        replace_module: called with the dense module and its packed weight (on the dense module's
            device), returns what replaces it.
        include: shell-style pattern or patterns on the full module name, case-sensitive.
        exclude: likewise; wins over ``include``.
        importance: by module name, from :func:`.collect_importance`; layers that are not in it weigh all
            errors alike.
        device: where to compute, by default where each weight is.
        progress: whether to show a progress bar.

    Returns:
        One report per quantised module, with its (first) name, in the order of ``named_modules``.

    Raises:
        TypeError: a pattern is not a string.
        ValueError: no module is selected, ``model`` itself is the linear module, ``bpw`` is more than any
            layer can use, ``device`` cannot be used, or a layer cannot be quantised (the message names it;
            batches before its own stay replaced).
        RuntimeError: the decomposition of a layer did not converge (the message names it).
    """
    weights = importance or {}
    if device is not None:
        device = check_device(device)
    experts = expand_experts(model)
    try:
        jobs = _plan(
            model, config, check_patterns("include", include), check_patterns("exclude", exclude), weights
        )
        reports: dict[str, LayerReport] = {}

        def shape_of(job: _Job) -> tuple[int, int]:
            linear = _linear(model, job)
            return linear.in_features, linear.out_features

        def where(job: _Job) -> torch.device:
            return torch.device(device or _linear(model, job).weight.device)

        batches = in_batches(
            jobs,
            lambda job: (batch_key(*shape_of(job), job.config), where(job), _linear(model, job).weight.dtype),
            lambda job: batch_size(*shape_of(job), job.config, where(job)),
        )
        with tqdm(total=len(jobs), desc="quantize", unit="layer", disable=None if progress else True) as bar:
            for batch in batches:
                for job, quantized in zip(batch, _quantize(model, batch, weights, device), strict=True):
                    linear = _linear(model, job)
                    substitute = replace_module(linear, quantized.packed.to(linear.weight.device))
                    del linear
                    for name in job.names:
                        model.set_submodule(name, substitute)
                    reports[job.names[0]] = replace(quantized.report, predicted_error=job.predicted_error)
                    bar.update()
    finally:
        collapse_experts(model, experts)
    return [reports[job.names[0]] for job in jobs]


def _plan(
    model: nn.Module,
    config: QuantConfig,
    include: Sequence[str],
    exclude: Sequence[str],
    importance: Mapping[str, Importance],
) -> list[_Job]:
    names_of, dense = choose_linears(model, include, exclude)
    if not names_of:
        kept = "".join(f"; {name} stays dense: {reason}" for name, reason in list(dense.items())[:3])
        raise ValueError(
            f"include must select at least one nn.Linear of the model, got include={list(include)}, "
            f"exclude={list(exclude)}{kept}"
        )
    if isinstance(model, nn.Linear):
        raise ValueError("model must hold its linear modules below its root, got an nn.Linear itself")
    named = {names[0]: linear for linear, names in names_of.items()}
    check_budget(config, ((name, one.in_features, one.out_features) for name, one in named.items()))
    allocation: Mapping[str, RankAllocation] = {}
    if needs_spectra(config):
        allocation = settle_ranks(
            (
                spectrum_of(name, _values(name, linear), config, importance.get(name))
                for name, linear in named.items()
            ),
            config,
        )
    return [
        _Job(
            tuple(names_of[linear]),
            layer_config(name, linear.in_features, linear.out_features, config, allocation.get(name)),
            allocation[name].predicted_error if name in allocation else None,
        )
        for name, linear in named.items()
    ]


def check_budget(config: QuantConfig, layers: Iterable[tuple[str, int, int]]) -> None:
    """Raise ``ValueError`` if the bits per weight or ranks are more than any layer of a model can use.

    A layer that cannot use them all where others can is no error: reports and plans say ``at_largest_rank``.

    Args:
        config: of the model.
        layers: name, K and N of every layer that is to be quantised.
    """
    shapes = list(layers)
    config.check_usable((k, n, is_key_or_value(name)) for name, k, n in shapes)
    most = max((largest_rank(k, n) for _, k, n in shapes), default=None)
    if config.ranks is not None and most is not None and max(config.ranks) > most:
        raise ValueError(
            f"ranks must be at most {most}, the largest that any layer can use, got {list(config.ranks)}"
        )


def needs_spectra(config: QuantConfig) -> bool:
    """Whether the ranks of a model depend on the spectra of its weights, not on shapes alone."""
    return config.budget == "spectral" or config.energy is not None


def spectrum_of(
    name: str, weight: torch.Tensor, config: QuantConfig, importance: Importance | None = None
) -> LayerSpectrum:
    """Measure what :func:`settle_ranks` needs to know of one layer, of its weighted weight with importance.

    Raises:
        TypeError: ``weight`` is not a real floating-point tensor.
        ValueError: it is not a non-empty finite matrix, or the budget does not fit; the message names the
            layer.
    """
    n, k = weight.shape
    rank = 0
    if config.energy is None:
        settled = layer_config(name, k, n, replace(config, budget="uniform")).ranks
        assert settled is not None  # layer_config settles them
        rank = settled[0]
    try:
        if importance is None:
            return layer_spectrum(name, weight, rank)
        weighted = weight.detach().float()
        rows, columns = importance.factors((n, k), weighted.dtype, weighted.device)
        weighted = weighted * rows.unsqueeze(1) * columns
        return layer_spectrum(name, weighted, rank, importance.stake(weighted))
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"layer {name!r}: {error}") from error


def settle_ranks(spectra: Iterable[LayerSpectrum], config: QuantConfig) -> dict[str, RankAllocation]:
    """Settle the ranks of a model's layers by ``config.budget`` or ``config.energy``, by layer name."""
    assert config.paths is not None  # set by QuantConfig
    layers = list(spectra)
    if config.energy is None:
        settled = allocate_ranks(layers, paths=config.paths)
    else:
        settled = [ranks_for_energy(layer, config.energy, paths=config.paths) for layer in layers]
    return {allocation.name: allocation for allocation in settled}


def layer_config(
    name: str,
    in_features: int,
    out_features: int,
    config: QuantConfig,
    allocation: RankAllocation | None = None,
) -> QuantConfig:
    """Return the configuration of one layer of a model: its ranks and its own seed settled.

    The seed comes from ``config.seed`` and the name, so that a layer's result depends neither on the order
    of the layers nor on which others are quantised. ``config.kv_factor`` applies to names ending in
    ``k_proj`` or ``v_proj``.

    Args:
        name: full module name.
        in_features: K.
        out_features: N.
        config: of the model.
        allocation: the ranks, where they come from :func:`settle_ranks`.

    Raises:
        ValueError: the budget does not fit the layer (the message names it), or the ranks depend on its
            spectrum and there is no allocation.
    """
    if allocation is not None:
        ranks = allocation.ranks
    elif needs_spectra(config):
        raise ValueError(f"layer {name!r}: budget='spectral' and energy need its weight, got shapes alone")
    else:
        try:
            ranks = config.ranks_for(in_features, out_features, is_kv=is_key_or_value(name))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1  # a generator takes 63 bits
    return replace(config, bpw=None, energy=None, budget="uniform", ranks=ranks, paths=None, seed=seed)


def _values(name: str, linear: nn.Linear) -> torch.Tensor:
    if linear.weight.is_meta:
        raise ValueError(f"layer {name!r}: weight must hold values, got a tensor on the meta device")
    return linear.weight.detach()


def _linear(model: nn.Module, job: _Job) -> nn.Linear:
    linear = model.get_submodule(job.names[0])
    assert isinstance(linear, nn.Linear)
    return linear


def _quantize(
    model: nn.Module,
    batch: Sequence[_Job],
    importance: Mapping[str, Importance],
    device: torch.device | str | None,
) -> list[QuantizedLayer]:
    def loader(job: _Job) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            weight = _linear(model, job).weight
            if weight.is_meta:
                raise ValueError("weight must hold values, got a tensor on the meta device")
            return weight.detach().to(device or weight.device, copy=True)

        return load

    return quantize_together(
        [
            DenseLayer(
                loader(job),
                job.config,
                _linear(model, job).bias,
                importance.get(job.names[0]),
                name=job.names[0],
            )
            for job in batch
        ]
    )
