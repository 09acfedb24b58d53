"""One layer: from a dense weight to packed paths, each quantising what the ones before left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from littlebit2_kernels.format import PackedLinear, PackedPath

from ._numeric import binary_exponent, check_finite, check_matrix, normalised, squared_norm
from .budget import counted_bpw, stored_bpw
from .dual_svid import dual_svid, scale_path, subtract_path
from .joint_itq import joint_itq
from .svd import truncated_factors

if TYPE_CHECKING:
    from .config import QuantConfig

__all__ = ["LayerReport", "PathReport", "QuantizedLayer", "quantize_loaded", "quantize_weight"]


@dataclass(frozen=True)
class PathReport:
    """What one path did. Errors are squared Frobenius norms relative to the layer's weight.

    Attributes:
        rank: R.
        truncation_error: what the best real rank-``R`` approximation of this path's target leaves.
        error: what all paths up to this one leave.
        itq_objective: the alignment of the latent factors by iteration (:class:`.LatentRotation`);
            empty without rotation.
        itq_converged: whether Joint-ITQ reached a fixed point.
    """

    rank: int
    truncation_error: float
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
    """

    name: str
    in_features: int
    out_features: int
    paths: tuple[PathReport, ...]
    counted_bpw: float
    stored_bpw: float

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
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, config: QuantConfig
) -> QuantizedLayer:
    """Quantise one dense weight (LittleBit, arXiv 2506.13771; LittleBit-2, arXiv 2603.00042).

    Every path takes a truncated SVD of its target, rotates the latent space by Joint-ITQ (unless
    ``config.init`` is ``"dual-svid"``) and binarises both factors by Dual-SVID. The first target is the
    weight, each later one the weight minus what is stored so far, float32 scales included.

    The result depends only on the arguments: the same bits on the same machine with the same number
    of threads. The global random state is neither read nor changed. Beside ``weight`` one copy of it
    in ``config.compute_dtype`` is held, and the factors of one path.

    Args:
        weight: ``[N, K]``, float64, float32, float16 or bfloat16, on the device that is to compute.
        bias: ``[N]`` or ``None``; kept in float32.
        config: size, initialisation, seed and precision.

    Returns:
        The packed layer, on the device of ``weight``, and its report.

    Raises:
        TypeError: ``weight`` or ``bias`` is not a dense floating-point tensor, or ``config`` no
            :class:`.QuantConfig`.
        ValueError: ``weight`` is not a non-empty finite matrix whose magnitude float32 can hold,
            ``bias`` does not match it, or the budget is too small for its shape.
    """
    return quantize_loaded(lambda: weight, bias, config=config)


def quantize_loaded(
    load: Callable[[], torch.Tensor], bias: torch.Tensor | None = None, *, config: QuantConfig
) -> QuantizedLayer:
    """Quantise a weight that is loaded for it alone: it is let go once its working copy is made.

    Args:
        load: returns the ``[N, K]`` weight; called once.
        bias: as for :func:`quantize_weight`.
        config: likewise.

    Returns, raises: as :func:`quantize_weight`, and what ``load`` raises.
    """
    if not callable(getattr(config, "ranks_for", None)):
        raise TypeError(f"config must be a QuantConfig, got {type(config).__name__}")
    target, exponent = _target(load(), config.compute_dtype)
    out_features, in_features = target.shape
    packed_bias = _packed_bias(bias, target)
    total = squared_norm(target) or 1.0
    generator = torch.Generator().manual_seed(config.seed)
    paths, path_reports = [], []
    for rank in config.ranks_for(in_features, out_features):
        path, path_report = _quantize_path(target, rank, total, generator, config)
        paths.append(scale_path(path, exponent))
        path_reports.append(path_report)
    packed = PackedLinear(tuple(paths), packed_bias)
    report = LayerReport(
        name="",
        in_features=in_features,
        out_features=out_features,
        paths=tuple(path_reports),
        counted_bpw=counted_bpw(in_features, out_features, packed.ranks),
        stored_bpw=stored_bpw(packed),
    )
    return QuantizedLayer(packed, report)


def _target(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return a copy of the weight of magnitude about 1, and the power of two that was taken out."""
    check_matrix("weight", weight)
    weight = weight.detach()
    exponent = _weight_exponent(weight)
    return normalised(weight, exponent, dtype), exponent


def _quantize_path(
    target: torch.Tensor, rank: int, total: float, generator: torch.Generator, config: QuantConfig
) -> tuple[PackedPath, PathReport]:
    """Quantise ``target`` with one path and subtract that path from it in place."""
    factors = truncated_factors(target, rank)
    a, b, tail_energy = factors.a, factors.b, factors.tail_energy
    del factors
    objective: tuple[float, ...] = ()
    converged = False
    if config.init == "joint-itq":
        latent = joint_itq(
            a, b, config.itq_iterations, generator=generator, polar=config.polar, in_place=True
        )
        objective, converged = latent.objective, latent.converged
        del latent
    path = dual_svid(a, b)
    del a, b
    subtract_path(target, path)
    report = PathReport(
        rank=rank,
        truncation_error=tail_energy / total,
        error=squared_norm(target) / total,
        itq_objective=objective,
        itq_converged=converged,
    )
    return path, report


def _weight_exponent(weight: torch.Tensor) -> int:
    exponent = binary_exponent(weight)
    # float32 holds 2**-126 .. 2**128; the scales of a weight beyond it could not be stored.
    if not -126 <= exponent <= 127:
        raise ValueError(
            "weight must be zero or have its largest magnitude between 2**-126 and 2**128 (float32), "
            f"got one of about 2**{exponent}"
        )
    return exponent


def _packed_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a real floating-point tensor, got {got}")
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    check_finite("bias", bias)
    return bias.detach().to(weight.device, torch.float32, copy=True).contiguous()
