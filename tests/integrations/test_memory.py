"""Loading holds the packed model and one tensor: no unpacked copy, at no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import littlebit2
from littlebit2.checkpoint import open_checkpoint

#: 67 million weights: 268 MB in float32, 134 MB in bfloat16, about 5 MB packed.
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 256,
}
ALLOWED = 60e6

# Loads and runs once, then prints how far the peak of resident memory rose.
PROBE = """
import sys, torch, transformers, littlebit2
littlebit2.register()
from transformers import AutoModelForCausalLM
from littlebit2.integrations.generation import resident_memory
# What is imported, compiled and allocated at the first use of anything is not the model's.
small = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
transformers.LlamaForCausalLM(small)(torch.tensor([[1]]))
import littlebit2_kernels; littlebit2_kernels.load()
before = resident_memory()[1]
load = littlebit2.load if sys.argv[2] == "load" else AutoModelForCausalLM.from_pretrained
model = load(sys.argv[1])
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
print(resident_memory()[1] - before)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model"
    littlebit2.synthesize(transformers.LlamaConfig(**SIZES), path, 0.5)
    with open_checkpoint(path) as checkpoint:
        weights = sum(spec.shape.in_features * spec.shape.out_features for spec in checkpoint.layers.values())
    assert torch.float32.itemsize * weights > 3 * ALLOWED
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_peak(path: Path, way: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(path), way], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < ALLOWED
