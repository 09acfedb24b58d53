"""gpt-oss as it is published: experts in mxfp4, dequantized as transformers does, then packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import littlebit2
from littlebit2.architecture.experts import LittleBitExperts
from littlebit2.checkpoint import CheckpointError, open_checkpoint, open_dense
from littlebit2.checkpoint.dense import dequantize_mxfp4
from littlebit2_kernels import LittleBitLinear
from tests.integrations.models.moe import QUANT, make, run

_NAMES = ("gate_up_proj", "down_proj")


def published(folder: Path) -> tuple[Path, Path]:
    """Write a tiny gpt-oss in mxfp4, and the same in bfloat16 as transformers dequantizes it."""
    make("gpt_oss").bfloat16().save_pretrained(folder / "dense")
    tensors = load_file(folder / "dense/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for name in [name for name in tensors if name.endswith(_NAMES)]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
        pairs |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "dense/model.safetensors", {"format": "pt"})
    (folder / "mxfp4").mkdir()
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(_NAMES)}
    save_file({**rest, **pairs}, folder / "mxfp4/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "dense/config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "mxfp4/config.json").write_text(json.dumps(config))
    return folder / "mxfp4", folder / "dense"


def test_every_byte_and_scale_becomes_what_transformers_makes_of_it(rng: torch.Generator) -> None:
    blocks = torch.randint(0, 256, (2, 16, 8, 16), generator=rng, dtype=torch.uint8)
    blocks[0, 0] = torch.arange(128, dtype=torch.uint8).view(8, 16)
    blocks[0, 1] = torch.arange(128, 256, dtype=torch.uint8).view(8, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(2, 16, 8)
    got, expected = dequantize_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(dequantize_mxfp4(blocks[1], scales[1]), got[1])


def test_the_result_is_that_of_the_dequantized_model(tmp_path: Path) -> None:
    source, dense = published(tmp_path)
    for model, out in ((source, "a"), (dense, "b")):
        littlebit2.quantize_checkpoint(model, tmp_path / out, QUANT, progress=False)
    with open_checkpoint(tmp_path / "a") as one, open_checkpoint(tmp_path / "b") as other:
        assert list(one.layers) == list(other.layers)
        assert one.config == other.config
        assert one.dense == other.dense
        assert "model.layers.1.mlp.experts.3.down_proj" in one.layers
    assert load_file(tmp_path / "a/model.safetensors").keys() == (
        load_file(tmp_path / "b/model.safetensors").keys()
    )
    packed = littlebit2.load(tmp_path / "a")
    experts = [module for module in packed.modules() if isinstance(module, LittleBitExperts)]
    assert all(isinstance(module.expert(3).gate_proj, LittleBitLinear) for module in experts)
    torch.testing.assert_close(run(packed), run(littlebit2.load(tmp_path / "b")), atol=0, rtol=0)


def test_experts_that_stay_dense_are_written_dequantized(tmp_path: Path) -> None:
    source, dense = published(tmp_path)
    littlebit2.quantize_checkpoint(
        source, tmp_path / "q", QUANT, exclude=["*lm_head*", "*.experts.*"], progress=False
    )
    name = "model.layers.0.mlp.experts.gate_up_proj"
    written = load_file(tmp_path / "q/model.safetensors")[name]
    assert torch.equal(written, load_file(dense / "model.safetensors")[name])
    assert run(littlebit2.load(tmp_path / "q")).isfinite().all()


def test_one_expert_is_dequantized_alone(tmp_path: Path) -> None:
    source, dense = published(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    with open_dense(source) as checkpoint:
        assert checkpoint.dense[name] == ((4, 96, 64), torch.bfloat16)
        assert f"{name}_blocks" not in checkpoint.dense
        assert "quantization_config" not in checkpoint.config
        whole = load_file(dense / "model.safetensors")[name]
        assert torch.equal(checkpoint.load_tensor(name), whole)
        assert torch.equal(checkpoint.read_tensor(name), whole)
        assert torch.equal(checkpoint.load_tensor(name, 2), whole[2])


def test_a_pair_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source, _ = published(tmp_path)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mxfp4 needs .*layers\.0\.mlp\.experts\.down_proj_blocks"):
        open_dense(source)
