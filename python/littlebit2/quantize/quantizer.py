"""One layer: from a dense weight to packed paths, each quantizing what the ones before left over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from littlebit2_kernels.format import PackedLinear

from .allocate import layer_spectrum, ranks_for_energy
from .batching import keeps_bits
from .budget import at_largest_rank
from .config import QuantConfig, as_config
from .importance import Importance
from .methods import Steps
from .path import MadePath, improve_paths, make_paths
from .residual import Residual, weight_exponent
from .solvers.dual_svid import scale_path
from .solvers.numerics import check_finite, check_matrix, squared_norm

__all__ = [
    "DenseLayer",
    "LayerReport",
    "PathReport",
    "QuantizedLayer",
    "check_layer",
    "quantize_together",
    "quantize_weight",
]


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
    """What the quantization of one layer did.

    Attributes:
        name: name of the module, empty for a bare weight.
        in_features: K.
        out_features: N.
        paths: one :class:`PathReport` per path.
        counted_bpw: bits per weight as the papers count them.
        stored_bpw: bits per weight that the packed layer holds in memory, bias excluded.
        method: what was done, ``"auto"`` resolved.
        weighted_error: the error in the norm that was minimized, where importance was given.
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
    def at_largest_rank(self) -> bool:
        """Whether every path has rank ``min(K, N)``, rounded up to 8: the most that bits per weight buy."""
        return at_largest_rank(self.in_features, self.out_features, self.ranks)

    @property
    def error(self) -> float:
        """Squared relative Frobenius error of the whole layer (0 for an all-zero weight)."""
        return self.paths[-1].error


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A packed layer and the report of how it came about."""

    packed: PackedLinear
    report: LayerReport


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A layer to quantize.

    Attributes:
        load: returns the ``[N, K]`` weight, the same each time; what it returns may be overwritten.
        config: as for :func:`quantize_weight`.
        bias: likewise.
        importance: likewise.
        name: of the module, for reports and errors.
        steps: settings of the solvers other than those that ``config`` leads to, for ablations.
    """

    load: Callable[[], torch.Tensor]
    config: QuantConfig
    bias: torch.Tensor | None = None
    importance: Importance | None = None
    name: str = ""
    steps: Steps | None = None


def quantize_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: QuantConfig | float,
    importance: Importance | None = None,
) -> QuantizedLayer:
    """Quantize one dense weight by ``config.method``.

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
        config: size, method, seed and precision; or a number, the bits per weight.
        importance: weights of the squared error by inputs and outputs.

    Returns:
        The packed layer, on the device of ``weight``, and its report.

    Raises:
        TypeError: ``weight``, ``bias`` or ``importance`` is not a dense floating-point tensor, or ``config``
            neither a :class:`.QuantConfig` nor a number.
        ValueError: ``weight`` is not a non-empty finite matrix whose magnitude float32 can hold, ``bias`` or
            ``importance`` does not match it, or the budget is too small for its shape or more than it
            can use.
    """
    config = as_config(config)
    (layer,) = quantize_together([DenseLayer(lambda: _private(weight, config), config, bias, importance)])
    return layer


