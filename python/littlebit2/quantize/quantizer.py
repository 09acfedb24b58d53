"""One layer: from a dense weight to packed paths, each quantising what the ones before left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from littlebit2_kernels.format import PackedLinear

from ._numeric import check_finite, squared_norm
from .allocate import layer_spectrum, ranks_for_energy
from .budget import counted_bpw, stored_bpw
from .dual_svid import scale_path
from .importance import Importance
from .path import MadePath, improve_paths, make_path
from .residual import Residual

if TYPE_CHECKING:
    from .config import QuantConfig

__all__ = ["LayerReport", "PathReport", "QuantizedLayer", "quantize_loaded", "quantize_weight"]


@dataclass(frozen=True)
class PathReport:
    """What one path did. Errors are squared Frobenius norms relative to the layer's weight.

    Attributes:
        rank: R.
        truncation_error: what the best real rank-``R`` approximation of this path's target leaves; ``None``
            for a path that was made without an SVD. With importance, in the weighted norm.
        error: what all paths up to this one leave.
        itq_objective: the alignment of the latent factors by iteration (:class:`.LatentRotation`);
            empty without rotation.
        itq_converged: whether Joint-ITQ reached a fixed point.
    """

    rank: int
    truncation_error: float | None
    error: float
    itq_objective: tuple[float, ...]
    itq_converged: bool


@dataclass(frozen=True)
class LayerReport:
    """What the quantisation of one layer did.

    Attributes:
        name: name of the module, empty for a bare weight.
        in_features: K.
        out_features: N.
        paths: one :class:`PathReport` per path.
        counted_bpw: bits per weight as the papers count them.
        stored_bpw: bits per weight that the packed layer holds in memory, bias excluded.
        method: what was done, ``"auto"`` resolved.
        weighted_error: the error in the norm that was minimised, where importance was given.
        predicted_error: what the allocation of ranks expected, where there was one.
    """

    name: str
    in_features: int
    out_features: int
    paths: tuple[PathReport, ...]
    counted_bpw: float
    stored_bpw: float
    method: str = ""
    weighted_error: float | None = None
    predicted_error: float | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every path."""
        return tuple(path.rank for path in self.paths)

    @property
    def error(self) -> float:
        """Squared relative Frobenius error of the whole layer (0 for an all-zero weight)."""
        return self.paths[-1].error


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A packed layer and the report of how it came about."""

    packed: PackedLinear
    report: LayerReport


def quantize_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: QuantConfig,
    importance: Importance | None = None,
) -> QuantizedLayer:
    """Quantise one dense weight by ``config.method``.

    LittleBit (arXiv 2506.13771), LittleBit-2 (arXiv 2603.00042), DBF (arXiv 2505.11076), NanoQuant (arXiv
    2602.06694). The first path approximates the weight, each later one the weight minus what is stored so
    far, float32 scales included. Methods that refine then refine each path against what all others leave, in
    turns.

    The result depends only on the arguments: the same bits on the same machine with the same number
    of threads. The global random state is neither read nor changed. Beside ``weight`` one copy of it
    in ``config.compute_dtype`` is held, and what one path takes (docs/quantization.md has figures).

    Args:
        weight: ``[N, K]``, float64, float32, float16 or bfloat16, on the device that is to compute.
        bias: ``[N]`` or ``None``; kept in float32.
        config: size, method, seed and precision.
        importance: weights of the squared error by inputs and outputs.

    Returns:
        The packed layer, on the device of ``weight``, and its report.

    Raises:
        TypeError: ``weight``, ``bias`` or ``importance`` is not a dense floating-point tensor, or ``config``
            no :class:`.QuantConfig`.
        ValueError: ``weight`` is not a non-empty finite matrix whose magnitude float32 can hold, ``bias`` or
            ``importance`` does not match it, or the budget is too small for its shape.
    """
    _check_config(config)
    return quantize_loaded(lambda: _private(weight, config), bias, config=config, importance=importance)


def quantize_loaded(
    load: Callable[[], torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    config: QuantConfig,
    importance: Importance | None = None,
) -> QuantizedLayer:
    """Quantise a weight that is loaded for it alone, and again where keeping it would take more memory.

    Args:
        load: returns the ``[N, K]`` weight, the same each time; what it returns may be overwritten.
        bias: as for :func:`quantize_weight`.
        config: likewise.
        importance: likewise.

    Returns, raises: as :func:`quantize_weight`, and what ``load`` raises.
    """
    _check_config(config)
    residual = Residual(load, config.compute_dtype, importance)
    out_features, in_features = residual.shape
    packed_bias = _packed_bias(bias, residual)
    ranks = _ranks(residual, config)
    steps = config.steps_for(in_features, out_features, ranks)
    generator = torch.Generator().manual_seed(config.seed)
    made: list[MadePath] = []
    for rank in ranks:
        made.append(make_path(residual, rank, steps, generator, config))
        residual.subtract(made[-1].path)
    if steps.refine_rounds and len(ranks) > 1:
        improve_paths(residual.matrix(), residual.paths)
    total, weighted_total = residual.total or 1.0, residual.weighted_total or 1.0
    weighted_error = squared_norm(residual.matrix()) / weighted_total
    errors = [error / total for error in residual.errors()]
    packed = PackedLinear(
        tuple(scale_path(path, residual.exponent) for path in residual.plain_paths()), packed_bias
    )
    report = LayerReport(
        name="",
        in_features=in_features,
        out_features=out_features,
        paths=tuple(
            PathReport(
                rank=one.path.rank,
                truncation_error=None if one.tail_energy is None else one.tail_energy / weighted_total,
                error=error,
                itq_objective=one.itq_objective,
                itq_converged=one.itq_converged,
            )
            for one, error in zip(made, errors, strict=True)
        ),
        counted_bpw=counted_bpw(in_features, out_features, packed.ranks),
        stored_bpw=stored_bpw(packed),
        method=steps.method,
        weighted_error=None if importance is None else weighted_error,
    )
    return QuantizedLayer(packed, report)


def _check_config(config: QuantConfig) -> None:
    if not callable(getattr(config, "ranks_for", None)):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")


def _ranks(residual: Residual, config: QuantConfig) -> tuple[int, ...]:
    if config.energy is None:
        return config.ranks_for(residual.shape[1], residual.shape[0])
    assert config.paths is not None  # set by QuantConfig
    return ranks_for_energy(layer_spectrum("", residual.matrix(), 0), config.energy, paths=config.paths).ranks


def _private(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """Return a copy of what would be overwritten."""
    taken = isinstance(weight, torch.Tensor) and weight.dtype == config.compute_dtype
    return weight.detach().clone() if taken else weight


def _packed_bias(bias: torch.Tensor | None, residual: Residual) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a real floating-point tensor, got {got}")
    if tuple(bias.shape) != residual.shape[:1]:
        raise ValueError(f"bias must have shape [{residual.shape[0]}], got {list(bias.shape)}")
    check_finite("bias", bias)
    return bias.detach().to(residual.device, torch.float32, copy=True).contiguous()
