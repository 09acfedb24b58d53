"""A whole MLP of packed layers as one call: ``mlp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from ..dispatch import choose_for
from ..format import PackedLinear
from ..functional import check_norm, check_residual, check_x, differentiates, littlebit_linear, run_mlp
from ..prepacked import PrepackedLinear
from .norm import RMSNorm

__all__ = ["FUNCTIONS", "mlp"]

#: Names of activation functions, and the lb2_function (littlebit2.h) of each.
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_COMPOSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def mlp(
    x: torch.Tensor,
    layers: Sequence[PackedLinear] | Sequence[PrepackedLinear],
    function: str,
    backend: str = "auto",
    activation: str = "auto",
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the MLP of a decoder block to ``x``.

    ``down(function(gate(h)) * up(h)) + residual`` with ``h = norm(x)`` for layers ``(gate, up, down)``.
    For ``(up, down)`` it is ``down(function(up(h))) + residual`` where N of ``up`` is K of ``down``. Where it
    is twice that, the halves of ``up(h)`` are gate and up.

    Prepacked layers on the CPU take one call of a native kernel, and values in between are float32. Packed
    layers on CUDA take one call too, all of one stage or all of two, with at most 16 paths in those before
    down; the outputs of these are rounded to the dtype of ``x``. Calls that need a gradient or run under
    autocast, packed layers on the CPU, and those of other backends are composed of
    :func:`littlebit2_kernels.littlebit_linear` and torch's operations: the same within the rounding of
    values in between to the dtype of ``x``.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        layers: ``(gate, up, down)`` or ``(up, down)``, all packed or all prepacked.
        function: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        backend: see :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.
        norm: normalizes ``x`` first.
        residual: ``[..., N]`` in the dtype of ``x``, added to the result before it is rounded.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x``, ``residual``, the weight of ``norm`` and
        the biases.

    Raises:
        TypeError: ``layers`` holds something else, or both kinds; a dtype is not supported.
        ValueError: sizes or devices do not go together, or a name is unknown.
        BackendUnavailableError, NativeLibraryError, RuntimeError: as ``littlebit_linear``.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
    _check_layers(layers)
    first, last = layers[0], layers[-1]
    check_x(x, first.shape, first.device)
    check_norm(norm, x, first.shape)
    check_residual(residual, x, last.shape)
    prepacked = isinstance(first, PrepackedLinear)
    choice = choose_for(x, first.shape, backend, activation, prepacked)
    bias = [layer.bias for layer in layers]
    if not differentiates(x, bias, norm, residual):
        tensors = [layer.layer if isinstance(layer, PrepackedLinear) else layer.operands for layer in layers]
        shapes = [layer.shape for layer in layers]
        y = run_mlp(x, tensors, bias, shapes, FUNCTIONS[function], choice, norm, residual)
        if y is not None:
            return y
    h = x if norm is None else norm.apply(x)
    outputs = [littlebit_linear(h, layer, backend, activation) for layer in layers[:-1]]
    if len(layers) == 2 and layers[0].shape.out_features != last.shape.in_features:
        outputs = list(outputs[0].chunk(2, dim=-1))
    hidden = _COMPOSED[function](outputs[0])
    if len(outputs) == 2:
        hidden = hidden * outputs[1]
    y = littlebit_linear(hidden, last, backend, activation)
    return y if residual is None else y + residual


def _check_layers(layers: Sequence[PackedLinear | PrepackedLinear]) -> None:
    if len(layers) not in (2, 3):
        raise ValueError(f"layers must hold (gate, up, down) or (up, down), got {len(layers)} layers")
    kinds = {type(layer) for layer in layers}
    if not (kinds <= {PackedLinear} or kinds <= {PrepackedLinear}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"layers must be all PackedLinear or all PrepackedLinear, got {names}")
    hidden = layers[-1].shape.in_features
    allowed = (hidden, 2 * hidden) if len(layers) == 2 else (hidden,)
    for index, layer in enumerate(layers[:-1]):
        shape = layer.shape
        if shape.out_features not in allowed:
            twice = ", or twice that" if len(layers) == 2 else ""
            raise ValueError(
                f"layers[{index}] must have N={hidden}, K of the last layer{twice}, got {shape.out_features}"
            )
        if shape.in_features != layers[0].shape.in_features:
            raise ValueError(
                f"layers[{index}] must have K={layers[0].shape.in_features} like layers[0], got "
                f"{shape.in_features}"
            )
    for index, layer in enumerate(layers):
        if layer.device != layers[0].device:
            raise ValueError(
                f"layers[{index}] must be on {layers[0].device} like layers[0], got {layer.device}"
            )
