"""Layers that share their input as one call: ``grouped_linear``, and ``fuse_linears`` for modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .dispatch import choose_for_group
from .format import PackedLinear
from .functional import (
    check_norm,
    check_residual,
    check_x,
    differentiates,
    littlebit_linear,
    run_fused,
    run_group,
)
from .fused.checks import needs_own_call
from .fused.norm import RMSNorm
from .linear import LittleBitLinear
from .ops.operands import ACTIVATION_DTYPES
from .prepacked import PrepackedLinear

__all__ = ["LinearGroup", "fuse_linears", "grouped_linear", "unfuse_linears"]


def grouped_linear(
    x: torch.Tensor,
    layers: Sequence[PackedLinear] | Sequence[PrepackedLinear],
    backend: str = "auto",
    activation: str = "auto",
    *,
    norm: RMSNorm | None = None,
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Apply several packed layers to one ``x``, as the projections of an attention are.

    ``layer(norm(x)) + residual``. Prepacked layers on the CPU run in one parallel region, norm and residual
    sum included, which are then computed in float32 and not rounded in between; so are those of packed layers
    in launches that they share on CUDA (the residual up to 16 tokens). Other calls with a norm or a
    residual, and those that need a gradient or run under autocast, are composed of this one and torch's
    operations: the same within the rounding of values in between to the dtype of ``x``.

    On CUDA the layers share their launches if all are single-stage or all two-stage, they have at most 16
    paths together, and all come to the same choice of backend (docs/dispatch.md). Up to 16 tokens, sums may
    then be added in another order than in a call of each layer. In all other cases results are the same bits
    as those of one call per layer.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        layers: at least one, all packed or all prepacked, of the same K.
        backend: see :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.
        norm: normalizes ``x`` first.
        residual: ``[..., N]`` in the dtype of ``x``, only with one layer; added to its output.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``. Differentiable in ``x``, ``residual``, the weight
        of ``norm`` and the biases.

    Raises:
        TypeError: ``layers`` holds something else, or both kinds; or as ``littlebit_linear``.
        ValueError: ``layers`` is empty; ``norm`` or ``residual`` does not fit; or as ``littlebit_linear``.
        BackendUnavailableError, NativeLibraryError, RuntimeError: as ``littlebit_linear``.
    """
    if len(layers) == 0:
        raise ValueError("layers must hold at least one layer, got none")
    kinds = {type(layer) for layer in layers}
    if not (kinds <= {PackedLinear} or kinds <= {PrepackedLinear}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"layers must be all PackedLinear or all PrepackedLinear, got {names}")
    shapes = [layer.shape for layer in layers]
    for layer in layers:
        check_x(x, layer.shape, layer.device)
    check_norm(norm, x, shapes[0])
    if residual is not None and len(layers) != 1:
        raise ValueError(f"residual must be None unless layers holds one layer, got {len(layers)} layers")
    check_residual(residual, x, shapes[0])
    prepacked = [layer for layer in layers if isinstance(layer, PrepackedLinear)]
    choice = choose_for_group(x, shapes, backend, activation, bool(prepacked))
    if norm is not None or residual is not None:
        bias = [layer.bias for layer in layers]
        if choice is not None and not differentiates(x, bias, norm, residual):
            tensors = [
                layer.layer if isinstance(layer, PrepackedLinear) else layer.operands for layer in layers
            ]
            outputs = run_fused(x, tensors, bias, shapes, choice, norm, residual)
            if outputs is not None:
                return outputs
        outputs = grouped_linear(x if norm is None else norm.apply(x), layers, backend, activation)
        return outputs if residual is None else [outputs[0] + residual]
    if choice is None or (prepacked and choice.backend != "cpu"):
        return [littlebit_linear(x, layer, backend, activation) for layer in layers]
    tensors = [layer.layer if isinstance(layer, PrepackedLinear) else layer.operands for layer in layers]
    return run_group(x, tensors, [layer.bias for layer in layers], shapes, choice)


