"""Rows that dense heads of loaded models see."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch

from littlebit2 import load
from littlebit2.integrations.heads import keep_rows_flat


def _strides_at_head(model: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Strides of what the head gets in ``generate``, and those of a contiguous tensor."""
    seen = []

    def record(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((args[0].stride(), torch.empty(args[0].shape).stride()))

    with model.lm_head.register_forward_hook(record):
        model.generate(torch.arange(1, 8)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return seen


def test_generate_gives_the_head_contiguous_rows(path: Path) -> None:
    model = load(path)
    seen = _strides_at_head(model)
    assert len(seen) == 3
    assert all(got == flat for got, flat in seen)
    # What it is for: without it, the row after the prompt has the strides of the prompt.
    model.lm_head._forward_pre_hooks.clear()
    got, flat = _strides_at_head(model)[0]
    assert got != flat


def test_logits_and_state_stay(path: Path, rng: torch.Generator) -> None:
    model = load(path)
    ids = torch.randint(5, 60, (2, 9), generator=rng)
    with torch.no_grad():
        expected = model(ids).logits
        last = model(ids, logits_to_keep=2).logits
        assert model.lm_head(input=torch.zeros(1, 2, model.config.hidden_size)).shape[1] == 2
        none = model.lm_head(torch.empty(2, 0, model.config.hidden_size))
    torch.testing.assert_close(last, expected[:, -2:])
    assert none.shape == (2, 0, model.config.vocab_size)
    keep_rows_flat(model)
    assert len(model.lm_head._forward_pre_hooks) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            # Copies are not fused: norms round in between.
            torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-3, atol=1e-4)
            assert twin.lm_head._forward_pre_hooks
    assert "lm_head.weight" in model.state_dict()


def test_models_without_a_dense_head_stay_as_they_are() -> None:
    plain = torch.nn.Linear(4, 4)
    keep_rows_flat(plain)
    assert not plain._forward_pre_hooks
