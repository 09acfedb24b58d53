"""Replace linear modules by packed ones: a whole model in place, or one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from littlebit2.architecture.expansion import collapse, expand
from littlebit2.architecture.linears import is_plain_linear
from littlebit2.architecture.places import Places, copy_hooks
from littlebit2.architecture.reads import modules_asked_for_dtype
from littlebit2.architecture.select import DEFAULT_EXCLUDE, check_patterns
from littlebit2.architecture.transposed import TransposedLinear, as_linear
from littlebit2.architecture.typed import TypedLinear
from littlebit2.quantize import Importance, LayerReport, QuantConfig
from littlebit2.quantize.allocate import RankAllocation
from littlebit2.quantize.batching import batch_key, batch_size, in_batches
from littlebit2.quantize.config import as_config
from littlebit2.quantize.device import check_device
from littlebit2.quantize.quantizer import DenseLayer, QuantizedLayer, check_layer, quantize_together
from littlebit2.quantize.ranks import check_budget, layer_config, needs_spectra, settle_ranks, spectrum_of
from littlebit2_kernels import LittleBitLinear

from .report import QuantizationReport
from .select import Filter, Selected, select_modules

__all__ = ["quantize_", "quantize_linear"]


@dataclass(frozen=True)
class _Job:
    """A module that is to be packed, with its settings."""

    selected: Selected
    config: QuantConfig
    importance: Importance | None
    device: torch.device
    predicted_error: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.selected.linear.in_features, self.selected.linear.out_features


def quantize_(
    model: nn.Module,
    config: QuantConfig | float | None = None,
    filter_fn: Filter | None = None,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = DEFAULT_EXCLUDE,
    include_tied: bool = False,
    importance: Mapping[str, Importance] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    backend: str = "auto",
    activation: str = "auto",
) -> QuantizationReport:
    """Replace the linear modules of ``model`` by packed ones, in place.

    Every ``nn.Linear`` is packed that the patterns and ``filter_fn`` select, and every ``Conv1D`` of
    transformers, which holds its weight transposed (:mod:`.transposed`). Output heads stay dense, modules
    that share their weight, such as a head tied to the embedding, routers, layers whose weight the model's
    own code reads (:func:`.dense_reasons`), and layers that are too small for the bits per weight. The report
    lists what stays dense and why. Experts that the model holds as fused tensors become modules of their own
    (:class:`.LittleBitExperts`).

    All or nothing: every weight is checked before the first one is quantized, and modules are replaced once
    all of them are. If a layer cannot be quantized, or the call is interrupted, the model is as it was.
    Memory holds the dense model, the packed layers and the working memory of one batch of layers.

    Each layer's seed comes from ``config.seed`` and its name: the result depends neither on the order nor on
    the selection, nor on which small layers of one shape are worked on together
    (:mod:`littlebit2.quantize.batching`). A module registered under several names is quantized once, by its
    first name, and replaced under all of them; it is excluded if one of them is.

    Args:
        model: any module that holds linear modules below its root.
        config: settings, or the counted bits per weight as a number; 1.0 by default. ``kv_factor`` applies to
            names ending in ``k_proj`` or ``v_proj``.
        filter_fn: ``filter_fn(module, name) -> bool``, for each ``nn.Linear`` that the patterns select.
        include: shell-style pattern or patterns on full module names, case-sensitive.
        exclude: likewise; wins over ``include``. The default keeps heads dense: those of the usual names and
            what ``model.get_output_embeddings()`` returns. ``exclude=()`` packs them.
        include_tied: whether to pack modules that share their weight, which unties them.
        importance: by module name, from :func:`littlebit2.collect_importance`; layers without one weigh all
            errors alike.
        device: where to compute, by default where each weight is.
        progress: whether to show a progress bar, where stderr is a terminal.
        backend: backend of the packed modules (:func:`littlebit2_kernels.littlebit_linear`).
        activation: likewise.

    Returns:
        What was packed and what was left dense.

    Raises:
        TypeError: an argument has a wrong type; the message names it.
        ValueError: nothing can be packed (the message says what was seen), ``model`` itself is the linear
            module, ``bpw`` is more than any layer can use, ``device``, ``backend`` or ``activation`` cannot
            be used, or a weight, bias or importance cannot be quantized (the message names the layer).
        RuntimeError: the decomposition of a layer did not converge (the message names it).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    settings = as_config(config)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable or None, got {type(filter_fn).__name__}")
    patterns = check_patterns("include", include), check_patterns("exclude", exclude)
    weights = _check_importance(importance)
    place = None if device is None else check_device(device)
    _check_options(backend, activation)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model must hold its linear modules below its root, got an nn.Linear itself; "
            "littlebit2.quantize_linear quantizes one layer"
        )
    before = _nbytes(model)
    experts = expand(model)
    try:
        selection = select_modules(model, settings, *patterns, filter_fn, include_tied=include_tied)
        jobs = _jobs(selection.packed, settings, weights, place)
        asked = modules_asked_for_dtype(model)
        reports, modules = _quantized(jobs, backend, activation, progress, asked)
        _swap(model, {name: modules[one.name] for one in selection.packed for name in one.names})
    finally:
        collapse(model, experts)
    layers = tuple(reports[one.name] for one in selection.packed)
    return QuantizationReport(layers, selection.dense, before, _nbytes(model))


