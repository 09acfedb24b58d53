"""A small packed model, and the folder that ``save_pretrained`` makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from littlebit2.integrations.transformers import attach
from tests.integrations.families import dense_model, quantized_copy


@pytest.fixture(scope="module")
def packed() -> Any:
    """A packed Llama, ready to be saved; shared by the tests of a file, which leave it as it is."""
    model = quantized_copy(dense_model("llama"))
    attach(model)
    return model


@pytest.fixture
def path(packed: Any, tmp_path: Path) -> Path:
    """A folder with the packed Llama, of the test's own."""
    packed.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"
