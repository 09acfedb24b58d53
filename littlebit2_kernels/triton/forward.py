"""The launches that make up a layer, and its transpose; tensors and launches only, for tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .configs import for_device
from .fused import fused
from .gemm import gemm
from .gemv import gemv
from .operand import Operand, Sums, stage_operand
from .plan import (
    SLOTS,
    GemvConfig,
    Method,
    StageShape,
    distinct_first_stages,
    fused_config,
    stage_config,
)
from .slots import Term
from .transposed import transposed
from .xnor import xnor

__all__ = ["Layer", "backward_x", "forward", "stage_shape"]

_Tensors = list[torch.Tensor]


class Layer:
    """The operands of a layer as terms of its stages; a single-stage one has no ``u`` and ``latent_scale``.

    Attributes:
        first: one term for each distinct first stage; empty for a single-stage layer.
        last: one for each path.
        latents: columns of the first stages' results side by side.
    """

    def __init__(
        self, v: _Tensors, u: _Tensors, in_scale: _Tensors, latent_scale: _Tensors, out_scale: _Tensors
    ) -> None:
        cols = int(in_scale[0].shape[-1])
        self.first: list[Term] = []
        self.latents = 0
        if not u:
            self.last = [Term(v[p], cols, in_scale[p], out_scale[p]) for p in range(len(v))]
            return
        self.last = []
        terms: dict[int, Term] = {}
        for p, source in enumerate(distinct_first_stages(v, in_scale)):
            if source == p:
                terms[p] = Term(v[p], cols, in_scale[p], None, result=self.latents, stage=len(terms))
                self.latents += _room(terms[p].rows)
            own = terms[source]
            last = Term(u[p], own.rows, latent_scale[p], out_scale[p], source=own.result, stage=own.stage)
            self.last.append(last)
        self.first = list(terms.values())


def _room(latents: int) -> int:
    """Columns for so many latents: offsets and rows at multiples of 64 bytes, of which kernels know then."""
    return -(-latents // 16) * 16


def stage_shape(terms: Sequence[Term], last: bool) -> StageShape:
    """What configurations are chosen by."""
    return StageShape(tuple(term.rows for term in terms), tuple(term.cols for term in terms), last)


def forward(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, out: torch.Tensor, method: Method
) -> None:
    """Compute ``layer`` of x ``[M, K]`` into out ``[M, N]``."""
    if method.kernel == "gemv":
        _gemv_forward(x, layer, bias, out, method)
    else:
        _staged_forward(x, layer, bias, out, method)


def _gemv_forward(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, out: torch.Tensor, method: Method
) -> None:
    gpu, lookup = for_device(x.device)
    last_shape = stage_shape(layer.last, last=True)
    source = x.unsqueeze(0)
    if layer.first:
        first_shape = stage_shape(layer.first, last=False)
        both = fused_config(first_shape, last_shape, gpu, lookup)
        if both is not None:
            fused(x, [layer.first[term.stage] for term in layer.last], layer.last, out, bias, both)
            return
        config = stage_config(method, first_shape, x.shape[0], gpu, lookup)
        assert isinstance(config, GemvConfig)
        source = x.new_empty((config.splits, x.shape[0], layer.latents), dtype=torch.float32)
        for group in _groups(layer.first):
            gemv(x.unsqueeze(0), group, source, config, last=False)
    config = stage_config(method, last_shape, x.shape[0], gpu, lookup)
    assert isinstance(config, GemvConfig)
    for group, target, base, own_bias in _sums_of_paths(layer.last, out, bias):
        gemv(source, group, target, config, last=True, base=base, bias=own_bias)


def _staged_forward(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, out: torch.Tensor, method: Method
) -> None:
    gpu, lookup = for_device(x.device)
    tokens = x.shape[0]
    source = Sums(x.unsqueeze(0))
    if layer.first:
        config = stage_config(method, stage_shape(layer.first, last=False), tokens, gpu, lookup)
        operands = [stage_operand(source, group, method.kind) for group in _groups(layer.first)]
        parts = operands[0].chunks[1] if config.splits > 1 else 1
        latents = x.new_empty((parts, tokens, layer.latents), dtype=torch.float32)
        for group, operand in zip(_groups(layer.first), operands, strict=True):
            _multiply(operand, group, latents, config, last=False)
        scales = (
            operands[0].scales if len(operands) == 1 else torch.cat([operand.scales for operand in operands])
        )
        source = Sums(latents, scales if config.splits > 1 else None)
    config = stage_config(method, stage_shape(layer.last, last=True), tokens, gpu, lookup)
    for group, target, base, own_bias in _sums_of_paths(layer.last, out, bias):
        operand = stage_operand(source, group, method.kind)
        _multiply(operand, group, target, config, last=True, base=base, bias=own_bias)


def _multiply(
    operand: Operand, terms: Sequence[Term], out: torch.Tensor, config: Any, **options: Any
) -> None:
    if operand.kind == "xnor":
        xnor(operand, terms, out, config, **options)
    else:
        gemm(operand, terms, out, config, **options)


def backward_x(grad: torch.Tensor, layer: Layer, out: torch.Tensor) -> None:
    """Compute the transposed layer of grad ``[M, N]`` into out ``[M, K]``."""
    exact = grad.dtype == torch.float32
    if not layer.first:
        for group, target, base, _ in _sums_of_paths(layer.last, out, None):
            transposed(grad, group, target, last=True, exact=exact, base=base)
        return
    first, last, latents = [], [], 0
    for term in layer.last:
        own = layer.first[term.stage]
        first.append(Term(term.words, term.cols, term.scale, term.row_scale, result=latents))
        last.append(Term(own.words, own.cols, own.scale, None, source=latents))
        latents += _room(term.cols)
    sums = grad.new_empty((grad.shape[0], latents), dtype=torch.float32)
    for group in _groups(first):
        transposed(grad, group, sums, last=False, exact=exact)
    for group, target, base, _ in _sums_of_paths(last, out, None):
        transposed(sums, group, target, last=True, exact=exact, base=base)


def _groups(terms: Sequence[Term]) -> Iterator[list[Term]]:
    """What each launch takes."""
    for first in range(0, len(terms), SLOTS):
        yield list(terms[first : first + SLOTS])


def _sums_of_paths(
    terms: Sequence[Term], out: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[list[Term], torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """For each launch of a last stage: its terms, where sums go, those of the launch before, and the bias."""
    base = None
    for group in _groups(terms):
        final = group[-1] is terms[-1]
        target = out if final else torch.empty_like(out, dtype=torch.float32)
        yield group, target, base, bias if final else None
        base = target
