"""One wrapper for calls of operators that are linear in ``x``: tracing, forward-mode AD, autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from .library import eager_operators, load_for, load_operator

__all__ = ["call_operator", "requires_grad"]


def requires_grad(arguments: Iterable[Any]) -> bool:
    """Whether a tensor among the arguments, or in a list among them, requires a gradient."""
    for argument in arguments:
        kind = type(argument)
        if kind is list or kind is tuple:
            for tensor in argument:
                if tensor is not None and tensor.requires_grad:
                    return True
        elif argument is not None and argument.requires_grad:
            return True
    return False


def call_operator(
    operator: Any,
    x: torch.Tensor,
    operands: tuple[Any, ...],
    settings: tuple[Any, ...],
    exact: tuple[Any, ...],
    kernel: Callable[..., Any] | None = None,
) -> Any:
    """Call ``operator(x, *operands, *settings)``; step over autograd if there is nothing to differentiate.

    Stepping over pays: torch calls the autograd kernel of an operator in Python, which takes longer than the
    rest of a small call.

    Args:
        operator: linear in ``x``, differentiable in ``x`` and in the bias: the name of one of our operators,
            which is loaded first, or something to call.
        x: the activations ``[..., K]``.
        operands: tensors, lists of tensors and ``None`` that hold the layer. The bias comes last: for several
            layers, the list of biases.
        settings: the other arguments, which are not tensors.
        exact: ``settings`` of the call that maps a tangent of ``x``; derivatives are those of exact sums.
        kernel: computes the same; called below autograd in place of the operator.
    """
    if type(operator) is str:
        if torch.compiler.is_compiling():
            load_for(x)
            return getattr(torch.ops.littlebit2, operator)(x, *operands, *settings)
        name, operator = operator, eager_operators.get(operator)
        if operator is None or x.is_cuda:
            operator = load_operator(name, x)
    if forward_ad._current_level >= 0:
        # Torch has no forward derivative of registered operators.
        duals = _without_tangents(x, operands[-1])
        if duals is not None:
            primal, tangent, bias, bias_tangents = duals
            y = call_operator(operator, primal, (*operands[:-1], bias), settings, exact, kernel)
            ys = y if isinstance(y, list) else [y]
            dys: list[torch.Tensor] = [torch.zeros_like(one) for one in ys]
            if tangent is not None:
                no_bias = [None] * len(ys) if isinstance(y, list) else None
                dy = call_operator(operator, tangent, (*operands[:-1], no_bias), exact, exact, kernel)
                dys = dy if isinstance(dy, list) else [dy]
            both = [
                forward_ad.make_dual(one, d if b is None else d + b.to(d.dtype))
                for one, d, b in zip(ys, dys, bias_tangents, strict=True)
            ]
            return both if isinstance(y, list) else both[0]
    if torch.is_grad_enabled() and (x.requires_grad or requires_grad(operands)):
        return operator(x, *operands, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return (kernel or operator)(x, *operands, *settings)


def _without_tangents(x: torch.Tensor, bias: Any) -> tuple[Any, Any, Any, list[Any]] | None:
    """Return x, its tangent, the bias or biases, and their tangents; ``None`` if there is no tangent."""
    primal, tangent = forward_ad.unpack_dual(x)
    biases = bias if isinstance(bias, list) else [bias]
    pairs = [(None, None) if one is None else tuple(forward_ad.unpack_dual(one)) for one in biases]
    tangents = [pair[1] for pair in pairs]
    if tangent is None and all(one is None for one in tangents):
        return None
    primals = [pair[0] for pair in pairs]
    return primal, tangent, primals if isinstance(bias, list) else primals[0], tangents
