"""One layer from a dense weight to packed paths."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2_kernels.format import LayerShape, PackedLinear
from littlebit2_kernels.reference import dense_weight
from littlebit2_kernels.testing import relative_error


def heavy_tailed(n: int, k: int, rng: torch.Generator, decay: float = 0.5) -> torch.Tensor:
    rank = min(n, k)
    left = torch.linalg.qr(torch.randn(n, rank, generator=rng)).Q
    right = torch.linalg.qr(torch.randn(k, rank, generator=rng)).Q
    return left * torch.arange(1, rank + 1) ** -decay @ right.T


def measured_error(packed: PackedLinear, weight: torch.Tensor) -> float:
    return relative_error(dense_weight(packed), weight) ** 2


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reported_errors_are_those_of_what_is_stored(
    dtype: torch.dtype, compute_dtype: torch.dtype, rng: torch.Generator
) -> None:
    weight = (0.02 * torch.randn(48, 64, generator=rng)).to(dtype)
    config = QuantConfig(ranks=(16, 24, 8), itq_iterations=5, admm_iterations=20, compute_dtype=compute_dtype)
    packed, report = (layer := quantize_weight(weight, config=config)).packed, layer.report
    assert packed.ranks == report.ranks == (16, 24, 8)
    for count, path in enumerate(report.paths, start=1):
        actual = measured_error(PackedLinear(packed.paths[:count]), weight)
        assert path.error == pytest.approx(actual, rel=1e-5)
    assert report.error == report.paths[-1].error
    assert report.counted_bpw == LayerShape(64, 48, (16, 24, 8)).counted_bpw
    assert report.stored_bpw == packed.shape.stored_bpw
    assert packed.bias is None


def test_each_path_lowers_the_error(rng: torch.Generator) -> None:
    config = QuantConfig(ranks=(16,) * 4, method="joint-itq")
    report = quantize_weight(heavy_tailed(64, 64, rng), config=config).report
    errors = [path.error for path in report.paths]
    assert all(after < before for before, after in itertools.pairwise(errors))
    for path in report.paths:
        assert path.truncation_error is not None
        assert path.truncation_error < path.error


@pytest.mark.parametrize("decay", [0.3, 0.6])
def test_joint_itq_beats_random_rotation_beats_none(decay: float, rng: torch.Generator) -> None:
    weight = heavy_tailed(128, 128, rng, decay)
    itq = QuantConfig(ranks=(48,), method="joint-itq")
    rotated = quantize_weight(weight, config=itq).report.error
    random = quantize_weight(weight, config=replace(itq, itq_iterations=0)).report.error
    plain = quantize_weight(weight, config=replace(itq, method="dual-svid")).report.error
    assert rotated < random - 0.03 < plain - 0.03


def test_an_exact_binary_weight_is_recovered(rng: torch.Generator) -> None:
    # One sign pattern and positive scales: rank one, and a path of rank 8 represents it exactly.
    row, column = torch.randn(32, generator=rng), torch.randn(40, generator=rng)
    weight = torch.outer(row, column)
    layer = quantize_weight(weight, config=QuantConfig(ranks=(8,), method="dual-svid"))
    torch.testing.assert_close(dense_weight(layer.packed), weight.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_magnitude_changes_only_the_scales(scale: float, rng: torch.Generator) -> None:
    weight = torch.randn(32, 48, generator=rng)
    config = QuantConfig(ranks=(8, 8), itq_iterations=5, admm_iterations=20)
    base, scaled = (quantize_weight(w, config=config) for w in (weight, weight * scale))
    assert scaled.report.error == pytest.approx(base.report.error, rel=1e-4)
    assert measured_error(scaled.packed, weight * scale) == pytest.approx(base.report.error, rel=1e-4)


def test_same_arguments_same_bits_and_no_global_randomness(rng: torch.Generator) -> None:
    weight = torch.randn(40, 56, generator=rng)
    kept = weight.clone()
    state = torch.get_rng_state()
    config = QuantConfig(ranks=(16, 8), admm_iterations=20, seed=3)
    first = quantize_weight(weight, config=config)
    torch.rand(5)
    again = quantize_weight(weight, config=config)
    torch.set_rng_state(state)
    quantize_weight(weight, config=config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, kept)
    for mine, other in zip(first.packed.unique_tensors(), again.packed.unique_tensors(), strict=True):
        assert torch.equal(mine, other)
    assert first.report == again.report
    other_seed = quantize_weight(weight, config=QuantConfig(ranks=(16, 8), admm_iterations=20, seed=4))
    assert not torch.equal(first.packed.paths[0].u, other_seed.packed.paths[0].u)


@settings(max_examples=30)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    true_rank=st.integers(0, 6),
    method=st.sampled_from(["joint-itq", "dual-svid", "refine", "admm"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_degenerate_weights_stay_finite(
    n: int, k: int, true_rank: int, method: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n * 41 + k)
    weight = torch.randn(n, true_rank, generator=generator) @ torch.randn(true_rank, k, generator=generator)
    weight = weight.to(dtype)
    config = QuantConfig(ranks=(8, 16), method=method, itq_iterations=4, admm_iterations=8)  # type: ignore[arg-type]
    layer = quantize_weight(weight, config=config)
    dense = dense_weight(layer.packed)
    assert dense.shape == (n, k)
    assert torch.isfinite(dense).all()
    if true_rank == 0:
        assert not dense.any()
    assert layer.report.error == pytest.approx(measured_error(layer.packed, weight), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("method", ["joint-itq", "dual-svid"])
def test_zero_weight_has_zero_error(method: str) -> None:
    layer = quantize_weight(torch.zeros(9, 17), config=QuantConfig(ranks=(8, 8), method=method))  # type: ignore[arg-type]
    assert not dense_weight(layer.packed).any()
    assert layer.report.error == 0


def test_zero_rows_and_columns_stay_zero_without_rotation(rng: torch.Generator) -> None:
    weight = torch.randn(24, 40, generator=rng)
    weight[5], weight[:, 11] = 0, 0
    for method in ("joint-itq", "dual-svid"):
        config = QuantConfig(ranks=(8,), method=method)  # type: ignore[arg-type]
        dense = dense_weight(quantize_weight(weight, config=config).packed)
        limit = 1e-5 * float(dense.abs().max())
        assert float(dense[5].abs().max()) <= limit
        assert float(dense[:, 11].abs().max()) <= limit


def test_bias_is_kept_in_float32(rng: torch.Generator) -> None:
    weight, bias = torch.randn(12, 16, generator=rng), torch.randn(12, generator=rng).bfloat16()
    packed = quantize_weight(weight, bias, config=QuantConfig(ranks=(8,))).packed
    assert packed.bias is not None
    assert torch.equal(packed.bias, bias.float())
    own = bias.float()
    copied = quantize_weight(weight, own, config=QuantConfig(ranks=(8,))).packed.bias
    assert copied is not None
    assert copied.data_ptr() != own.data_ptr()


def test_parameters_are_quantized_without_a_graph(rng: torch.Generator) -> None:
    weight = torch.nn.Parameter(torch.randn(12, 16, generator=rng))
    bias = torch.nn.Parameter(torch.randn(12, generator=rng))
    packed = quantize_weight(weight, bias, config=QuantConfig(ranks=(8,))).packed
    assert not any(tensor.requires_grad for tensor in packed.unique_tensors())


def test_bad_arguments_are_named() -> None:
    config = QuantConfig(ranks=(8,))
    weight = torch.ones(4, 5)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight must be finite, got nan at index \[1, 2\]"):
        quantize_weight(weight, config=config)
    with pytest.raises(ValueError, match=r"weight must be a non-empty matrix, got shape \[5\]"):
        quantize_weight(torch.ones(5), config=config)
    with pytest.raises(
        TypeError, match=r"weight must have a real floating-point dtype of 16 bits or more, got torch\.int8"
    ):
        quantize_weight(torch.ones(4, 5, dtype=torch.int8), config=config)
    with pytest.raises(ValueError, match="weight must be zero or have its largest magnitude between"):
        quantize_weight(torch.full((4, 5), 1e200, dtype=torch.float64), config=config)
    with pytest.raises(ValueError, match="bpw must be above"):
        quantize_weight(torch.ones(4, 5), config=QuantConfig(bpw=0.1))
    with pytest.raises(ValueError, match=r"bias must have shape \[4\], got \[5\]"):
        quantize_weight(torch.ones(4, 5), torch.ones(5), config=config)
    with pytest.raises(ValueError, match=r"bias must be finite, got inf at index \[0\]"):
        quantize_weight(torch.ones(4, 5), torch.full((4,), torch.inf), config=config)
    with pytest.raises(TypeError, match=r"bias must be a real floating-point tensor, got torch\.int64"):
        quantize_weight(torch.ones(4, 5), torch.ones(4, dtype=torch.int64), config=config)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            torch.ones(4, 4).to(torch.float8_e4m3fn),
            TypeError,
            "dtype of 16 bits or more, got torch.float8_e4m3fn",
        ),
        (torch.ones(4, 4).to_sparse(), TypeError, "weight must be a dense tensor, got torch.sparse_coo"),
        (
            torch.ones(4, 4, device="meta"),
            ValueError,
            "weight must hold values, got a tensor on the meta device",
        ),
    ],
    ids=["float8", "sparse", "meta"],
)
def test_weights_that_cannot_be_read(weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(weight, config=QuantConfig(ranks=(8,)))


def test_a_configuration_is_needed() -> None:
    with pytest.raises(TypeError, match=r"config must be a QuantConfig, a number .*, got dict"):
        quantize_weight(torch.ones(4, 4), config={"bpw": 1.0})  # type: ignore[arg-type]
