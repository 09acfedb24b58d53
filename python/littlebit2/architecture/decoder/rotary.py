"""Functions that rotate queries and keys by the angles of their positions, and one call in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from littlebit2_kernels import rotary
from littlebit2_kernels.fused.checks import needs_own_call
from littlebit2_kernels.ops.operands import ACTIVATION_DTYPES

from .source import is_straight_line

__all__ = ["Rotation", "rotated", "rotation_of", "turns"]

#: Most elements in a row that the kernel takes.
_HEAD_SIZE = 1024


@dataclass(frozen=True)
class Rotation:
    """How a function rotates queries and keys, as :func:`littlebit2_kernels.rotary` does.

    Attributes:
        function: takes query, key, cos and sin.
        interleaved: whether elements that turn together are neighbors.
        partial: whether it takes angles for the first elements of a row only.
        keeps_dtype: whether the results have the dtype of query and key whatever that of the angles is.
    """

    function: Callable[..., Any]
    interleaved: bool
    partial: bool
    keeps_dtype: bool


def rotation_of(function: Any) -> Rotation | None:
    """Return how ``function`` rotates.

    Returns:
        ``None`` if it computes something else, or is no function of straight-line code.
    """
    return _rotation_of(function) if isinstance(function, FunctionType) else None


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
@torch.no_grad()
def _rotation_of(function: FunctionType) -> Rotation | None:
    if not is_straight_line(function):
        return None
    generator = torch.Generator("cpu").manual_seed(1)
    # All sizes differ, so that each dimension is in its place. Angles of a pair differ too.
    query, key = (torch.randn(2, heads, 3, 8, generator=generator, device="cpu") for heads in (4, 6))
    whole = [torch.randn(2, 3, 8, generator=generator, device="cpu") for _ in range(2)]
    half = [one[:1, :, :4].contiguous() for one in whole]
    for interleaved in (False, True):
        if not _rotates(function, query, key, whole, interleaved):
            continue
        partial = _rotates(function, query, key, half, interleaved)
        mixed = _results(function, query.bfloat16(), key.bfloat16(), *whole)
        keeps = mixed is not None and all(one.dtype == torch.bfloat16 for one in mixed)
        return Rotation(function, interleaved, partial, keeps)
    return None


def turns(
    how: Rotation, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether the kernel rotates these as ``how.function`` does.

    It does not for gradients, autocast, other devices, shapes, dtypes or kinds of tensors.

    Args:
        how: the rotation.
        query: ``[B, H, M, D]``.
        key: ``[B, G, M, D]``.
        cos: ``[B, M, R]`` or ``[1, M, R]``.
        sin: likewise.
    """
    if needs_own_call(query) or not query.is_cpu or torch.jit.is_tracing():
        return False
    grad, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    for one in (key, cos, sin):
        # Of the rest, what holds for the queries holds for these.
        if not (compiling or type(one) is torch.Tensor or type(one) is nn.Parameter):
            return False
        if not one.is_cpu or one.layout is not torch.strided or (grad and one.requires_grad):
            return False
    dtype, turned = query.dtype, cos.dtype
    if key.dtype is not dtype or sin.dtype is not turned or dtype not in ACTIVATION_DTYPES:
        return False
    if turned is not dtype and not (how.keeps_dtype and turned in ACTIVATION_DTYPES):
        return False
    shape, places = query.shape, cos.shape
    if len(shape) != 4 or len(places) != 3 or sin.shape != places:
        return False
    batch, _, tokens, size = shape
    rows, places_of, angles = places
    if angles % 2 or not 0 < angles <= size <= _HEAD_SIZE or not (how.partial or angles == size):
        return False
    if places_of != tokens or rows not in (1, batch):
        return False
    heads = key.shape[1] if key.dim() == 4 else 0
    return key.shape == (batch, heads, tokens, size)


def rotated(
    how: Rotation, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotate in one call.

    Args: as of :func:`turns`.

    Returns:
        What ``how.function`` returns for them, rounded once; ``None`` if it has to be called.
    """
    if not turns(how, query, key, cos, sin):
        return None
    return rotary(query, key, cos, sin, interleaved=how.interleaved)


def _rotates(
    function: Any, query: torch.Tensor, key: torch.Tensor, angles: list[torch.Tensor], interleaved: bool
) -> bool:
    """Whether the function gives what the formula gives, and leaves its inputs as they are."""
    given = [one.clone() for one in (query, key, *angles)]
    got = _results(function, *given)
    if got is None or not all(map(torch.equal, given, (query, key, *angles))):
        return False
    cos, sin = angles
    wanted = (_turned(one, cos, sin, interleaved) for one in (query, key))
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)
        for one, other in zip(got, wanted, strict=True)
    )


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The formula, pair by pair."""
    y = x.clone()
    size = cos.shape[-1]
    for i in range(size // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
        y[..., a] = x[..., a] * cos[:, None, :, a] - x[..., b] * sin[:, None, :, a]
        y[..., b] = x[..., b] * cos[:, None, :, b] + x[..., a] * sin[:, None, :, b]
    return y


def _results(function: Any, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both results, or ``None`` if the function fails or returns something else."""
    try:
        got = function(*given)
    except Exception:
        return None
    two = isinstance(got, tuple) and len(got) == 2 and all(isinstance(one, torch.Tensor) for one in got)
    return got if two else None
