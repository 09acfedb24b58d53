"""Fused projections: found by their names, the same results, nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import littlebit2
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import LinearGroup, LittleBitLinear, unfuse_linears
from tests.integrations.families import (
    FAMILIES,
    GENERATIVE,
    dense_model,
    greedy,
    outputs,
    quantized_copy,
    token_ids,
)

#: Groups of a layer of the family: sizes of attention and MLP.
EXPECTED = {"bert": [3], "opt": [3]}


def _groups(model: Any) -> list[LinearGroup]:
    found = [m._group for m in model.modules() if isinstance(m, LittleBitLinear) and m._group is not None]
    return list(dict.fromkeys(found))


def _unfused(model: Any) -> Any:
    unfuse_linears([m for m in model.modules() if isinstance(m, LittleBitLinear)])
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, quantized_copy(dense_model(request.param))


def test_every_family(packed: tuple[str, Any]) -> None:
    family, model = packed
    ids = token_ids(rows=2)
    names = list(model.state_dict())
    alone = outputs(_unfused(model), ids)
    groups = littlebit2.fuse_projections(model, on_cpu=True)
    if family == "phi3":  # quantized as it is, with its projections already one
        assert groups == []
        return
    assert [len(group.members) for group in groups] == EXPECTED.get(family, [3, 2]) * 2
    assert torch.equal(outputs(model, ids), alone)
    assert all(group.together and group._pending is None for group in groups)
    assert list(model.state_dict()) == names
    if family in GENERATIVE:
        fused = greedy(model, token_ids())
        assert fused == greedy(_unfused(model), token_ids())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized_copy(dense_model("llama"))
    attach(model)
    directory = tmp_path_factory.mktemp("packed")
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_loading_fuses(path: Path, tmp_path: Path, way: str) -> None:
    if way == "load":
        model = littlebit2.load(path)
        assert _groups(littlebit2.load(path, fuse=False)) == []
    else:
        littlebit2.register()
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    groups = _groups(model)
    assert [len(group.members) for group in groups] == [3, 2, 3, 2]
    assert not any(group.on_cpu for group in groups)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).stat().st_size == (path / name).stat().st_size
    assert "fuse" not in json.loads((path / "config.json").read_text())["quantization_config"]


def test_cross_attention_goes_alone() -> None:
    """T5-like models call k and v with the encoder's states; results are those of the layers alone."""
    config = transformers.BartConfig(
        vocab_size=160,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = quantized_copy(transformers.BartModel(config).eval())
    ids = token_ids()
    with torch.no_grad():
        alone = model(ids, decoder_input_ids=ids[:, :5]).last_hidden_state
        littlebit2.fuse_projections(model, on_cpu=True)
        for _ in range(3):
            assert torch.equal(model(ids, decoder_input_ids=ids[:, :5]).last_hidden_state, alone)
    kinds = {name: m._group.together for name, m in model.named_modules() if name.endswith("k_proj")}
    assert kinds == {name: "encoder_attn" not in name for name in kinds}
    assert len(kinds) == 3


def test_compiled_step_calls_the_grouped_operator(path: Path) -> None:
    model = littlebit2.load(path)
    ids = token_ids(rows=2)
    alone = outputs(model, ids)
    littlebit2.fuse_projections(model, on_cpu=True)
    torch._dynamo.reset()
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if "littlebit2" in str(node.target))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        logits = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    grouped = [name for name in found if "grouped_linear_prepacked" in name]
    assert len(grouped) == 4
    assert len(found) == 4 + 4
