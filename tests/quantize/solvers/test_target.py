"""Weights of 16 bits read by blocks are the same numbers as a whole copy."""

from __future__ import annotations

import pytest
import torch

from littlebit2.quantize import Importance, QuantConfig, quantize_weight
from littlebit2.quantize.residual import Residual
from littlebit2.quantize.solvers.target import NarrowTarget


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_have_the_bits_of_the_whole(
    dtype: torch.dtype, importance: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = (torch.randn(37, 53, generator=rng) * 0.01).to(dtype)
    weights = Importance(torch.rand(53, generator=rng), torch.rand(37, generator=rng)) if importance else None
    whole = Residual(lambda: weight, torch.float32, weights)
    monkeypatch.setattr("littlebit2.quantize.residual._LARGE", 1)
    narrow = Residual(lambda: weight, torch.float32, weights)
    target = narrow.target()
    assert isinstance(target, NarrowTarget)
    assert not isinstance(whole.target(), NarrowTarget)
    for axis, entries in ((0, slice(3, 19)), (1, slice(0, 53)), (1, slice(50, 53))):
        assert torch.equal(target.block(axis, entries), whole.target().block(axis, entries))
    assert narrow.total == pytest.approx(whole.total, rel=1e-12)
    assert narrow.weighted_total == pytest.approx(whole.weighted_total, rel=1e-12)
    assert torch.equal(narrow.matrix(), whole.matrix())


def test_a_layer_has_the_same_bits_either_way(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 56, generator=rng).bfloat16()
    config = QuantConfig(ranks=(16, 8), admm_iterations=10)
    before = quantize_weight(weight, config=config)
    monkeypatch.setattr("littlebit2.quantize.residual._LARGE", 1)
    after = quantize_weight(weight, config=config)
    for mine, other in zip(before.packed.unique_tensors(), after.packed.unique_tensors(), strict=True):
        assert torch.equal(mine, other)
    assert after.report.error == pytest.approx(before.report.error, rel=1e-12)
