"""A tiny dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.offline.builders import llama_tensors, write_model


@pytest.fixture
def model_dir(tmp_path: Path, rng: torch.Generator) -> Path:
    return write_model(tmp_path / "dense", llama_tensors(rng))