def quantize_together(layers: Sequence[DenseLayer]) -> list[QuantizedLayer]:
    """Quantize layers of one shape and configuration in a batch; each comes out as it would alone.

    A weight is loaded for its layer alone, and again where keeping it would take more memory. Steps of ADMM
    and of refinement are done for all layers at once; decompositions, rotations and turns between several
    paths one layer after the other.

    Args:
        layers: at least one; with several, shapes, devices and configurations are equal but for seeds, and
        ranks
            are settled (:func:`.layer_config`).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`quantize_weight`, and what a ``load`` raises; the
        message
            names the layer where it has a name.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    for layer in layers:
        if (
            replace(layer.config, seed=0) != replace(layers[0].config, seed=0)
            or layer.steps != layers[0].steps
        ):
            raise ValueError("layers of a batch must have equal configurations but for seeds")
    if len(layers) > 1 and layers[0].config.ranks is None:
        raise ValueError("layers of a batch must have settled ranks, got a configuration with none")
    config = layers[0].config
    residuals, biases = [], []
    for layer in layers:
        with _named(layer.name):
            residuals.append(Residual(layer.load, config.compute_dtype, layer.importance))
            biases.append(_packed_bias(layer.bias, residuals[-1]))
            if residuals[-1].shape != residuals[0].shape:
                raise ValueError(
                    f"weight must have the shape {list(residuals[0].shape)} of the batch, got "
                    f"{list(residuals[-1].shape)}"
                )
    with _named(layers[0].name if len(layers) == 1 else ""):
        ranks = _ranks(residuals[0], config)
        n, k = residuals[0].shape
        steps = layers[0].steps or config.steps_for(k, n, ranks)
        generators = [torch.Generator().manual_seed(layer.config.seed) for layer in layers]
        alone = residuals[0].device.type == "cpu" and not keeps_bits(residuals[0].shape)
        step = 1 if alone else len(layers)
        made: list[list[MadePath]] = []  # by paths, then layers
        for rank in ranks:
            made.append(
                [
                    one
                    for at in range(0, len(layers), step)
                    for one in make_paths(residuals[at : at + step], rank, steps, generators[at : at + step])
                ]
            )
            for residual, one in zip(residuals, made[-1], strict=True):
                residual.subtract(one.path)
        finished = []
        for i, layer in enumerate(layers):
            if steps.refine_rounds and len(ranks) > 1:
                improve_paths(residuals[i].matrix(), residuals[i].paths)
            finished.append(_finished(layer, residuals[i], biases[i], [path[i] for path in made], steps))
    return finished


def _finished(
    layer: DenseLayer,
    residual: Residual,
    bias: torch.Tensor | None,
    made: Sequence[MadePath],
    steps: Steps,
) -> QuantizedLayer:
    total, weighted_total = residual.total or 1.0, residual.weighted_total or 1.0
    weighted_error = squared_norm(residual.matrix()) / weighted_total
    errors = [error / total for error in residual.errors()]
    paths = tuple(scale_path(path, residual.exponent) for path in residual.plain_paths())
    packed = PackedLinear(paths, bias)
    n, k = residual.shape
    report = LayerReport(
        name=layer.name,
        in_features=k,
        out_features=n,
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
        counted_bpw=packed.shape.counted_bpw,
        stored_bpw=packed.shape.stored_bpw,
        method=steps.method,
        weighted_error=None if layer.importance is None else weighted_error,
    )
    return QuantizedLayer(packed, report)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in an error which layer it was."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if not name:
            raise
        raise type(error)(f"layer {name!r}: {error}") from error


def _ranks(residual: Residual, config: QuantConfig) -> tuple[int, ...]:
    if config.energy is None:
        n, k = residual.shape
        config.check_usable([(k, n, False)])
        return config.ranks_for(k, n)
    assert config.paths is not None  # set by QuantConfig
    return ranks_for_energy(layer_spectrum("", residual.matrix(), 0), config.energy, paths=config.paths).ranks


def _private(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """Return a copy of what would be overwritten."""
    taken = isinstance(weight, torch.Tensor) and weight.dtype == config.compute_dtype
    return weight.detach().clone() if taken else weight


def _packed_bias(bias: torch.Tensor | None, residual: Residual) -> torch.Tensor | None:
    if bias is None:
        return None
    _check_bias(bias, residual.shape[0])
    return bias.detach().to(residual.device, torch.float32, copy=True).contiguous()


def _check_bias(bias: torch.Tensor, out_features: int) -> None:
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a real floating-point tensor, got {got}")
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape [{out_features}], got {list(bias.shape)}")
    if bias.is_meta:
        raise ValueError("bias must hold values, got a tensor on the meta device")
    check_finite("bias", bias)


def check_layer(
    name: str, weight: torch.Tensor, bias: torch.Tensor | None, importance: Importance | None
) -> None:
    """Check what a layer is made of, which takes little time: :func:`quantize_together` accepts it then.

    Raises:
        TypeError, ValueError: as :func:`quantize_weight`; the message names the layer where it has a name.
    """
    with _named(name):
        check_matrix("weight", weight)
        weight_exponent(weight)
        if bias is not None:
            _check_bias(bias, weight.shape[0])
        if importance is not None:
            importance.factors((weight.shape[0], weight.shape[1]), torch.float32, weight.device)
