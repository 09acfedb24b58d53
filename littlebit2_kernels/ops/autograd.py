"""One wrapper for calls of operators that are linear in ``x``: tracing, forward-mode AD, and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["call_operator", "requires_grad"]

#: Stands for "the operator is its own kernel".
_OPERATOR: Any = object()


def requires_grad(arguments: Iterable[Any]) -> bool:
    """Whether a tensor among the arguments, or in a list among them, requires a gradient."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            for tensor in argument:
                if tensor is not None and tensor.requires_grad:
                    return True
        elif argument is not None and argument.requires_grad:
            return True
    return False


def call_operator(
    operator: Callable[..., Any],
    x: torch.Tensor,
    operands: tuple[Any, ...],
    settings: tuple[Any, ...],
    exact: tuple[Any, ...],
    kernel: Callable[..., Any] | None = _OPERATOR,
) -> Any:
    """Call ``operator(x, *operands, *settings)``; step over autograd where there is nothing to differentiate.

    Stepping over pays: torch calls the autograd kernel of an operator in Python, which takes longer than the
    rest of a small call.

    Args:
        operator: linear in ``x``, differentiable in ``x`` and in the bias.
        x: the activations ``[..., K]``.
        operands: tensors, lists of tensors and ``None`` that hold the layer; the bias (of several layers: the
            list of biases) comes last.
        settings: the other arguments, which are not tensors.
        exact: ``settings`` of the call that maps a tangent of ``x``: derivatives are those of exact sums.
        kernel: what to call below autograd instead of the operator; ``None`` calls the operator, and lets
            autograd and every dispatch mode see it, in any case.
    """
    if torch.compiler.is_compiling():
        return operator(x, *operands, *settings)
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            # Torch has no forward derivative of registered operators.
            y = call_operator(operator, primal, operands, settings, exact, kernel)
            bias = operands[-1]
            no_bias = [None] * len(bias) if isinstance(bias, list) else None
            dy = call_operator(operator, tangent, (*operands[:-1], no_bias), exact, exact, kernel)
            if isinstance(y, list):
                return [forward_ad.make_dual(*pair) for pair in zip(y, dy, strict=True)]
            return forward_ad.make_dual(y, dy)
    if kernel is None or (torch.is_grad_enabled() and (x.requires_grad or requires_grad(operands))):
        return operator(x, *operands, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        if kernel is _OPERATOR:
            return operator(x, *operands, *settings)
        return kernel(x, *operands, *settings)
