"""The loss of the whole model's tuning, formed a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from littlebit2.architecture.select import DEFAULT_EXCLUDE, KEEP
from littlebit2.blockwise.find import find_blocks
from littlebit2.blockwise.pieces import ModelInPieces
from littlebit2.blockwise.tuning import output
from littlebit2.blockwise.tuning.output import output_kl
from littlebit2.checkpoint import open_dense
from littlebit2.offline.choice import choose_layers
from littlebit2.train.losses import distillation_kl
from tests.blockwise.builders import CONFIG, write_model


@pytest.fixture(params=["qwen2", "gemma3"])
def pieces(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelInPieces]:
    with open_dense(write_model(tmp_path / "dense", request.param)) as checkpoint:
        choice = choose_layers(
            checkpoint, CONFIG, include=("*",), exclude=(DEFAULT_EXCLUDE,), head=KEEP, embedding=KEEP
        )
        assert choice.trial is not None
        model = choice.trial.model
        blocks = find_blocks(model, choice.layers)
        yield ModelInPieces(model, choice.trial.parts, checkpoint.load_tensor, blocks, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 5, 11, 100])
def test_it_is_the_kl_of_all_logits(
    tokens: int, pieces: ModelInPieces, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, width = pieces.model.get_input_embeddings().weight.shape
    ids = torch.randint(vocabulary, (2, 11), generator=rng)
    hidden, target = (torch.randn(2, 11, width, generator=rng) for _ in range(2))
    whole = hidden.clone().requires_grad_(True)
    expected = distillation_kl(pieces.finish(ids, whole, gradients=True), pieces.finish(ids, target))
    (gradient,) = torch.autograd.grad(3 * expected, whole)

    monkeypatch.setattr(output, "_LEAST", 1)
    monkeypatch.setitem(output._BYTES, "cpu", 4 * vocabulary * len(ids) * tokens)
    parts = hidden.clone().requires_grad_(True)
    found = output_kl(pieces, ids, parts, target)
    (in_parts,) = torch.autograd.grad(3 * found, parts)
    assert float(expected.detach()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_parts, gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(output_kl(pieces, ids, hidden, target), found)


def test_no_more_logits_than_were_asked_for(
    pieces: ModelInPieces, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, width = pieces.model.get_input_embeddings().weight.shape
    ids = torch.randint(vocabulary, (3, 7), generator=rng)
    hidden = torch.randn(3, 7, width, generator=rng)
    sizes = []
    monkeypatch.setattr(
        output, "distillation_kl", lambda student, teacher: sizes.append(student.shape[1]) or student.sum()
    )
    monkeypatch.setattr(output, "_LEAST", 1)
    monkeypatch.setitem(output._BYTES, "cpu", 4 * vocabulary * len(ids) * 2)
    output_kl(pieces, ids, hidden, hidden)
    assert sizes == [2, 2, 2, 1]
