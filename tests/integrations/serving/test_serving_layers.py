"""Parts of the servers' plugins that need no server: which modules are packed, what a directory lacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from littlebit2.checkpoint import CheckpointError
from littlebit2.integrations.configuration import LittleBit2Config
from littlebit2.integrations.serving.completeness import Completeness, check_directory
from littlebit2.integrations.serving.layers import LayerTable
from littlebit2.integrations.transformers import attach
from tests.integrations.families import dense_model, quantized_copy

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
ATTENTION = "model.layers.0.self_attn"


def _table(*names: str, **more: Any) -> LayerTable:
    return LayerTable.from_config(LittleBit2Config(ranks={name: [8 * len(name)] for name in names}, **more))


def test_parts_of_a_fused_module_in_its_order() -> None:
    table = _table(*(f"{ATTENTION}.{name}" for name in ("v_proj", "q_proj", "k_proj")))
    parts = table.parts(f"{ATTENTION}.qkv_proj", QKV)
    assert parts is not None
    assert [part.name.rpartition(".")[2] for part in parts] == QKV["qkv_proj"]
    assert [part.structure.num_paths for part in parts] == [1, 1, 1]
    # The names of parts that most models share are known without the model's mapping.
    assert table.parts(f"{ATTENTION}.qkv_proj", {}) == parts


def test_whole_modules_and_dense_ones() -> None:
    table = _table(f"{ATTENTION}.o_proj", single_stage=["model.layers.0.mlp.down_proj"])
    for name, ranks in (
        (f"{ATTENTION}.o_proj", (8 * len(f"{ATTENTION}.o_proj"),)),
        ("model.layers.0.mlp.down_proj", None),
    ):
        parts = table.parts(name, QKV)
        assert parts is not None
        assert [part.structure.ranks for part in parts] == [ranks]
    assert table.parts(f"{ATTENTION}.qkv_proj", QKV) is None
    assert table.parts("lm_head", QKV) is None


def test_fused_in_the_checkpoint() -> None:
    fused = f"{ATTENTION}.qkv_proj"
    parts = _table(fused).parts(fused, {"qkv_proj": ["qkv_proj"]})
    assert parts is not None
    assert [part.name for part in parts] == [fused]


def test_renamed() -> None:
    table = _table("model.decoder.layers.0.fc1")
    mapped = table.renamed(lambda names: {f"new.{name}": one for name, one in names.items()})
    parts = mapped.parts("new.model.decoder.layers.0.fc1", {})
    assert parts is not None
    # Errors and tensors go by the name in the files.
    assert parts[0].structure.stored == "model.decoder.layers.0.fc1"


def test_refuses() -> None:
    some = _table(f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj")
    with pytest.raises(ValueError, match=r"q_proj, .*k_proj are, .*v_proj are not"):
        some.parts(f"{ATTENTION}.qkv_proj", QKV)
    split = _table(*(f"{ATTENTION}.{name}" for name in QKV["qkv_proj"]))
    with pytest.raises(ValueError, match=r"expects one layer of this name, the checkpoint has it in parts"):
        split.parts(f"{ATTENTION}.qkv_proj", {"qkv_proj": ["qkv_proj"]})
    with pytest.raises(ValueError, match="lm_head: heads stay dense"):
        _table("lm_head").refuse_at("lm_head", "heads stay dense")
    with pytest.raises(ValueError, match=r"mlp\.experts\.1\.up_proj and 0 more: not yet"):
        _table("model.layers.0.mlp.experts.1.up_proj").refuse_experts("not yet")
    with pytest.raises(ValueError, match=r"o_proj: salient columns are not served yet"):
        _table(f"{ATTENTION}.o_proj", salient_columns={f"{ATTENTION}.o_proj": 4})
    some.refuse_at("lm_head", "never said")
    some.refuse_experts("never said")


def test_int8_rows_of_named_and_nameless_modules() -> None:
    table = _table(f"{ATTENTION}.q_proj", int8=["lm_head", "model.embed_tokens"])
    assert table.rows_at("lm_head", None) == "lm_head"
    assert table.rows_at("model.embed_tokens", "") == table.rows_at("", "") == "model.embed_tokens"
    # A head without a name is not known to be that one, and another embedding is dense.
    assert table.rows_at("", None) is None
    assert table.rows_at("model.embed_positions", "") is None
    renamed = table.renamed(lambda names: {f"new.{name}": one for name, one in names.items()})
    assert renamed.rows_at("new.lm_head", None) == "lm_head"


@pytest.fixture(scope="module", params=["llama", "llama-tied", "phi3"])
def model(request: pytest.FixtureRequest) -> Any:
    packed = quantized_copy(dense_model(request.param))
    attach(packed)
    return packed


def test_a_whole_directory_passes(model: Any, tmp_path: Path) -> None:
    copy.deepcopy(model).save_pretrained(tmp_path / "packed")
    check_directory(tmp_path / "packed")


@pytest.mark.parametrize(
    "missing", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.u1"]
)
def test_missing_tensors_are_named(model: Any, tmp_path: Path, missing: str) -> None:
    path = tmp_path / "packed"
    copy.deepcopy(model).save_pretrained(path)
    tensors: dict[str, torch.Tensor] = dict(load_file(path / "model.safetensors"))
    tensors = {name: one.clone() for name, one in tensors.items() if name != missing}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        check_directory(path)


def test_names_on_the_hub_are_checked_once_downloaded(model: Any, tmp_path: Path) -> None:
    downloads = tmp_path / "models--someone--packed"
    snapshot = downloads / "snapshots" / ("1" * 40)
    copy.deepcopy(model).save_pretrained(snapshot)
    (downloads / "refs").mkdir()
    (downloads / "refs" / "main").write_text("1" * 40)
    completeness = Completeness()
    completeness.expect("someone/packed")  # nothing is there before the server downloads
    completeness.check(str(tmp_path))
    tensors = {name: one.clone() for name, one in load_file(snapshot / "model.safetensors").items()}
    del tensors["model.norm.weight"]
    save_file(tensors, snapshot / "model.safetensors", {"format": "pt"})
    completeness.check(str(tmp_path))  # only once
    completeness.expect("someone/packed")
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.norm\.weight"):
        completeness.check(str(tmp_path))
    completeness.expect("someone/else")
    with pytest.raises(CheckpointError, match=r"someone/else: whether all .* cannot be checked"):
        completeness.check(str(tmp_path))


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="the layout must be littlebit2, got dense: convert it first"):
        check_directory(tmp_path / "dense")
