"""Sharing a model's bits out by spectra."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from littlebit2 import quantize_
from littlebit2.quantize import QuantConfig, quantize_weight, rank_for_bpw
from littlebit2.quantize.allocate import (
    EFFICIENCY,
    LayerSpectrum,
    allocate_ranks,
    layer_spectrum,
    predicted_error,
    ranks_for_energy,
)
from littlebit2_kernels.format import LayerShape


def with_decay(n: int, k: int, decay: float, rng: torch.Generator) -> torch.Tensor:
    r = min(n, k)
    left, right = (torch.linalg.qr(torch.randn(size, r, generator=rng)).Q for size in (n, k))
    return left * torch.arange(1, r + 1) ** -decay @ right.T


def spectrum(name: str, n: int, k: int, decay: float, *, rank: int = 64, stake: float = 1.0) -> LayerSpectrum:
    energies = torch.arange(1, min(n, k) + 1, dtype=torch.float64) ** (-2 * decay)
    return LayerSpectrum(name, k, n, energies / energies.sum(), rank, stake)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (1, 9)])
def test_the_spectrum_is_that_of_the_weight(shape: tuple[int, int], rng: torch.Generator) -> None:
    weight = torch.randn(*shape, generator=rng)
    energies = torch.linalg.svdvals(weight.double()).square()
    found = layer_spectrum("x", (weight * 1e30).bfloat16() if shape == (1, 9) else weight, 8)
    torch.testing.assert_close(found.energies, energies / energies.sum(), rtol=1e-4, atol=1e-6)
    assert (found.name, found.in_features, found.out_features) == ("x", shape[1], shape[0])
    assert not layer_spectrum("x", torch.zeros(4, 5), 8).energies.any()
    with pytest.raises(ValueError, match="weight must be a non-empty matrix"):
        layer_spectrum("x", torch.zeros(4), 8)


def test_the_prediction_is_a_model_and_no_bound(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Orthogonal directions are fewer numbers than the model counts: with all bits well spent it is undercut.
    monkeypatch.setattr("littlebit2.quantize.allocate.EFFICIENCY", 1.0)
    weight = torch.linalg.qr(torch.randn(128, 128, generator=rng)).Q
    (predicted,) = predicted_error(torch.full((128,), 1 / 128, dtype=torch.float64), [120])
    config = QuantConfig(ranks=(120,), admm_iterations=100)
    assert quantize_weight(weight, config=config).report.error < 0.9 * predicted


def test_prediction_is_reverse_water_filling() -> None:
    energies = spectrum("x", 200, 200, 0.6).energies
    for rank, error in zip((8, 40, 160), predicted_error(energies, [8, 40, 160]), strict=True):
        low, high = 1e-30, 1.0
        for _ in range(200):  # the water level by bisection
            level = math.sqrt(low * high)
            spent = float((energies / level).clamp(min=1).log2().sum()) / 2
            low, high = (low, level) if spent < EFFICIENCY * rank else (level, high)
        assert error == pytest.approx(float(energies.clamp(max=level).sum()), rel=1e-6)
    assert predicted_error(torch.zeros(5, dtype=torch.float64), [8]) == [0.0]


@pytest.mark.parametrize("decay", [0.3, 0.6])
@pytest.mark.parametrize("rank", [16, 48])
def test_prediction_meets_what_refined_paths_reach(decay: float, rank: int, rng: torch.Generator) -> None:
    weight = with_decay(144, 128, decay, rng)
    expected = predicted_error(layer_spectrum("x", weight, 8).energies, [rank])[0]
    achieved = quantize_weight(weight, config=QuantConfig(ranks=(rank,), admm_iterations=50)).report.error
    assert achieved == pytest.approx(expected, abs=0.06)


def test_bits_go_where_they_save_most_and_none_are_lost() -> None:
    layers = [
        spectrum("steep", 256, 256, 1.0),
        spectrum("flat", 256, 256, 0.2),
        spectrum("costly", 256, 256, 0.2, stake=1.5),
        spectrum("wide", 256, 1024, 0.5, rank=104),
    ]
    settled = allocate_ranks(layers)
    ranks = {one.name: one.ranks[0] for one in settled}
    assert ranks["steep"] < ranks["flat"] < ranks["costly"]

    def bits(choice: list[int]) -> float:
        return sum(
            LayerShape(layer.in_features, layer.out_features, (rank,)).counted_bits
            for layer, rank in zip(layers, choice, strict=True)
        )

    budget = bits([layer.uniform_rank for layer in layers])
    spent = bits(list(ranks.values()))
    assert budget - 8 * (256 + 1024 + 16) < spent <= budget

    def cost(choice: list[int]) -> float:
        return sum(
            layer.stake * predicted_error(layer.energies, [rank])[0]
            for layer, rank in zip(layers, choice, strict=True)
        )

    best = cost(list(ranks.values()))
    assert best < cost([layer.uniform_rank for layer in layers])
    # No exchange of eight ranks between layers of one shape is better.
    for i, j in itertools.permutations(range(3), 2):
        other = list(ranks.values())
        other[i] += 8
        other[j] -= 8
        assert 16 < other[i] < 256  # no bound was in the way
        assert cost(other) >= best - 1e-12
    for one in settled:
        assert one.predicted_error == pytest.approx(
            predicted_error(next(la.energies for la in layers if la.name == one.name), [one.ranks[0]])[0]
        )


def test_bounds_hold_for_every_path() -> None:
    layers = [spectrum("steep", 256, 256, 2.0, rank=64), spectrum("flat", 256, 256, 0.1, rank=64)]
    for bounds, paths in (((0.5, 1.25), 1), ((0.25, 4.0), 2), ((1.0, 1.0), 1)):
        for one in allocate_ranks(layers, paths=paths, bounds=bounds):
            assert len(set(one.ranks)) == 1
            assert len(one.ranks) == paths
            assert bounds[0] * 64 <= one.ranks[0] <= bounds[1] * 64
            assert one.ranks[0] % 8 == 0
    # Beyond the smaller dimension a rank buys nothing.
    assert max(one.ranks[0] for one in allocate_ranks([spectrum("x", 24, 512, 0.1, rank=16)])) <= 24
    with pytest.raises(ValueError, match="bounds must be positive and ascending around 1"):
        allocate_ranks(layers, bounds=(1.5, 2.0))
    with pytest.raises(ValueError, match="layers must hold at least one spectrum, got none"):
        allocate_ranks([])


def test_energy_picks_the_smallest_ranks_that_keep_it() -> None:
    layer = spectrum("x", 256, 256, 0.5)
    kept = layer.energies.cumsum(0)
    for energy in (0.3, 0.8, 0.95):
        (rank,) = ranks_for_energy(layer, energy).ranks
        assert kept[rank - 1] >= energy
        assert rank == 8 or kept[rank - 9] < energy
    assert ranks_for_energy(layer, 0.8, paths=2).ranks[0] * 2 >= ranks_for_energy(layer, 0.8).ranks[0]
    with pytest.raises(ValueError, match="energy must be below 1, got 1"):
        ranks_for_energy(layer, 1)


def make_model(rng: torch.Generator) -> nn.ModuleDict:
    model = nn.ModuleDict(
        {name: nn.Linear(128, 128, bias=False) for name in ("steep", "flat", "k_proj")}
    ).requires_grad_(False)
    for name, decay in (("steep", 1.0), ("flat", 0.2), ("k_proj", 0.2)):
        model[name].weight.copy_(with_decay(128, 128, decay, rng))
    return model


def test_a_model_at_a_spectral_budget(rng: torch.Generator) -> None:
    config = QuantConfig(bpw=1.0, budget="spectral", method="joint-itq", paths=1, itq_iterations=2)
    reports = quantize_(make_model(rng), config, progress=False).layers
    by_name = {report.name: report for report in reports}
    uniform = rank_for_bpw(128, 128, 1.0, paths=1)
    assert by_name["steep"].ranks[0] < uniform < by_name["flat"].ranks[0]
    assert all(report.predicted_error is not None for report in reports)
    assert sum(report.counted_bpw for report in reports) <= 3 * LayerShape(128, 128, (uniform,)).counted_bpw
    # The factor for keys and values is more bits to share.
    more = replace(config, kv_factor=2.0)
    reports = quantize_(make_model(rng), more, progress=False).layers
    assert sum(report.ranks[0] for report in reports) >= 4 * uniform


def test_a_model_and_a_weight_at_an_energy(rng: torch.Generator) -> None:
    model = make_model(rng)
    weight = model["flat"].weight.clone()
    config = QuantConfig(energy=0.9, method="joint-itq", paths=1, itq_iterations=2)
    reports = quantize_(model, config, progress=False).layers
    by_name = {report.name: report.ranks[0] for report in reports}
    assert by_name["steep"] < by_name["flat"]
    assert quantize_weight(weight, config=config).report.ranks == (by_name["flat"],)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy": 1.5}, "energy must be below 1, got 1.5"),
        ({"energy": 0}, "energy must be a finite positive number, got 0"),
        ({"energy": 0.9, "bpw": 1.0}, "bpw must be None where energy is given, got 1.0"),
        ({"energy": 0.9, "ranks": (8,)}, "energy must be None where ranks are given, got 0.9"),
        ({"energy": 0.9, "budget": "spectral"}, "budget='spectral' needs bpw"),
        ({"ranks": (8,), "budget": "spectral"}, "budget='spectral' needs bpw"),
        ({"ranks": (8,), "budget": "kl"}, "budget='kl' needs bpw"),
        ({"energy": 0.9, "budget": "kl"}, "budget='kl' needs bpw"),
        ({"budget": "kl", "kv_factor": 2.0}, "kv_factor must be 1 with budget='kl'.*, got 2.0"),
        ({"budget": "even"}, "budget must be one of uniform, spectral, kl, got 'even'"),
    ],
)
def test_sizes_exclude_each_other(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**arguments)  # type: ignore[arg-type]
