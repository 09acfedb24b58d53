"""Validation of the quantizer's choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.quantize.config import as_config


def test_defaults_are_one_bit_and_one_path() -> None:
    config = QuantConfig()
    assert (config.bpw, config.paths, config.ranks, config.method) == (1.0, 1, None, "auto")
    assert config.ranks_for(4096, 4096) == (2024,)


@pytest.mark.parametrize("method", ["joint-itq", "dual-svid"])
def test_the_papers_methods_have_two_paths(method: str) -> None:
    config = QuantConfig(method=method)  # type: ignore[arg-type]
    assert config.ranks_for(4096, 4096) == (1000, 1000)
    assert QuantConfig(method=method, paths=1).paths == 1  # type: ignore[arg-type]


def test_explicit_ranks_replace_the_budget() -> None:
    config = QuantConfig(ranks=[16, 8, 24])  # type: ignore[arg-type]
    assert config.paths == 3
    assert config.bpw is None
    assert config.ranks_for(64, 64) == config.ranks_for(5, 7, is_kv=True) == (16, 8, 24)


def test_kv_factor_is_for_key_and_value_projections_only() -> None:
    config = QuantConfig(bpw=1.0, paths=2, kv_factor=1.5)
    assert config.ranks_for(4096, 1024) == (392, 392)
    assert config.ranks_for(4096, 1024, is_kv=True) == (584, 584)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bpw": 0}, ValueError, "bpw must be a finite positive number, got 0"),
        ({"bpw": "1"}, ValueError, "bpw must be a finite positive number, got '1'"),
        ({"paths": 0}, ValueError, "paths must be an integer between 1 and .*, got 0"),
        ({"ranks": 8}, TypeError, "ranks must be a sequence of integers, got int"),
        ({"ranks": (8,) * 17}, ValueError, "ranks must hold between 1 and 16 ranks, got 17"),
        ({"ranks": (2**33,)}, ValueError, "must be at most 2147483647, got 8589934592"),
        ({"paths": 17}, ValueError, "paths must be an integer between 1 and 16, got 17"),
        ({"ranks": ()}, ValueError, "ranks must hold between 1 and 16 ranks, got 0"),
        ({"ranks": (8, 9)}, ValueError, r"ranks\[1\] must be a positive multiple of 8, got 9"),
        ({"ranks": (0,)}, ValueError, r"ranks\[0\] must be a positive multiple of 8, got 0"),
        ({"ranks": (8,), "bpw": 1.0}, ValueError, "bpw must be None where ranks are given, got 1.0"),
        ({"ranks": (8,), "paths": 2}, ValueError, r"paths must be None or the number of ranks, 1, got 2"),
        (
            {"method": "svd"},
            ValueError,
            "method must be one of auto, admm, refine, joint-itq, dual-svid, got 'svd'",
        ),
        ({"itq_iterations": -1}, ValueError, "itq_iterations must be an integer between 0 and .*, got -1"),
        ({"kv_factor": -2.0}, ValueError, "kv_factor must be a finite positive number, got -2.0"),
        ({"seed": 0.5}, ValueError, "seed must be an integer between 0 and .*, got 0.5"),
        ({"seed": 2**63}, ValueError, "seed must be an integer between 0 and .*, got 9223372036854775808"),
        (
            {"compute_dtype": torch.float16},
            ValueError,
            "compute_dtype must be one of torch.float32, torch.float64, got torch.float16",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantConfig(**arguments)


def test_a_number_stands_for_bits_per_weight(rng: torch.Generator) -> None:
    assert as_config(0.5) == QuantConfig(bpw=0.5)
    assert as_config(1) == as_config(None) == QuantConfig(bpw=1.0)
    config = QuantConfig(ranks=(8,))
    assert as_config(config) is config
    weight = torch.randn(64, 64, generator=rng)
    mine, other = (quantize_weight(weight, config=c).packed for c in (1.2, QuantConfig(bpw=1.2)))
    for one, two in zip(mine.unique_tensors(), other.unique_tensors(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("config", ["0.5", True, {"bpw": 1.0}, torch.tensor(1.0)])
def test_what_is_no_configuration_is_named(config: object) -> None:
    message = (
        f"config must be a QuantConfig, a number of bits per weight or None, got {type(config).__name__}"
    )
    with pytest.raises(TypeError, match=message):
        as_config(config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must be a finite positive number, got -1"):
        as_config(-1)


def test_solver_internals_are_no_settings_of_the_user() -> None:
    for name in ("polar", "admm_start"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            QuantConfig(**{name: "auto"})
