"""The authors' layout, written by an independent packer, through ``load`` and ``from_pretrained``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import littlebit2
from littlebit2.integrations.modules import FusedLinear
from littlebit2_kernels import LittleBitLinear
from tests.integrations.families import dense_model, greedy, outputs, relative_error, token_ids
from tests.integrations.upstream import write

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "two paths": ("llama", {}),
    "one path": ("llama", {"ranks": (16,)}),
    "float latents": ("llama", {"packed": False}),
    "sharded": ("qwen3", {"shards": 3}),
    "biases": ("qwen2", {}),
    "tied": ("llama-tied", {}),
    "phi split qkv": ("phi3", {}),
    "opt": ("opt", {}),
    "bert": ("bert", {}),
}


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    family, options = CASES[request.param]
    model = dense_model(family)
    path = tmp_path_factory.mktemp("authors") / "checkpoint"
    write(path, model, **options)
    return model, path


def _loaded(model: Any, path: Path, way: str, **options: Any) -> Any:
    if way == "load":
        return littlebit2.load(path, **options)
    causal = model.can_generate()
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    littlebit2.register()
    return auto.from_pretrained(path, **options)


@pytest.mark.parametrize("way", ["from_pretrained", "load"])
def test_float32(written: tuple[Any, Path], way: str) -> None:
    reference, path = written
    model = _loaded(reference, path, way)
    assert any(isinstance(module, LittleBitLinear) for module in model.modules())
    ids = token_ids(rows=2)
    assert relative_error(outputs(model, ids), outputs(reference, ids)) < 2e-5
    if reference.can_generate():
        wanted = greedy(reference, token_ids())
        assert len(set(wanted)) > 2
        assert greedy(model, token_ids()) == wanted


def test_bfloat16(written: tuple[Any, Path]) -> None:
    reference, path = written
    model = _loaded(reference, path, "load", dtype=torch.bfloat16)
    ids = token_ids()
    assert relative_error(outputs(model, ids), outputs(reference, ids)) < 0.05


def test_our_save_of_it_loads_again(written: tuple[Any, Path], tmp_path: Path) -> None:
    reference, path = written
    first = _loaded(reference, path, "from_pretrained")
    first.save_pretrained(tmp_path / "ours")
    second = littlebit2.load(tmp_path / "ours")
    ids = token_ids()
    assert torch.equal(outputs(second, ids), outputs(first, ids))


def test_phi_parts_are_siblings(tmp_path: Path) -> None:
    write(tmp_path / "phi", dense_model("phi3"))
    model = littlebit2.load(tmp_path / "phi")
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention.qkv_proj, FusedLinear)
    assert {name for name, _ in attention.named_children()} == {
        "o_proj", "q_proj", "k_proj", "v_proj", "qkv_proj",
    }  # fmt: skip
    assert not any(".qkv_proj." in name for name in model.state_dict())


def test_phi_parts_may_be_replaced(tmp_path: Path, rng: torch.Generator) -> None:
    write(tmp_path / "phi", dense_model("phi3"))
    model = littlebit2.load(tmp_path / "phi")
    attention = model.get_submodule("model.layers.0.self_attn")
    x = torch.randn(2, attention.q_proj.in_features, generator=rng)
    before = attention.qkv_proj(x)
    inner = attention.q_proj
    attention.q_proj = torch.nn.Sequential(inner, torch.nn.ReLU())  # as an adapter takes a layer's place
    expected = torch.cat([inner(x).relu(), before[:, inner.out_features :]], -1)
    assert torch.equal(attention.qkv_proj(x), expected)
    copied = copy.deepcopy(model)
    copied.get_submodule("model.layers.0.self_attn").q_proj = inner
    assert torch.equal(attention.qkv_proj(x), expected)
