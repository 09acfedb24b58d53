"""What ``register`` changes in transformers, and what importing the package does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import transformers
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import littlebit2
from littlebit2.integrations.transformers import LittleBit2Quantizer, unregister
from tests.integrations.families import dense_model
from tests.integrations.upstream import write


def test_registering_twice_and_undoing() -> None:
    unregister()
    plain = vars(transformers.PreTrainedConfig)["get_config_dict"].__func__
    assert AUTO_QUANTIZER_MAPPING.get("littlebit2") is not LittleBit2Quantizer
    littlebit2.register()
    wrapped = vars(transformers.PreTrainedConfig)["get_config_dict"].__func__
    assert wrapped is not plain
    littlebit2.register()
    assert vars(transformers.PreTrainedConfig)["get_config_dict"].__func__ is wrapped
    assert AUTO_QUANTIZER_MAPPING["littlebit2"] is LittleBit2Quantizer


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "dense"), "quantization_config")
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"not one")
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "dense"), "quantization_config")
    other = json.loads((tmp_path / "dense" / "config.json").read_text())
    other["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(other))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    assert config.quantization_config["quant_method"] == "awq"


def test_authors_directory_is_described(tmp_path: Path) -> None:
    write(tmp_path / "theirs", dense_model("llama"), (16, 8))
    (tmp_path / "theirs" / "littlebit_config.json").unlink()
    described = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").quantization_config
    assert described["quant_method"] == "littlebit2"
    assert described["ranks"]["model.layers.0.self_attn.q_proj"] == [16, 8]


def test_import_stays_light() -> None:
    code = "import sys, littlebit2; print(sorted({'transformers', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
