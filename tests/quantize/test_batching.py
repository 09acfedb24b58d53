"""Layers quantized together come out as they would alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from littlebit2.quantize import Importance, QuantConfig, QuantizedLayer, quantize_weight
from littlebit2.quantize.batching import batch_size, in_batches
from littlebit2.quantize.quantizer import DenseLayer, quantize_together
from littlebit2.quantize.solvers.admm import admm
from littlebit2.quantize.solvers.binary_path import BinaryPath
from littlebit2.quantize.solvers.refine import refine


def same(first: QuantizedLayer, second: QuantizedLayer) -> bool:
    pairs = zip(first.packed.unique_tensors(), second.packed.unique_tensors(), strict=True)
    return first.report == second.report and all(torch.equal(mine, other) for mine, other in pairs)


def together(weights: list[torch.Tensor], configs: list[QuantConfig]) -> list[QuantizedLayer]:
    pairs = zip(weights, configs, strict=True)
    return quantize_together([DenseLayer(lambda w=w: w.clone(), config) for w, config in pairs])  # type: ignore[misc]


@settings(max_examples=25)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    ranks=st.sampled_from([(8,), (24,), (16, 8)]),
    method=st.sampled_from(["admm", "refine", "joint-itq"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.integers(2, 5),
)
def test_a_layer_has_the_same_bits_alone_and_in_company(
    n: int, k: int, ranks: tuple[int, ...], method: str, dtype: torch.dtype, size: int
) -> None:
    rng = torch.Generator().manual_seed(n * 71 + k)
    # Of very different magnitude and structure: they come to rest after different numbers of rounds.
    weights = [torch.randn(n, k, generator=rng) * 10.0**i + (i == 1) for i in range(size)]
    weights[-1] = torch.zeros(n, k)
    configs = [
        QuantConfig(ranks=ranks, method=method, admm_iterations=12, seed=i, compute_dtype=dtype)  # type: ignore[arg-type]
        for i in range(size)
    ]
    alone = [quantize_weight(w, config=config) for w, config in zip(weights, configs, strict=True)]
    for one, other in zip(alone, together(weights, configs), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("shape", [(384, 384), (250, 391), (96, 1536)])
def test_it_holds_for_larger_layers(shape: tuple[int, int], rng: torch.Generator) -> None:
    weights = [torch.randn(*shape, generator=rng) for _ in range(3)]
    configs = [QuantConfig(ranks=(40,), admm_iterations=8, refine_rounds=3, seed=i) for i in range(3)]
    alone = [quantize_weight(w, config=config) for w, config in zip(weights, configs, strict=True)]
    assert all(map(same, alone, together(weights, configs)))


def test_importance_and_bias_are_each_layers_own(rng: torch.Generator) -> None:
    weights = [torch.randn(20, 30, generator=rng) for _ in range(2)]
    biases = [torch.randn(20, generator=rng), None]
    importances = [None, Importance(torch.rand(30, generator=rng))]
    config = QuantConfig(ranks=(8,), admm_iterations=10)
    given_all = list(zip(weights, biases, importances, strict=True))
    alone = [quantize_weight(w, b, config=config, importance=i) for w, b, i in given_all]
    layers = [DenseLayer(lambda w=w: w.clone(), config, b, i) for w, b, i in given_all]  # type: ignore[misc]
    assert all(map(same, alone, quantize_together(layers)))


def test_errors_name_the_layer_of_a_batch() -> None:
    config = QuantConfig(ranks=(8,))
    bad = torch.full((4, 5), torch.nan)
    good = DenseLayer(lambda: torch.ones(4, 5), config, name="a")
    layers = [good, DenseLayer(lambda: bad, config, name="b")]
    with pytest.raises(ValueError, match=r"layer 'b': weight must be finite, got nan at index \[0, 0\]"):
        quantize_together(layers)
    layers[1] = DenseLayer(lambda: torch.ones(5, 4), config, name="c")
    with pytest.raises(ValueError, match=r"layer 'c': weight must have the shape \[4, 5\] of the batch, got"):
        quantize_together(layers)


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="layers must hold at least one layer, got none"):
        quantize_together([])
    one, two = (DenseLayer(lambda: torch.ones(8, 8), QuantConfig(ranks=(rank,))) for rank in (8, 16))
    with pytest.raises(ValueError, match="must have equal configurations but for seeds"):
        quantize_together([one, two])
    unsettled = DenseLayer(lambda: torch.ones(8, 8), QuantConfig(energy=0.9))
    with pytest.raises(ValueError, match="layers of a batch must have settled ranks"):
        quantize_together([unsettled, unsettled])


def test_batches_hold_one_kind_in_order() -> None:
    batches = in_batches("abacbbaa", lambda letter: letter, lambda letter: 1 if letter == "c" else 3)
    assert batches == [("a", "a", "a"), ("b", "b", "b"), ("c",), ("a",)]


def test_small_layers_go_together_on_a_cpu() -> None:
    low, high = QuantConfig(ranks=(40,)), QuantConfig(ranks=(2000,))
    assert batch_size(384, 384, low, "cpu") > 1
    assert batch_size(4096, 4096, high, "cpu") == 1
    assert batch_size(384, 384, QuantConfig(ranks=(40,), method="dual-svid"), "cpu") == 1
    # Their products would round by where they lie in a batch.
    assert batch_size(1, 384, low, "cpu") == batch_size(2049, 16, QuantConfig(ranks=(8,)), "cpu") == 1
    assert batch_size(384, 384, low, "cuda") > batch_size(4096, 4096, high, "cuda") >= 1


def test_half_precision_duals_of_large_factors_change_next_to_nothing(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = torch.randn(700, 530, generator=rng)
    errors = []
    for limit in (2**20, 1):  # the second: packed signs, by chunks, as factors of a large layer are held
        monkeypatch.setattr("littlebit2.quantize.solvers.binary_path.EXPANDED_ENTRIES", limit)
        path = BinaryPath.random((700, 530), 64, [1.0], [torch.Generator().manual_seed(0)])
        assert path.left.is_small == (limit > 1)
        admm(target, path, 30)
        errors.append(refine(target, path, 4)[0])
    assert errors[0][-1] == pytest.approx(errors[1][-1], rel=3e-3)
    for one in errors:
        assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(one))


def test_chunked_refinement_is_that_of_the_whole(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = torch.randn(600, 40, generator=rng, dtype=torch.float64)
    found = []
    for limit in (2**20, 1):
        monkeypatch.setattr("littlebit2.quantize.solvers.binary_path.EXPANDED_ENTRIES", limit)
        generators = [torch.Generator().manual_seed(0)]
        path = BinaryPath.random((600, 40), 16, [1.0], generators, dtype=torch.float64)
        refine(target, path, 3)
        found.append(path.packed()[0])
    assert torch.equal(found[0].u, found[1].u)
    torch.testing.assert_close(found[0].latent_scale, found[1].latent_scale)
