"""Which modules of a family are fused, and that results and tokens stay what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import littlebit2
from littlebit2.architecture.decoder import fuse_modules, unfuse_modules
from littlebit2_kernels import LittleBitLinear
from tests.integrations.decoder.calls import Calls
from tests.integrations.families import (
    FAMILIES,
    GENERATIVE,
    dense_model,
    greedy,
    outputs,
    quantized_copy,
    relative_error,
    token_ids,
)

_ROTARY = "apply_rotary_pos_emb"
_GATED = ("q_proj + k_proj + v_proj", _ROTARY, "gate_proj + up_proj > {} > down_proj")
_RESIDUALS = ("input_layernorm > self_attn > residual", "post_attention_layernorm > mlp > residual")
_NORMS = ("input_layernorm > self_attn", "pre_feedforward_layernorm > mlp")

#: What the modules of one layer do in one call: the layer, its attention, its MLP.
EXPECTED = {
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3"), (*_RESIDUALS, *_GATED)),
    **dict.fromkeys(("gemma2", "gemma3"), (*_NORMS, *_GATED)),
    "phi3": (*_RESIDUALS, "qkv_proj", _ROTARY, "gate_up_proj > silu > down_proj"),
    "opt": ("self_attn > residual", "fc1 > relu > fc2 > residual", "q_proj + k_proj + v_proj"),
    "bert": ("query + key + value",),
}
#: Groups of a layer by names: sizes of attention and MLP.
GROUPS = {"bert": [3], "opt": [3], "phi3": []}
#: Grouped calls and MLP calls of one layer; that of the output layer of an attention adds the residual.
CALLS = {
    **dict.fromkeys(("llama", "llama-tied", "qwen2", "qwen3", "phi3", "opt"), (2, 1)),
    **dict.fromkeys(("gemma2", "gemma3"), (1, 1)),
    "bert": (1, 0),
}


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest) -> tuple[str, Any]:
    model = quantized_copy(dense_model(request.param))
    outputs(model, token_ids())  # prepacks
    return request.param, model


def test_what_is_fused_and_how_often(packed: tuple[str, Any], calls: Calls) -> None:
    family, model = packed
    names = list(model.state_dict())
    children = [name for name, _ in model.named_modules()]
    found = fuse_modules(model)
    function = "gelu_tanh" if "gemma" in family else "silu"
    assert [what for one in found.values() for what in one] == [
        text.format(function) for text in EXPECTED[family] * 2
    ]
    outputs(model, token_ids(length=1))
    grouped, mlps = CALLS[family]
    assert (calls.grouped, calls.mlps) == (2 * grouped, 2 * mlps)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == children
    assert fuse_modules(model) == found
    unfuse_modules(model)
    outputs(model, token_ids(length=1))
    assert (calls.grouped, calls.mlps) == (2 * grouped, 2 * mlps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs(packed: tuple[str, Any], dtype: torch.dtype, calls: Calls) -> None:
    """In 16 bits, not much further from float32 than the modules' own."""
    model = copy.deepcopy(packed[1]).to(dtype)
    unfuse_modules(model)
    exact = copy.deepcopy(model).float()
    for module in exact.modules():
        if isinstance(module, LittleBitLinear):
            module.activation = "exact"
    for rows, length in ((1, 1), (1, 2), (3, 5), (1, 17), (2, 32)):
        ids = token_ids(length, rows)
        unfuse_modules(model)
        own = outputs(model, ids)
        fuse_modules(model)
        calls.clear()
        fused = outputs(model, ids)
        assert calls.grouped > 0
        if dtype == torch.float32:
            assert relative_error(fused, own) < 2e-5
        else:
            truth = outputs(exact, ids)
            assert float((fused - truth).norm()) < 1.5 * float((own - truth).norm())


def test_greedy_tokens(packed: tuple[str, Any], calls: Calls) -> None:
    family, model = packed
    if family not in GENERATIVE:
        return
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}):
        unfuse_modules(model)
        own = greedy(model, token_ids(), **settings)
        fuse_modules(model)
        calls.clear()
        assert greedy(model, token_ids(), **settings) == own
        assert calls.mlps >= 2 * 16


def test_the_whole_of_fuse_projections(packed: tuple[str, Any]) -> None:
    """Modules and groups; both are undone."""
    _, model = packed
    unfuse_modules(model)
    kinds = [type(module) for module in model.modules()]
    fusion = littlebit2.fuse_projections(model)
    assert fusion.modules
    assert [len(group.members) for group in fusion.groups] == GROUPS.get(packed[0], [3, 2]) * 2
    assert [type(module) for module in model.modules()] != kinds
    littlebit2.unfuse_projections(model)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._group for module in model.modules() if isinstance(module, LittleBitLinear))
