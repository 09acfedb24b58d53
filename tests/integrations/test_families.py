"""Each family: packed, saved, loaded both ways; outputs are those of a dense model with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import littlebit2
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import LittleBitLinear
from tests.integrations.families import (
    FAMILIES,
    GENERATIVE,
    dense_model,
    greedy,
    outputs,
    quantized_copy,
    reconstructed_copy,
    relative_error,
    token_ids,
)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(family, dense model with the reconstructed weights, directory of the packed one)."""
    family = request.param
    model = dense_model(family)
    packed = quantized_copy(model)
    attach(packed)
    path = tmp_path_factory.mktemp("packed") / family
    packed.save_pretrained(path)
    return family, reconstructed_copy(model, packed), path


def _auto(family: str) -> Any:
    return transformers.AutoModelForCausalLM if family in GENERATIVE else transformers.AutoModel


@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_outputs_are_those_of_the_reconstructed_weights(saved: tuple[str, Any, Path], way: str) -> None:
    family, reference, path = saved
    model = _auto(family).from_pretrained(path) if way == "from_pretrained" else littlebit2.load(path)
    linears = [
        name for name, m in reference.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"
    ]
    assert [n for n, m in model.named_modules() if isinstance(m, LittleBitLinear)] == linears
    assert {m.shape.ranks for m in model.modules() if isinstance(m, LittleBitLinear)} == {(40, 8)}
    ids = token_ids(rows=2)
    assert relative_error(outputs(model, ids), outputs(reference, ids)) < 2e-5


def test_bfloat16(saved: tuple[str, Any, Path]) -> None:
    _, reference, path = saved
    model = littlebit2.load(path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = token_ids()
    wanted = outputs(reference, ids)
    dense = relative_error(outputs(_in_bfloat16(reference), ids), wanted)
    assert relative_error(outputs(model, ids), wanted) < max(2 * dense, 0.02)


def _in_bfloat16(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).to(torch.bfloat16)


def test_greedy_generation(saved: tuple[str, Any, Path]) -> None:
    family, reference, path = saved
    if family not in GENERATIVE:
        pytest.skip("an encoder does not generate")
    ids = token_ids()
    wanted = greedy(reference, ids)
    assert len(set(wanted)) > 2
    model = littlebit2.load(path)
    assert greedy(model, ids) == wanted
    if family in ("llama", "phi3"):
        assert greedy(model, ids, cache_implementation="static") == wanted
        assert greedy(model, ids, use_cache=False) == wanted
