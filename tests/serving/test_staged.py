"""The stages of a layer apart: their composition is the layer, also over parts of its inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from littlebit2_kernels import StagedLinear, littlebit_linear, slice_columns, split_stages
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_packed, relative_error

K, N = 150, 70
KINDS: dict[str, dict[str, Any]] = {
    "one-path": {"ranks": [40], "bias": True},
    "two-paths": {"ranks": [8, 40]},
    "shared-v": {"ranks": [16, 16], "share_v": True, "bias": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_the_factors(kind: str, rng: torch.Generator) -> None:
    packed = make_packed(K, N, generator=rng, **KINDS[kind])
    first, second = split_stages(packed)
    own = sorted(set(packed.shares))
    assert [layer.out_features for layer in first] == [packed.paths[index].rank for index in own]
    assert len(second) == len(packed.paths)
    product = sum(
        dense_weight(layer, torch.float64) @ dense_weight(first[own.index(source)], torch.float64)
        for layer, source in zip(second, packed.shares, strict=True)
    )
    torch.testing.assert_close(product, dense_weight(packed, torch.float64))
    assert [layer.bias is not None for layer in second] == [
        packed.bias is not None and index == 0 for index in range(len(second))
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_of_parts_add_up(kind: str, prepacks: bool, dtype: torch.dtype, rng: torch.Generator) -> None:
    packed = make_packed(K, N, generator=rng, **KINDS[kind])
    x = torch.randn(5, K, generator=rng).to(dtype)
    truth = linear_reference(x.double(), packed)
    bounds = [0, 37, 64, K]
    parts = [
        StagedLinear(slice_columns(packed, start, stop, keep_bias=True), prepacks=prepacks)
        for start, stop in itertools.pairwise(bounds)
    ]
    pieces = [x[:, start:stop] for start, stop in itertools.pairwise(bounds)]
    latents = sum(part.latents(piece) for part, piece in zip(parts, pieces, strict=True))
    assert isinstance(latents, torch.Tensor)
    assert latents.dtype == torch.float32
    assert latents.shape == (5, parts[0].latent_features)
    exact = littlebit_linear(x, packed)
    allowed = 4 * relative_error(exact, truth) + (1e-3 if prepacks and dtype != torch.float32 else 1e-6)
    for part in parts:  # every device holds the whole second stage
        y = part.outputs(latents, dtype)
        assert y.dtype == dtype
        assert relative_error(y, truth) <= allowed
    whole = StagedLinear(packed, prepacks=prepacks)
    assert relative_error(whole(x), truth) <= allowed


def test_compiles_in_one_graph(rng: torch.Generator) -> None:
    module = StagedLinear(make_packed(K, N, [8, 40], bias=True, generator=rng))
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (3, 20):
        x = torch.randn(tokens, K, generator=rng)
        torch.testing.assert_close(compiled(x), module(x))


def test_refuses(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="two-stage layer to be split, got one of a single stage"):
        StagedLinear(make_packed(K, N, None, generator=rng))
    with pytest.raises(TypeError, match="packed must be a PackedLinear, got str"):
        split_stages("layer")  # type: ignore[arg-type]
    module = StagedLinear(make_packed(K, N, [8], generator=rng))
    with pytest.raises(TypeError, match=r"latents must be float32, got torch\.float16"):
        module.outputs(torch.zeros(2, 8, dtype=torch.float16), torch.float16)
    with pytest.raises(ValueError, match=r"latents\.size\(-1\) must equal 8, got shape \[2, 9\]"):
        module.outputs(torch.zeros(2, 9), torch.float32)
