"""Modules that one call computes together: ``linears_together`` and ``mlp_together``.

Both look at the modules as they are at the time of the call, and return ``None`` where a module has to be
called by itself: hooks on it must run, it may have been replaced, or the call needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..dispatch import choose_for, choose_for_group
from ..format import LayerShape
from ..functional import Layer, run_fused, run_group, run_mlp
from ..linear import LittleBitLinear
from ..ops.operands import ACTIVATION_DTYPES
from .checks import is_called_plainly, needs_own_call
from .mlp import FUNCTIONS
from .norm import RMSNorm

__all__ = ["linears_together", "mlp_together"]


class _Layers(NamedTuple):
    """Modules as :func:`.functional.run_group` takes them; all prepacked or none."""

    tensors: list[Layer]
    bias: list[torch.Tensor | None]
    shapes: list[LayerShape]
    prepacked: bool


def linears_together(
    modules: Sequence[nn.Module | None],
    x: torch.Tensor,
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor] | None:
    """Apply packed modules to one ``x`` in one call (:func:`littlebit2_kernels.grouped_linear`).

    Args:
        modules: what stands where the packed layers were; anything.
        x: ``[..., K]``, what the first module would be called with, before ``norm``.
        norm: of ``x``, before the layers.
        residual: ``[..., N]``, added to the output of a single module.

    Returns:
        ``[..., N_i]`` of each module in the dtype of ``x``, or ``None`` if they have to be called one by one.
    """
    layers = _layers_of(modules, x, norm, inputs=len(modules))
    if layers is None:
        return None
    first: Any = modules[0]
    if residual is not None and not _may_add(residual, x, first):
        return None
    choice = choose_for_group(x, layers.shapes, first.backend, first.activation, layers.prepacked)
    if choice is None or choice.backend not in ("cpu", "cuda"):
        return None
    rest = (layers.bias, layers.shapes, choice)
    if norm is None and residual is None:
        return run_group(x, layers.tensors, *rest)
    return run_fused(x, layers.tensors, *rest, norm, residual)


def mlp_together(
    modules: Sequence[nn.Module | None],
    x: torch.Tensor,
    function: str,
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Apply the packed modules of an MLP to ``x`` in one call (:func:`littlebit2_kernels.mlp`).

    Args:
        modules: gate, up and down; up and down; or gate and up in one, and down.
        x: ``[..., K]``.
        function: of :func:`littlebit2_kernels.mlp`.
        norm: of ``x``, before the layers.
        residual: ``[..., N]``, added to the output.

    Returns:
        ``[..., N]`` in the dtype of ``x``, or ``None`` if they have to be called one by one.
    """
    layers = _layers_of(modules, x, norm, inputs=len(modules) - 1)
    if layers is None:
        return None
    down: Any = modules[-1]
    sizes = [shape.out_features for shape in layers.shapes[:-1]]
    halves = len(sizes) == 1 and sizes == [2 * down.in_features]
    if not halves and any(size != down.in_features for size in sizes):
        return None
    if residual is not None and not _may_add(residual, x, down):
        return None
    choice = choose_for(x, layers.shapes[0], down.backend, down.activation, layers.prepacked)
    rest = (layers.bias, layers.shapes, FUNCTIONS[function], choice, norm, residual)
    return run_mlp(x, layers.tensors, *rest)


def _layers_of(modules: Sequence[Any], x: Any, norm: RMSNorm | None, inputs: int) -> _Layers | None:
    """The layers of modules that may run in one call on ``x``, of which the first ``inputs`` take it."""
    if needs_own_call(x) or nn.modules.module._has_any_global_hook() or torch.jit.is_tracing():
        return None
    if x.dim() == 0 or x.dtype not in ACTIVATION_DTYPES or x.layout != torch.strided:
        return None
    size, prepacked = x.shape[-1], x.is_cpu
    # On the CPU, to compare devices takes longer than to ask each tensor.
    device = None if prepacked else x.device
    grad = torch.is_grad_enabled()
    if norm is not None:
        weight = norm.weight
        if weight.shape != (size,) or (grad and weight.requires_grad):
            return None
        if not (weight.is_cpu if device is None else weight.device == device):
            return None
    backend = activation = None
    tensors, biases, shapes = [], [], []
    for index, module in enumerate(modules):
        if type(module) is not LittleBitLinear or not is_called_plainly(module):
            return None
        if index == 0:
            backend, activation = module.backend, module.activation
        elif module.backend != backend or module.activation != activation:
            return None
        shape = module.shape
        if index < inputs and shape.in_features != size:
            return None  # an error, which the module raises
        # Another thread may change the layout meanwhile: one look at which buffers there are.
        buffers: dict[str, Any] = module._buffers
        bias = buffers["bias"] if "bias" in buffers else module._parameters["bias"]
        layer = buffers.get("prepacked")
        # On the CPU, each prepacks itself in its first call.
        if (layer is not None) != prepacked or (grad and bias is not None and bias.requires_grad):
            return None
        if not (layer.is_cpu if layer is not None else buffers["u1"].device == device):
            return None
        tensors.append(module._operands(buffers) if layer is None else layer)
        biases.append(bias)
        shapes.append(shape)
    return _Layers(tensors, biases, shapes, prepacked)


def _may_add(residual: Any, x: torch.Tensor, last: Any) -> bool:
    """Whether ``residual`` is of the shape and dtype of the output, so that the sum is too."""
    # Of the rest, what holds for x holds for it.
    plain = torch.compiler.is_compiling() or type(residual) in (torch.Tensor, nn.Parameter)
    return (
        plain
        and not (residual.requires_grad and torch.is_grad_enabled())
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.shape == (*x.shape[:-1], last.out_features)
    )
