"""Every model type of transformers: none may quantize and then fail to load or run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import families


@pytest.mark.slow
@pytest.mark.parametrize("model_type", families.model_classes())
def test_what_quantizes_loads_and_runs(model_type: str, tmp_path: Path) -> None:
    outcome = families.try_class(families.model_classes()[model_type], model_type, tmp_path)
    if outcome.kind in (families.NOT_BUILT, families.REFUSED):
        pytest.skip(f"{outcome.kind}: {outcome.reason}")
    assert outcome.kind == families.WORKS, outcome.reason
