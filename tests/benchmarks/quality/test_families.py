"""A sample of the model types of transformers: none may quantize and then fail to load or run."""

from __future__ import annotations

import pytest

from benchmarks.quality import families

#: Types of which something failed before it was repaired.
ONCE_WRONG = ("gpt2", "diffusion_gemma", "lw_detr", "mask2former", "qwen2_5_omni", "t5")
TYPES = families.model_types()
SAMPLE = dict.fromkeys([*TYPES[::12], *(one for one in ONCE_WRONG if one in TYPES)])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SAMPLE)
def test_what_quantizes_loads_and_runs(model_type: str) -> None:
    outcome = families.try_apart(model_type)
    if outcome.kind in (families.NOT_BUILT, families.REFUSED):
        pytest.skip(f"{outcome.kind}: {outcome.reason}")
    assert outcome.kind == families.WORKS, outcome.reason
