"""Perplexity of blocks that overlap, and agreement with a teacher, against plain computations."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from littlebit2.train.data import TokenBlocks
from littlebit2.train.data.tokens import TokenFile
from littlebit2.train.perplexity import agreement, perplexity

VOCABULARY = 11


class _Model(nn.Module):
    """Logits that depend on the token and on how many came before it."""

    device = torch.device("cpu")

    def __init__(self, rng: torch.Generator, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.by_token = torch.randn(VOCABULARY, vocabulary, generator=rng)
        self.by_position = torch.randn(128, vocabulary, generator=rng)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not self.training
        logits = self.by_token[input_ids] + self.by_position[: input_ids.shape[1]]
        return SimpleNamespace(logits=logits)


@pytest.fixture
def tokens(tmp_path: Path, rng: torch.Generator) -> TokenFile:
    ids = torch.randint(VOCABULARY, (103,), generator=rng).numpy().astype(np.uint16)
    ids.tofile(tmp_path / "tokens")
    return TokenFile(tmp_path / "tokens", len(ids), "uint16", 1, 0)


def _plain(model: _Model, tokens: TokenFile, length: int, stride: int) -> list[tuple[int, torch.Tensor]]:
    """Next tokens and the log-probabilities they were predicted with, each token once."""
    ids = torch.from_numpy(np.asarray(tokens.array()).astype(np.int64))
    seen = 0
    found = []
    for begin in range(0, len(ids) - length + 1, stride):
        logits = model.eval()(ids[begin : begin + length][None], use_cache=False).logits[0]
        for position in range(1, length):
            # The first token of a context is never predicted.
            if begin + position > seen:
                found.append((int(ids[begin + position]), logits[position - 1].double().log_softmax(-1)))
                seen = begin + position
    return found


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (16, 15), (16, 5), (16, 1), (2, 1), (103, 1)])
def test_each_token_counts_once(length: int, stride: int, tokens: TokenFile, rng: torch.Generator) -> None:
    model = _Model(rng).train()
    blocks = TokenBlocks(tokens, length, stride=stride)
    found = perplexity(model, blocks, batch_size=3)
    expected = _plain(model, tokens, length, stride)
    assert found.tokens == len(expected)
    nll = -sum(float(log[token]) for token, log in expected) / len(expected)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.value == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("stride", [16, 5])
def test_agreement(stride: int, tokens: TokenFile, rng: torch.Generator) -> None:
    model, teacher = _Model(rng), _Model(rng)
    blocks = TokenBlocks(tokens, 16, stride=stride)
    own, found = agreement(model, teacher, blocks, batch_size=2)
    assert own.nll == pytest.approx(perplexity(model, blocks).nll, rel=1e-6)
    assert found.teacher.nll == pytest.approx(perplexity(teacher, blocks).nll, rel=1e-6)
    both = zip(_plain(model, tokens, 16, stride), _plain(teacher, tokens, 16, stride), strict=True)
    pairs = [(a, b) for (_, a), (_, b) in both]
    assert found.tokens == len(pairs) == own.tokens
    kl = sum(float((b.exp() * (b - a)).sum()) for a, b in pairs) / len(pairs)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1 == sum(int(a.argmax() == b.argmax()) for a, b in pairs) / len(pairs)
    _, same = agreement(model, model, blocks)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1 == 1


def test_modes_stay_and_errors(tokens: TokenFile, rng: torch.Generator) -> None:
    model, teacher = _Model(rng).train(), _Model(rng).eval()
    blocks = TokenBlocks(tokens, 16)
    agreement(model, teacher, blocks)
    assert (model.training, teacher.training) == (True, False)
    model.part = nn.Dropout().eval()  # a part that its owner keeps out of training
    perplexity(model, blocks)
    assert (model.training, model.part.training) == (True, False)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        agreement(model, teacher, blocks, batch_size=0)
    with pytest.raises(ValueError, match="teacher must give logits of shape"):
        agreement(model, _Model(rng, 12), blocks)
    assert model.training
    with pytest.raises(ValueError, match="stride must be from 1 to the 16 tokens of a block, got 17"):
        TokenBlocks(tokens, 16, stride=17)