class LinearGroup:
    """Layers that a model calls one after another with the same input; made by :func:`fuse_linears`.

    The first layer that is called computes all of them; the others return its results if they are called with
    the same tensor object. A layer that is called with another tensor is computed on its own, and so are all
    layers until calls have been seen to go together again. Except for the order of sums on CUDA, results do
    not depend on that.

    Attributes:
        members: the layers.
        on_cpu: whether prepacked layers are computed together too.
        together: whether the last calls were.
    """

    def __init__(self, members: Sequence[LittleBitLinear], on_cpu: bool) -> None:
        self.members = tuple(members)
        self.on_cpu = on_cpu
        self.together = True
        # Of the last input: it, its state, and the results not yet handed out. Replaced as a whole: calls
        # on another thread may come in between.
        self._pending: tuple[torch.Tensor, tuple[int, bool, bool], dict[int, torch.Tensor]] | None = None
        # While calls do not go together: an input, and which members were called with it.
        self._seen: tuple[torch.Tensor, set[int]] | None = None

    def take(self, member: LittleBitLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Return ``member(x)`` as one of the group, or ``None`` if the member must compute it itself."""
        if needs_own_call(x):
            return None
        index = self._index(member)
        if index is None:
            return None
        pending = self._pending
        if pending is not None:
            known, state, results = pending
            if known is x and state == _state(x) and index in results:
                y = results.pop(index)
                if not results:
                    self._pending = None
                return y
            # Computed for nothing.
            self._pending = None
            self.together = False
        if not self.together:
            self._watch(index, x)
            return None
        outputs = self._compute(x)
        if outputs is None:
            return None
        results = dict(enumerate(outputs))
        y = results.pop(index)
        self._pending = (x, _state(x), results)
        return y

    def _index(self, member: LittleBitLinear) -> int | None:
        """Place of a layer, ``None`` for a copy of one, which a replica of the model has."""
        for index, other in enumerate(self.members):
            if other is member:
                return index
        return None

    def _watch(self, index: int, x: torch.Tensor) -> None:
        if torch.compiler.is_compiling():  # would be a graph for every state
            return
        seen = self._seen
        if seen is None or seen[0] is not x:
            self._seen = (x, {index})
            return
        seen[1].add(index)
        if len(seen[1]) == len(self.members):
            self._seen = None
            self.together = True

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Return the results of all members, or ``None`` if they do not run in one call just now."""
        first = self.members[0]
        for member in self.members:
            if member.activation != first.activation or member.backend != first.backend:
                return None
        states: list[dict[str, Any]] = [member._buffers for member in self.members]
        device = next(buffer for buffer in states[0].values() if buffer is not None).device
        if x.device != device or x.dim() == 0 or x.shape[-1] != first.in_features:
            return None  # an error, which the layer raises
        if x.dtype not in ACTIVATION_DTYPES:
            return None
        layers: list[Any] = [state.get("prepacked") for state in states]
        prepacked = all(layer is not None for layer in layers)
        if not prepacked:
            if x.device.type != "cuda" or any(layer is not None for layer in layers):
                return None  # on the CPU, each prepacks itself first
            layers = [member._operands(state) for member, state in zip(self.members, states, strict=True)]
        shapes = [member.shape for member in self.members]
        choice = choose_for_group(x, shapes, first.backend, first.activation, prepacked)
        if choice is None or choice.backend not in ("cpu", "cuda"):
            return None
        return run_group(x, layers, [member.bias for member in self.members], shapes, choice)


def fuse_linears(modules: Sequence[LittleBitLinear], *, on_cpu: bool = False) -> LinearGroup:
    """Compute layers that a model calls one after another with the same input in one call.

    This is for CUDA, where they then share their launches (:func:`grouped_linear`). The modules stay where
    they are, with their ``state_dict``; copies and pickles of them are not fused. Each layer runs on its own
    in calls that need a gradient, run under autocast, or do not go together (:class:`LinearGroup`). Between
    the calls, a model must not change the shared input in place: that is noticed outside of inference mode
    and ``torch.compile``, not within them. Groups that the layers were in are dissolved.

    Args:
        modules: at least two, of the same ``in_features``, all with one stage or all with two.
        on_cpu: fuse on the CPU too, where prepacked layers then share a parallel region.

    Returns:
        The group.

    Raises:
        TypeError: one is not a :class:`LittleBitLinear`.
        ValueError: there are fewer than two, one twice, or they do not go together.
    """
    for module in modules:
        if not isinstance(module, LittleBitLinear):
            raise TypeError(f"modules must be LittleBitLinear, got {type(module).__name__}")
    if len(modules) < 2 or len({id(module) for module in modules}) < len(modules):
        raise ValueError(f"modules must be two or more different layers, got {len(modules)}")
    for name, values in (
        ("in_features", [module.in_features for module in modules]),
        ("number of stages", [1 if module.shape.single_stage else 2 for module in modules]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"modules must have the same {name}, got {values}")
    unfuse_linears(modules)
    group = LinearGroup(modules, on_cpu)
    for module in modules:
        module._group = group
    return group


def unfuse_linears(modules: Sequence[LittleBitLinear]) -> None:
    """Undo :func:`fuse_linears` for the groups that ``modules`` are in."""
    for module in modules:
        group = module._group
        for member in () if group is None else group.members:
            member._group = None


def _state(x: torch.Tensor) -> tuple[int, bool, bool]:
    """What results depend on besides the values of ``x``, and how often it was changed."""
    if torch.compiler.is_compiling():
        return 0, True, False
    # Tensors of inference mode have no count of their changes.
    version = 0 if x.is_inference() else x._version
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
