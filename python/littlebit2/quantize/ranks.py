"""Ranks and seeds of a model's layers: from its budget, their names and, where asked for, their spectra."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import torch

from littlebit2.architecture.names import is_key_or_value
from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape

from .allocate import LayerSpectrum, RankAllocation, allocate_ranks, layer_spectrum, ranks_for_energy
from .budget import largest_rank
from .config import QuantConfig
from .importance import Importance

__all__ = ["check_budget", "layer_config", "needs_spectra", "settle_ranks", "spectrum_of", "too_small"]


#: Stored bits per weight from which packing saves nothing.
_DENSE_BITS = 16


def too_small(name: str, in_features: int, out_features: int, config: QuantConfig) -> str | None:
    """Return why a layer of a model is too small to be packed, ``None`` if it is not.

    Its bits per weight do not pay for more than its scale vectors, or it would store no fewer bits than a
    dense float16 layer. Where ranks depend on spectra, the uniform or the smallest ones count.
    """
    k, n = in_features, out_features
    if not k * n:
        return f"layer {name!r}: has no weights, {n} x {k}"
    try:
        if config.energy is not None:
            ranks: tuple[int, ...] | None = (RANK_MULTIPLE,) * (config.paths or 1)
        else:
            ranks = layer_config(name, k, n, replace(config, budget="uniform")).ranks
    except ValueError as error:
        return str(error)
    assert ranks is not None  # settled by layer_config
    stored = LayerShape(k, n, ranks).stored_bpw
    if stored < _DENSE_BITS:
        return None
    return (
        f"layer {name!r}: ranks {list(ranks)} would store {stored:.3g} bits per weight of its "
        f"{n} x {k} weights, no less than {_DENSE_BITS}"
    )


def check_budget(config: QuantConfig, layers: Iterable[tuple[str, int, int]]) -> None:
    """Raise ``ValueError`` if the bits per weight or ranks are more than any layer of a model can use.

    Or if ranks depend on the model's output, which is measured only where there is text.

    A layer that cannot use them all where others can is no error: reports and plans say ``at_largest_rank``.

    Args:
        config: of the model.
        layers: name, K and N of every layer that is to be quantized.
    """
    if config.budget == "kl":
        raise ValueError(
            "budget='kl' needs text, on which the model's output is measured: use quantize_blockwise "
            "(littlebit2 quantize --data TEXT)"
        )
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
    of the layers nor on which others are quantized. ``config.kv_factor`` applies to names ending in
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
