"""Layers that share their input as one call: ``grouped_linear``, and ``fuse_linears`` for modules."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .dispatch import (
    ACTIVATIONS,
    check_activation,
    check_activation_mode,
    choose_backend,
    has_many_tokens,
)
from .format import PackedLinear
from .functional import littlebit_linear, shape_of
from .linear import LittleBitLinear
from .ops.calls import grouped_from_operands, grouped_from_prepacked
from .ops.operands import ACTIVATION_DTYPES, Operands
from .prepacked import PrepackedLinear
from .prompts import prompt_backend

__all__ = ["LinearGroup", "fuse_linears", "grouped_linear", "unfuse_linears"]


def grouped_linear(
    x: torch.Tensor,
    layers: Sequence[PackedLinear] | Sequence[PrepackedLinear],
    backend: str = "auto",
    activation: str = "auto",
) -> list[torch.Tensor]:
    """Apply several packed layers to one ``x``, as the projections of an attention are.

    On CUDA the layers share their launches, if all have one stage or all two, at most 16 paths together, and
    with more than 16 tokens no other backend for any of them; up to 16 tokens, sums may be taken in another
    order than by each layer on its own. Everywhere else the layers run one after another, with the very
    results that they have on their own.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        layers: at least one, all packed or all prepacked, of the same K.
        backend: see :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``. Differentiable in ``x`` and the biases.

    Raises:
        TypeError: ``layers`` holds anything else, or both kinds; or as ``littlebit_linear``.
        ValueError: ``layers`` is empty; or as ``littlebit_linear``.
        BackendUnavailableError, NativeLibraryError, RuntimeError: as ``littlebit_linear``.
    """
    if len(layers) == 0:
        raise ValueError("layers must hold at least one layer, got none")
    kinds = {type(layer) for layer in layers}
    if not (kinds <= {PackedLinear} or kinds <= {PrepackedLinear}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"layers must be all PackedLinear or all PrepackedLinear, got {names}")
    for layer in layers:
        check_activation(x, layer.in_features, layer.device)
    chosen = choose_backend(backend, x.device.type, activation=activation)
    prepacked = [layer for layer in layers if isinstance(layer, PrepackedLinear)]
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    check_activation_mode(activation, chosen, bool(prepacked))
    one_kind = len({layer.single_stage for layer in layers}) == 1
    apart = False
    if chosen == "cuda" and has_many_tokens(x.numel() // layers[0].in_features):
        shapes = [(*shape_of(layer), layer.operands) for layer in packed]
        apart = not _all_take_cuda(x, shapes, backend, activation)
    if apart or chosen in ("blas", "reference", "triton") or (packed and not one_kind):
        return [littlebit_linear(x, layer, backend, activation) for layer in layers]
    if packed:
        operands = [layer.operands for layer in packed]
        return grouped_from_operands(x, operands, [layer.bias for layer in packed], ACTIVATIONS[activation])
    return grouped_from_prepacked(
        x,
        [layer.layer for layer in prepacked],
        [layer.bias for layer in prepacked],
        [layer.out_features for layer in prepacked],
        ACTIVATIONS[activation],
    )


class LinearGroup:
    """Layers that a model calls one after another with the same input; made by :func:`fuse_linears`.

    The first one that is called computes all of them, the others hand out what is there, if they are called
    with the very same tensor. A layer that is called with another one is computed on its own, and so are all
    until they have been seen to go together again. Results do not depend on that but in the order of sums on
    CUDA.

    Attributes:
        members: the layers.
        on_cpu: whether prepacked layers go together too.
        together: whether the last calls did.
    """

    def __init__(self, members: Sequence[LittleBitLinear], on_cpu: bool) -> None:
        self.members = tuple(members)
        self.on_cpu = on_cpu
        self.together = True
        # Of the last input: it, its version, and the results not yet handed out. Replaced as a whole: calls
        # on another thread may come in between.
        self._pending: tuple[torch.Tensor, int, dict[int, torch.Tensor]] | None = None
        # While calls do not go together: an input, and which members were called with it.
        self._seen: tuple[torch.Tensor, set[int]] | None = None

    def take(self, member: LittleBitLinear, x: torch.Tensor) -> torch.Tensor | None:
        """Return ``member(x)`` as one of the group, or ``None`` if it is to be computed on its own."""
        if _needs_its_own(x):
            return None
        index = self._index(member)
        pending = self._pending
        if pending is not None:
            known, version, results = pending
            if known is x and version == _version(x) and index in results:
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
        self._pending = (x, _version(x), results)
        return y

    def _index(self, member: LittleBitLinear) -> int:
        for index, other in enumerate(self.members):
            if other is member:
                return index
        raise AssertionError("a layer of another group")

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
        """Return the results of all members, unless they are not of one kind just now."""
        first = self.members[0]
        for member in self.members:
            if member.activation != first.activation or member.backend != first.backend:
                return None
        states: list[dict[str, Any]] = [member._buffers for member in self.members]
        device = next(buffer for buffer in states[0].values() if buffer is not None).device
        activation = ACTIVATIONS.get(first.activation)
        wrong = x.device != device or x.dim() == 0 or x.shape[-1] != first.in_features
        if wrong or x.dtype not in ACTIVATION_DTYPES or activation is None:
            return None  # an error, which is the layer's to raise
        bias = [state["bias"] for state in states]
        layers = [state.get("prepacked") for state in states]
        if all(layer is not None for layer in layers):
            if first.backend not in ("auto", "cpu"):
                return None
            check_activation_mode(first.activation, "cpu", prepacked=True)
            sizes = [member.out_features for member in self.members]
            return grouped_from_prepacked(x, layers, bias, sizes, activation)  # type: ignore[arg-type]
        if x.device.type != "cuda" or any(layer is not None for layer in layers):
            return None
        if choose_backend(first.backend, "cuda", activation=first.activation) != "cuda":
            return None
        operands = [member._operands(state) for member, state in zip(self.members, states, strict=True)]
        if has_many_tokens(x.numel() // first.in_features):
            shapes = [
                (member.in_features, member.out_features, member.ranks, member.shares, own)
                for member, own in zip(self.members, operands, strict=True)
            ]
            if not _all_take_cuda(x, shapes, first.backend, first.activation):
                return None
        return grouped_from_operands(x, operands, bias, activation)


def fuse_linears(modules: Sequence[LittleBitLinear], *, on_cpu: bool = False) -> LinearGroup:
    """Let layers that a model calls with the same input, one after another, be computed by one call.

    For CUDA, where they then share their launches (:func:`grouped_linear`). The modules stay where they are,
    with their ``state_dict``; copies and pickles of them are not fused. Calls that want a gradient or run
    under autocast are each layer's own, as are those that do not go together (:class:`LinearGroup`). Between
    the calls, a model must not change the shared input in place: outside of inference mode and
    ``torch.compile`` that is noticed, within them it is not. Groups that the layers were in are dissolved.

    Args:
        modules: at least two, of the same ``in_features``, all with one stage or all with two.
        on_cpu: fuse on the CPU too. There it saves nothing (docs/performance.md), but all else is the same.

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
        ("number of stages", [1 if module.ranks is None else 2 for module in modules]),
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


def _all_take_cuda(
    x: torch.Tensor, layers: Sequence[tuple[int, int, Any, Any, Operands]], backend: str, activation: str
) -> bool:
    """Whether the CUDA kernels serve every layer: with many tokens each has a choice of its own.

    ``layers`` are K, N, ranks, shares and operands of each.
    """
    tokens = x.numel() // layers[0][0]

    def choice(k: int, n: int, ranks: Any, shares: Any, operands: Operands) -> str:
        sizes = (tokens, x.dtype, k, n, ranks, shares)
        best = functools.partial(prompt_backend, *sizes, x.device, operands)
        return choose_backend(backend, x.device.type, tokens, activation, best)

    return all(choice(*layer) == "cuda" for layer in layers)


def _needs_its_own(x: Any) -> bool:
    if not isinstance(x, torch.Tensor):
        return True
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    if torch.is_autocast_enabled(x.device.type):
        return True
    if torch.compiler.is_compiling():
        return False
    # Subclasses, and tensors of transforms, mean something else by the same object.
    return (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def _version(x: torch.Tensor) -> int:
    # Tensors of inference mode have no count of their changes.
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
