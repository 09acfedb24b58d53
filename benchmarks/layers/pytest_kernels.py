"""Core cases for pytest-benchmark, which stores runs and compares them with earlier ones.

Not part of ``make test``: ``pytest benchmarks/layers/pytest_kernels.py --benchmark-enable --benchmark-only``.
For ratios to peers use ``python -m benchmarks sweep``, which interleaves what it compares.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.layers.candidates import parse_candidate
from benchmarks.problems import Problem, parse_dtype
from benchmarks.shapes import SHAPES

CANDIDATES = {
    "littlebit2:cpu:exact": "float32",
    "littlebit2:cpu:int16": "bfloat16",
    "littlebit2:portable": "float32",
    "low-rank": "float32",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 8, 32], ids="M{}".format)
@pytest.mark.parametrize("bpw", [0.1, 0.55, 1.0], ids="{}bpw".format)
@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("shape", ["llama2-7b-qo", "llama2-7b-up"])
def test_forward(benchmark: Any, shape: str, name: str, bpw: float, tokens: int) -> None:
    """Time one layer whose weights are hot, on one thread."""
    dtype = parse_dtype(CANDIDATES[name])
    candidate = parse_candidate(name, dtype)
    reason = candidate.unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    problem = Problem(SHAPES[shape], bpw)
    built = candidate.build(problem)
    forward = built.bind(built.holder)
    x = problem.activations(tokens).to(dtype)
    benchmark.extra_info.update(
        ranks=problem.ranks, weight_bytes=built.nbytes, macs=tokens * candidate.macs(problem)
    )
    with torch.inference_mode():
        y = benchmark(forward, x)
    assert y.shape == (tokens, problem.shape.out_features)