def quantize_linear(
    linear: nn.Module,
    config: QuantConfig | float | None = None,
    *,
    importance: Importance | None = None,
    name: str = "",
    device: torch.device | str | None = None,
    backend: str = "auto",
    activation: str = "auto",
) -> LittleBitLinear:
    """Quantize one linear module; it is left as it is.

    Args:
        linear: a module that computes ``x W^T + b`` (:func:`.is_plain_linear`), or a ``Conv1D``, which holds
            its weight as ``[K, N]``.
        config: settings, or the counted bits per weight as a number; 1.0 by default.
        importance: weights of the squared error by inputs and outputs.
        name: full name of the module in its model. With it the result is that of :func:`quantize_`, whose
            seeds and ``kv_factor`` depend on names; without, the seed is ``config.seed``.
        device: where to compute, by default where the weight is.
        backend: backend of the packed module (:func:`littlebit2_kernels.littlebit_linear`).
        activation: likewise.

    Returns:
        The packed module, on the device of ``linear``.

    Raises:
        TypeError: an argument has a wrong type; the message names it.
        ValueError: the budget is too small for the layer or more than it can use, ``device``, ``backend`` or
            ``activation`` cannot be used, or the weight, bias or importance cannot be quantized.
        RuntimeError: the decomposition did not converge.
    """
    linear = as_linear(linear)
    if not isinstance(linear, nn.Linear) or not is_plain_linear(linear):
        raise TypeError(
            f"linear must be a torch.nn.Linear that computes x W^T + b, got {type(linear).__name__}; "
            "littlebit2.quantize_weight quantizes a bare weight"
        )
    settings = as_config(config)
    if importance is not None and not isinstance(importance, Importance):
        raise TypeError(f"importance must be an Importance or None, got {type(importance).__name__}")
    place = None if device is None else check_device(device)
    _check_options(backend, activation)
    (job,) = _jobs([Selected((name,), linear)], settings, {name: importance} if importance else {}, place)
    if not name:
        job = replace(job, config=replace(job.config, seed=settings.seed))
    (quantized,) = quantize_together([_dense_layer(job)])
    return _module(linear, quantized, backend, activation)


def _check_importance(importance: Mapping[str, Importance] | None) -> Mapping[str, Importance]:
    if importance is None:
        return {}
    if not isinstance(importance, Mapping):
        raise TypeError(f"importance must map module names to Importance, got {type(importance).__name__}")
    for name, one in importance.items():
        if not isinstance(one, Importance):
            raise TypeError(f"importance[{name!r}] must be an Importance, got {type(one).__name__}")
    return importance


