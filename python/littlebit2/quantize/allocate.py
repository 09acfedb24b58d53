"""Ranks for a whole model: bits go where the spectra say that they save most error.

What a rank buys is predicted by a model, fitted once: Gaussian singular vectors, ``K + N`` independent
numbers to a direction of singular value ``s_i``, would at best spend ``(K + N) / 2 log2(s_i^2 / theta)`` bits
on each direction above the water level ``theta`` and leave ``min(s_i^2, theta)`` of it (reverse
water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3). Binary paths of rank ``R`` have ``R
(K + N)`` sign bits and end about where the share :data:`EFFICIENCY` of them would do this, so ``theta``
solves ``sum_i max(0, log2(s_i^2 / theta)) / 2 = EFFICIENCY R``. It is no bound: singular vectors are
orthogonal, which leaves fewer independent numbers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape

from .budget import check_positive, largest_rank
from .solvers.numerics import binary_exponent, check_matrix, normalized

__all__ = [
    "LayerSpectrum",
    "RankAllocation",
    "allocate_ranks",
    "layer_spectrum",
    "predicted_error",
    "rank_options",
    "ranks_for_energy",
    "spend",
]

#: Share of the sign bits that would do at best what refined binary paths do with all of them: fitted to
#: MiniLM's layers between 0.15 and 1.5 bpw, where it lies between 0.65 and 0.85.
EFFICIENCY = 0.75

#: Columns converted to float64 at a time.
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """What the allocation needs to know of a layer.

    Attributes:
        name: of the module.
        in_features: K.
        out_features: N.
        energies: squared singular values relative to their sum, float64 ``[min(N, K)]``, descending; all
            zero for a zero weight.
        uniform_rank: what the model's bits per weight give each path of the layer when shared out uniformly.
        stake: what a squared relative error of 1 of this layer costs beside those of others. 1, all alike,
            where nothing is known: the noise of a layer counts beside its own signal, however large it is.
    """

    name: str
    in_features: int
    out_features: int
    energies: torch.Tensor
    uniform_rank: int
    stake: float


@dataclass(frozen=True)
class RankAllocation:
    """The ranks of one layer.

    Attributes:
        name: of the module.
        ranks: of every path.
        predicted_error: squared relative Frobenius error to expect of refined paths
            (:func:`predicted_error`).
        uniform_rank: the rank of each path under the uniform budget.
    """

    name: str
    ranks: tuple[int, ...]
    predicted_error: float
    uniform_rank: int


def layer_spectrum(name: str, weight: torch.Tensor, uniform_rank: int, stake: float = 1.0) -> LayerSpectrum:
    """Measure the spectrum of a weight ``[N, K]`` by the eigenvalues of its smaller Gram matrix.

    The Gram matrix is summed in float64 and rounded to float32, in which its eigenvalues are found: good to
    about 1e-6 of the largest, below which no rank of ours reaches.

    Raises:
        TypeError: ``weight`` is not a real floating-point tensor.
        ValueError: ``weight`` is not a non-empty finite matrix.
    """
    check_matrix("weight", weight)
    n, k = weight.shape
    exponent = binary_exponent(weight)
    wide = weight.detach() if n <= k else weight.detach().T
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=weight.device)
    for block in wide.split(_BLOCK, dim=1):
        part = normalized(block, exponent, torch.float64)
        gram.addmm_(part, part.T)
    energies = torch.linalg.eigvalsh(gram.float()).double().cpu().flip(0).clamp(min=0)
    total = energies.sum()
    return LayerSpectrum(name, k, n, energies / torch.where(total > 0, total, 1), uniform_rank, stake)


def predicted_error(energies: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """Return the squared relative error to expect of refined binary paths, for several total ranks.

    Args:
        energies: as in :class:`LayerSpectrum`.
        ranks: sums of the ranks of a layer's paths.
    """
    positive = energies[energies > 0]
    if not len(positive):
        return [0.0] * len(ranks)
    logs = positive.log2()
    count = torch.arange(1, len(logs) + 1, dtype=torch.float64)
    total = logs.cumsum(0)
    errors = []
    for rank in ranks:
        # With the m largest directions above water its level is this; the true m gives the highest.
        level = float(((total - 2 * EFFICIENCY * rank) / count).max())
        errors.append(float(positive.clamp(max=2.0**level).sum()))
    return errors


def allocate_ranks(
    layers: Sequence[LayerSpectrum], *, paths: int = 1, bounds: tuple[float, float] = (0.25, 4.0)
) -> list[RankAllocation]:
    """Share the bits of the uniform ranks out so that predicted errors times stakes sum to the least.

    Greedy: 8 more ranks to each path, time and again, where they save most error per counted bit. The
    predicted error is convex in the rank, so the result is that of the best Lagrange multiplier, but for the
    last step.

    Args:
        layers: spectra, with the ranks of the uniform budget, whose counted bits are what there is to spend.
        paths: P, of equal rank.
        bounds: least and greatest rank relative to the uniform one.

    Raises:
        ValueError: ``layers`` is empty, or ``bounds`` are not positive and ascending around 1.
    """
    if not layers:
        raise ValueError("layers must hold at least one spectrum, got none")
    if not 0 < bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"bounds must be positive and ascending around 1, got {bounds}")
    options = [
        rank_options(layer.in_features, layer.out_features, layer.uniform_rank, bounds) for layer in layers
    ]
    curves = [
        predicted_error(layer.energies, [paths * rank for rank in ranks])
        for layer, ranks in zip(layers, options, strict=True)
    ]
    budget = sum(
        _bits(layer, paths, layer.uniform_rank) - _bits(layer, paths, ranks[0])
        for layer, ranks in zip(layers, options, strict=True)
    )
    losses = [[error * layer.stake for error in curve] for layer, curve in zip(layers, curves, strict=True)]
    taken = spend(losses, [_step_bits(layer, paths) for layer in layers], budget)
    return [
        RankAllocation(layer.name, (ranks[count],) * paths, curve[count], layer.uniform_rank)
        for layer, ranks, curve, count in zip(layers, options, curves, taken, strict=True)
    ]


def rank_options(
    in_features: int, out_features: int, uniform_rank: int, bounds: tuple[float, float]
) -> range:
    """Return the ranks that each path of a layer may get.

    Args:
        in_features: K.
        out_features: N.
        uniform_rank: under the uniform budget.
        bounds: least and greatest rank relative to it, rounded down to multiples of 8; the greatest is at
            most the :func:`.largest_rank`.
    """
    least = _floor(bounds[0] * uniform_rank)
    most = min(_floor(bounds[1] * uniform_rank), largest_rank(in_features, out_features))
    return range(least, max(most, least) + 1, RANK_MULTIPLE)


def spend(losses: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """Return how many steps to buy of each item: always the one that saves most per bit and can be paid.

    Args:
        losses: of each item after 0, 1, ... steps; convex and falling, so that this is the best but for the
            last step.
        costs: bits of one step of each item.
        budget: bits for all steps together.
    """
    taken = [0] * len(losses)

    def offer(i: int) -> tuple[float, int]:
        return (losses[i][taken[i] + 1] - losses[i][taken[i]]) / costs[i], i

    offers = [offer(i) for i, curve in enumerate(losses) if len(curve) > 1]
    heapq.heapify(offers)
    while offers:
        _, i = heapq.heappop(offers)
        if costs[i] > budget:
            continue
        budget -= costs[i]
        taken[i] += 1
        if taken[i] + 1 < len(losses[i]):
            heapq.heappush(offers, offer(i))
    return taken


def ranks_for_energy(layer: LayerSpectrum, energy: float, *, paths: int = 1) -> RankAllocation:
    """Return the smallest ranks whose sum keeps the share ``energy`` of the squared singular values.

    Raises:
        ValueError: ``energy`` is not a positive number below 1.
    """
    check_positive("energy", energy)
    if energy >= 1:
        raise ValueError(f"energy must be below 1, got {energy}")
    kept = layer.energies.cumsum(0)
    needed = int((kept < energy * float(kept[-1])).sum()) + 1
    most = largest_rank(layer.in_features, layer.out_features)
    rank = min(-(-needed // (paths * RANK_MULTIPLE)) * RANK_MULTIPLE, most)
    error = predicted_error(layer.energies, [paths * rank])[0]
    return RankAllocation(layer.name, (rank,) * paths, error, layer.uniform_rank)


def _bits(layer: LayerSpectrum, paths: int, rank: int) -> int:
    return LayerShape(layer.in_features, layer.out_features, (rank,) * paths).counted_bits


def _step_bits(layer: LayerSpectrum, paths: int) -> int:
    return _bits(layer, paths, 2 * RANK_MULTIPLE) - _bits(layer, paths, RANK_MULTIPLE)


def _floor(rank: float) -> int:
    return max(int(rank) // RANK_MULTIPLE, 1) * RANK_MULTIPLE
