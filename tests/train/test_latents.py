"""Where latents start: the confidences against brute force."""

from __future__ import annotations

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.train import MAGNITUDE, starting_latents
from littlebit2_kernels import PackedLinear, PackedPath, pack_signs, unpack_signs
from littlebit2_kernels.reference import dense_weight


def squared_error(weight: torch.Tensor, packed: PackedLinear) -> float:
    return float((weight.double() - dense_weight(packed)).square().sum())


def flipped(packed: PackedLinear, p: int, side: str, row: int, column: int) -> PackedLinear:
    paths = list(packed.paths)
    path = paths[p]
    words, cols = (path.v, path.in_features) if side == "v" else (path.u, path.rank)
    assert words is not None
    signs = unpack_signs(words, cols)
    signs[row, column] *= -1
    changed = pack_signs(signs)
    paths[p] = PackedPath(
        v=changed if side == "v" else path.v,
        in_scale=path.in_scale,
        out_scale=path.out_scale,
        u=changed if side == "u" else path.u,
        latent_scale=path.latent_scale,
    )
    return PackedLinear(tuple(paths))


@pytest.mark.parametrize("method", ["dual-svid", "joint-itq"])
def test_confidence_is_what_a_flip_would_cost(rng: torch.Generator, method: str) -> None:
    weight = torch.randn(24, 40, generator=rng)
    packed = quantize_weight(weight, config=QuantConfig(ranks=(8, 8), method=method)).packed
    before = squared_error(weight, packed)
    checked = 0
    for p, ((v, u), path) in enumerate(zip(starting_latents(packed, weight), packed.paths, strict=True)):
        assert v is not None
        assert path.latent_scale is not None
        right = unpack_signs(path.v, 40) * path.in_scale
        left = unpack_signs(path.u, 8) * path.out_scale.unsqueeze(1)
        for side, latent, other, scale in (
            ("v", v, left.square().sum(0).unsqueeze(1), path.in_scale.unsqueeze(0)),
            ("u", u, right.square().sum(1).unsqueeze(0), path.out_scale.unsqueeze(1)),
        ):
            along = path.latent_scale.unsqueeze(1 if side == "v" else 0)
            unit = 4 * scale.square() * other * along.square()
            for row, column in ((0, 0), (3, 5), (7, 7)):
                cost = squared_error(weight, flipped(packed, p, side, row, column)) - before
                confidence = cost / float(unit[row, column])
                found = float(latent[row, column].abs()) / MAGNITUDE
                assert found == pytest.approx(min(max(confidence, 0.05), 4.0), rel=1e-3)
                checked += 1
    assert checked == 12


def test_signs_are_the_packed_ones_and_magnitudes_scale(rng: torch.Generator) -> None:
    weight = torch.randn(24, 40, generator=rng)
    packed = quantize_weight(weight, config=QuantConfig(ranks=(16,), method="dual-svid")).packed
    ((v, u),) = starting_latents(packed, weight)
    assert v is not None
    assert torch.equal(pack_signs(v), packed.paths[0].v)
    assert packed.paths[0].u is not None
    assert torch.equal(pack_signs(u), packed.paths[0].u)
    ((constant, _),) = starting_latents(packed, magnitude=0.5)
    assert constant is not None
    assert constant.abs().unique().tolist() == [0.5]
    ((double, _),) = starting_latents(packed, weight, 2 * MAGNITUDE)
    torch.testing.assert_close(double, 2 * v)


def test_scales_of_zero_do_no_harm() -> None:
    path = PackedPath(
        v=pack_signs(torch.ones(8, 32)),
        in_scale=torch.zeros(32),
        out_scale=torch.zeros(16),
        u=pack_signs(torch.ones(16, 8)),
        latent_scale=torch.zeros(8),
    )
    for v, u in starting_latents(PackedLinear((path,)), torch.ones(16, 32)):
        assert v is not None
        assert bool(torch.isfinite(v).all())
        assert bool(torch.isfinite(u).all())
