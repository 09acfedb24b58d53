"""Modules that one call computes together: ``linears_together`` and ``mlp_together``.

Both look at the modules as they are at the time of the call, and return ``None`` where a module has to be
called by itself: hooks on it must run, it may have been replaced, or the call needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..format import PackedLinear
from ..linear import LittleBitLinear
from ..ops.operands import ACTIVATION_DTYPES
from ..prepacked import PrepackedLinear
from .checks import is_called_plainly, needs_own_call
from .interim import RMSNorm, grouped_linear, mlp

__all__ = ["linears_together", "mlp_together"]

Layers = list[PackedLinear] | list[PrepackedLinear]


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
    layers = _layers_of(modules, x, norm)
    if layers is None:
        return None
    first: Any = modules[0]
    if residual is not None and not _may_add(residual, x, first):
        return None
    return grouped_linear(x, layers, first.backend, first.activation, norm=norm, residual=residual)


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
    sizes = [layer.out_features for layer in layers[:-1]]
    halves = len(layers) == 2 and sizes == [2 * down.in_features]
    if not halves and any(size != down.in_features for size in sizes):
        return None
    if residual is not None and not _may_add(residual, x, down):
        return None
    return mlp(x, layers, function, down.backend, down.activation, norm=norm, residual=residual)


def _layers_of(
    modules: Sequence[nn.Module | None], x: Any, norm: RMSNorm | None, inputs: int | None = None
) -> Layers | None:
    """The layers of modules that may run in one call on ``x``, of which the first ``inputs`` take it."""
    if needs_own_call(x) or torch.jit.is_tracing() or nn.modules.module._has_any_global_hook():
        return None
    if x.dim() == 0 or x.dtype not in ACTIVATION_DTYPES:
        return None
    size = x.shape[-1]
    if norm is not None and (norm.weight.shape != (size,) or norm.weight.device != x.device):
        return None
    grad = torch.is_grad_enabled()
    if grad and norm is not None and norm.weight.requires_grad:
        return None
    first = modules[0]
    layers: list[Any] = []
    for index, module in enumerate(modules):
        if type(module) is not LittleBitLinear or not is_called_plainly(module):
            return None
        if module.backend != first.backend or module.activation != first.activation:  # type: ignore[union-attr]
            return None
        if (inputs is None or index < inputs) and module.in_features != size:
            return None  # an error, which the module raises
        layer = _layer_of(module, x.device, grad)
        if layer is None or (layers and type(layer) is not type(layers[0])):
            return None
        layers.append(layer)
    return layers


def _layer_of(
    module: LittleBitLinear, device: torch.device, grad: bool
) -> PackedLinear | PrepackedLinear | None:
    # Another thread may change the layout meanwhile: one look at which buffers there are.
    buffers: dict[str, Any] = module._buffers
    bias = buffers["bias"] if "bias" in buffers else module._parameters["bias"]
    if grad and bias is not None and bias.requires_grad:
        return None
    layer = buffers.get("prepacked")
    if layer is not None:
        return PrepackedLinear(layer, bias, module.shape) if layer.device == device else None
    if device.type == "cpu" or buffers["u1"].device != device:
        return None  # on the CPU, each prepacks itself in its first call
    return module.packed


def _may_add(residual: Any, x: torch.Tensor, last: Any) -> bool:
    """Whether ``residual`` is of the shape and dtype of the output, so that the sum is too."""
    return (
        not needs_own_call(residual)
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.shape == (*x.shape[:-1], last.out_features)
    )
