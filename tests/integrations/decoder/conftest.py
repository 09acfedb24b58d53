"""Counting of calls, and a packed Llama."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.decoder.calls import Calls
from tests.integrations.families import dense_model, outputs, quantized_copy, token_ids


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A packed and prepacked Llama, not fused; tests work on copies."""
    model = quantized_copy(dense_model("llama"))
    outputs(model, token_ids())
    return model
