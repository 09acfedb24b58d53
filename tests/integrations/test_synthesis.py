"""``littlebit2.synthesize``: random checkpoints that load and stay finite."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import littlebit2
from littlebit2.checkpoint import open_checkpoint
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import LittleBitLinear
from tests.integrations.families import FAMILIES, dense_model, outputs, token_ids


def _config(family: str) -> object:
    return dense_model(family).config


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    config = _config(family)
    config.update({"architectures": [FAMILIES[family][2]]})
    names = littlebit2.synthesize(config, tmp_path / "out", 2.0, dtype=torch.float32)
    model = littlebit2.load(tmp_path / "out")
    assert type(model).__name__ == FAMILIES[family][2]
    result = outputs(model, token_ids())
    assert result.isfinite().all()
    assert 1e-3 < result.abs().max() < 1e3
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint.layers) == set(names)
        assert not any("lm_head" in name for name in names)
        for spec in checkpoint.layers.values():
            assert (
                spec.shape.ranks == (rank_for_bpw(spec.shape.in_features, spec.shape.out_features, 2.0),) * 2
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(path.iterdir()))).hexdigest()


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    config = _config("llama").to_dict()
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        littlebit2.synthesize(config, tmp_path / name, 2.0, paths=1, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b") != _digest(tmp_path / "c")
    model = littlebit2.load(tmp_path / "a")
    assert model.dtype == torch.bfloat16


def test_budget_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj'.*bpw must be above"):
        littlebit2.synthesize(_config("llama"), tmp_path / "out", 0.1)
    assert list(tmp_path.iterdir()) == []


def test_unknown_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        littlebit2.synthesize("no-such-model", tmp_path / "out", 1.0)
    with pytest.raises(ValueError, match="model_type"):
        littlebit2.synthesize({"hidden_size": 8}, tmp_path / "out", 1.0)


def test_packed_head(tmp_path: Path) -> None:
    names = littlebit2.synthesize(_config("llama"), tmp_path / "out", 2.0, exclude=(), embedding="int8")
    assert "lm_head" in names
    model = littlebit2.load(tmp_path / "out")
    assert isinstance(model.lm_head, LittleBitLinear)
    assert outputs(model, token_ids()).isfinite().all()
    with pytest.raises(ValueError, match=r"head must be 'keep' where exclude lets .*lm_head.* got 'int8'"):
        littlebit2.synthesize(_config("llama"), tmp_path / "both", 2.0, exclude=(), head="int8")
    assert not (tmp_path / "both").exists()
