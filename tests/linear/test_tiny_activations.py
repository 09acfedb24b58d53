"""The lower end of the range of activations that docs/kernels.md states."""

from __future__ import annotations

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2_kernels import littlebit_linear, prepack
from littlebit2_kernels.reference import dense_weight


@pytest.mark.parametrize(
    ("activation", "size", "limit"),
    [
        ("exact", 1.0, 1e-5),
        ("exact", 1e-37, 1e-5),
        ("int16", 1.0, 1e-3),
        ("int16", 1e-33, 1e-3),
        ("int8", 1.0, 0.03),
        ("int8", 1e-32, 0.03),
    ],
)
def test_small_activations_keep_the_precision_of_their_mode(
    rng: torch.Generator, activation: str, size: float, limit: float
) -> None:
    packed = quantize_weight(torch.randn(96, 200, generator=rng) * 0.04, config=QuantConfig(bpw=1.0)).packed
    x = (torch.randn(3, 200, generator=rng) * size).bfloat16().float()
    expected = x.double() @ dense_weight(packed, torch.float64).T
    got = littlebit_linear(x, prepack(packed), activation=activation).double()
    assert float((got - expected).norm() / expected.norm()) < limit