def _check_options(backend: str, activation: str) -> None:
    """Let a tiny packed module check them: after the quantization would be late."""
    LittleBitLinear(8, 8, (8,), backend=backend, activation=activation, device="meta")


def _jobs(
    packed: Sequence[Selected],
    config: QuantConfig,
    importance: Mapping[str, Importance],
    device: torch.device | None,
) -> list[_Job]:
    """Check every weight and settle every rank, before any work."""
    check_budget(config, ((one.name, one.linear.in_features, one.linear.out_features) for one in packed))
    for one in packed:
        weight, bias = one.linear.weight.detach(), one.linear.bias
        check_layer(one.name, weight, None if bias is None else bias.detach(), importance.get(one.name))
    allocation: Mapping[str, RankAllocation] = {}
    if needs_spectra(config):
        spectra = (
            spectrum_of(one.name, one.linear.weight.detach(), config, importance.get(one.name))
            for one in packed
        )
        allocation = settle_ranks(spectra, config)
    return [
        _Job(
            one,
            layer_config(
                one.name, one.linear.in_features, one.linear.out_features, config, allocation.get(one.name)
            ),
            importance.get(one.name),
            device or one.linear.weight.device,
            allocation[one.name].predicted_error if one.name in allocation else None,
        )
        for one in packed
    ]


def _quantized(
    jobs: Sequence[_Job], backend: str, activation: str, progress: bool, asked: Set[str]
) -> tuple[dict[str, LayerReport], dict[str, LittleBitLinear]]:
    """Return reports and packed modules by name; of which ``asked`` are asked for a dtype."""
    batches = in_batches(
        jobs,
        lambda job: (batch_key(*job.shape, job.config), job.device, job.selected.linear.weight.dtype),
        lambda job: batch_size(*job.shape, job.config, job.device),
    )
    reports: dict[str, LayerReport] = {}
    modules: dict[str, LittleBitLinear] = {}
    with tqdm(total=len(jobs), desc="quantize", unit="layer", disable=None if progress else True) as bar:
        for batch in batches:
            made = quantize_together([_dense_layer(job) for job in batch])
            for job, quantized in zip(batch, made, strict=True):
                name = job.selected.name
                typed = not asked.isdisjoint(job.selected.names)
                modules[name] = _module(job.selected.linear, quantized, backend, activation, typed=typed)
                reports[name] = replace(quantized.report, predicted_error=job.predicted_error)
                bar.update()
    return reports, modules


def _dense_layer(job: _Job) -> DenseLayer:
    linear = job.selected.linear

    def load() -> torch.Tensor:
        return linear.weight.detach().to(job.device, copy=True)

    return DenseLayer(load, job.config, linear.bias, job.importance, name=job.selected.name)


def _module(
    linear: nn.Linear, quantized: QuantizedLayer, backend: str, activation: str, *, typed: bool = False
) -> LittleBitLinear:
    packed = quantized.packed.to(linear.weight.device)
    how: dict[str, Any] = {"backend": backend, "activation": activation}
    module = (
        TypedLinear.from_packed(packed, weight_dtype=linear.weight.dtype, **how)
        if typed
        else LittleBitLinear.from_packed(packed, **how)
    )
    return module.train(linear.training)


def _swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Register ``modules`` by name with the hooks of those that they replace, or none of them."""
    before = {name: model.get_submodule(name) for name in modules}
    places = Places(model)
    try:
        for name, module in modules.items():
            places.put(name, module)
    except BaseException:
        for name, module in before.items():
            places.put(name, module)
        raise
    for name, module in modules.items():
        old = before[name]
        source = old.source if isinstance(old, TransposedLinear) else old
        copy_hooks(source, module)


def _nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; those of a lazy module count once they exist."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*model.parameters(), *model.buffers())
        if not is_lazy(tensor)
    )
