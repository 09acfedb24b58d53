"""The reference against the layer's formula written out with dense +-1 matrices."""

from __future__ import annotations

import math

import pytest
import torch

from littlebit2_kernels.format import (
    PackedLinear,
    PackedPath,
    pack_signs_reference,
    unpack_signs_reference,
)
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import (
    make_packed,
    make_problem,
    max_allowed_error,
    relative_error,
    typical_norm,
)

LAYERS = {
    "one-path": {"ranks": [24]},
    "residual": {"ranks": [16, 16], "bias": True},
    "three-ranks": {"ranks": [8, 40, 16]},
    "shared-v": {"ranks": [16, 16], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


def weight_by_formula(layer: PackedLinear) -> torch.Tensor:
    """Sum over paths of diag(out) U diag(latent) V diag(in), in float64."""
    total = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    for path in layer.paths:
        weight = unpack_signs_reference(path.v, path.in_features, torch.float64) * path.in_scale.double()
        if path.u is not None:
            u = unpack_signs_reference(path.u, path.rank, torch.float64)
            weight = (u * path.latent_scale.double()) @ weight
        total += path.out_scale.double()[:, None] * weight
    return total


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (33, 65), (100, 37)], ids=["1x1", "33x65", "100x37"]
)
def test_against_the_formula(
    options: dict, in_features: int, out_features: int, rng: torch.Generator
) -> None:
    layer = make_packed(in_features, out_features, generator=rng, **options)
    weight = weight_by_formula(layer)
    torch.testing.assert_close(dense_weight(layer), weight, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, in_features, dtype=torch.float64, generator=rng)
    expected = x @ weight.T + (0 if layer.bias is None else layer.bias.double())
    torch.testing.assert_close(linear_reference(x, layer), expected, rtol=1e-12, atol=1e-12)


def test_no_tokens(rng: torch.Generator) -> None:
    layer = make_packed(40, 24, [8], bias=True, generator=rng)
    assert linear_reference(torch.ones(0, 40), layer).shape == (0, 24)
    assert linear_reference(torch.ones(2, 0, 40), layer).shape == (2, 0, 24)


def test_a_vector_is_one_token(rng: torch.Generator) -> None:
    layer = make_packed(40, 24, [8], bias=True, generator=rng)
    x = torch.randn(40, generator=rng)
    assert torch.equal(linear_reference(x, layer), linear_reference(x[None], layer)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_allowed_error_admits_torch_and_no_wrong_bit(dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = make_packed(96, 64, [32], scale_spread=0.0, generator=rng)
    x = torch.randn(4, 96, generator=rng).to(dtype)
    x[:, 0] = 1.0
    truth, typical = linear_reference(x, layer), typical_norm(x, layer)
    allowed = max_allowed_error(x, layer, truth)
    assert relative_error(linear_reference(x, layer, dtype), truth, typical) <= allowed
    path = layer.paths[0]
    flipped = PackedPath(**{**path.tensors(), "v": path.v ^ torch.tensor([1, 0, 0], dtype=torch.int32)})
    assert relative_error(linear_reference(x, PackedLinear((flipped,))), truth, typical) > 2 * allowed


def test_typical_norm_is_the_root_mean_square_over_signs(rng: torch.Generator) -> None:
    x, layer = make_problem(3, 20, 15, [8, 16], generator=rng)
    forward, backward = [], []
    for _ in range(300):
        paths = []
        for path in layer.paths:
            v = pack_signs_reference(torch.randn(path.rank, 20, generator=rng))
            u = pack_signs_reference(torch.randn(15, path.rank, generator=rng))
            paths.append(PackedPath(v, path.in_scale, path.out_scale, u, path.latent_scale))
        drawn = PackedLinear(tuple(paths))
        forward.append(linear_reference(x, drawn).square().sum())
        backward.append((torch.ones(2, 15, dtype=torch.float64) @ dense_weight(drawn)).square().sum())
    assert typical_norm(x, layer) == pytest.approx(float(torch.stack(forward).mean().sqrt()), rel=0.1)
    grad = torch.ones(2, 15)
    assert typical_norm(grad, layer, backward=True) == pytest.approx(
        float(torch.stack(backward).mean().sqrt()), rel=0.1
    )


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    assert relative_error(torch.ones(0, 3), torch.ones(0, 3)) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth, 50.0) == pytest.approx(0.01)
    assert relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    with pytest.raises(ValueError, match=r"actual must have shape \[2\], got \[1\]"):
        relative_error(torch.ones(1), truth)
