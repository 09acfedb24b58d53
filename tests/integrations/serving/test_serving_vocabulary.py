"""Heads and embeddings of servers: slices of the vocabulary, int8 rows and packed heads, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from littlebit2.checkpoint import CheckpointError
from littlebit2.integrations.serving.completeness import Completeness
from littlebit2.integrations.serving.layers import Part, Structure
from littlebit2.integrations.serving.vocabulary import Int8RowsBase, PackedHeadBase
from littlebit2_kernels import JoinedLinear, packed_to_state
from littlebit2_kernels.int8 import dequantize_rows, quantize_rows
from littlebit2_kernels.testing import make_packed

TOKENS, PADDED, WIDTH = 300, 320, 64


class Vocabulary(torch.nn.Module):
    """What the methods read of a server's module; it holds a part of the vocabulary."""

    def __init__(self, rank: int, ranks: int, tokens: int = TOKENS) -> None:
        super().__init__()
        self.num_embeddings, self.org_vocab_size, self.embedding_dim = tokens, TOKENS, WIDTH
        self.size = PADDED // ranks
        begin = min(rank * self.size, TOKENS)
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=begin, org_vocab_end_index=min(begin + self.size, TOKENS)
        )
        self.bias = None

    def make(self, method: Any) -> None:
        method.create_weights(self, WIDTH, [self.size], WIDTH, PADDED, params_dtype=torch.float32)


def load(layer: Vocabulary, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        parameter: Any = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


# Of 16 ranks the last holds nothing but rows that pad the vocabulary.
@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_int8_rows(rng: torch.Generator, ranks: int) -> None:
    rows, scale = quantize_rows(torch.randn(TOKENS, WIDTH, generator=rng))
    x = torch.randn(3, WIDTH, generator=rng)
    bias = torch.randn(PADDED, generator=rng)
    dense = dequantize_rows(rows, scale)
    logits = []
    for rank in range(ranks):
        layer, method = Vocabulary(rank, ranks), Int8RowsBase("lm_head")
        layer.make(method)
        load(layer, {"weight_int8": rows, "weight_scale": scale})
        method.process_weights_after_loading(layer)
        part = slice(rank * layer.size, (rank + 1) * layer.size)
        logits.append(method.apply(layer, x, bias[part]))
        indices = layer.shard_indices
        begin, end = indices.org_vocab_start_index, indices.org_vocab_end_index
        torch.testing.assert_close(method.embedding(layer, torch.arange(end - begin)), dense[begin:end])
    got = torch.cat(logits, -1)
    torch.testing.assert_close(got[:, :TOKENS], x @ dense.T + bias[:TOKENS])
    torch.testing.assert_close(got[:, TOKENS:], bias[TOKENS:].expand(3, -1))


def test_int8_rows_are_refused(rng: torch.Generator) -> None:
    rows, scale = quantize_rows(torch.randn(TOKENS, WIDTH, generator=rng))
    layer, method = Vocabulary(0, 1), Int8RowsBase("lm_head")
    layer.make(method)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_int8 is missing"):
        method.process_weights_after_loading(layer)
    for name, tensor in (("weight_int8", rows[1:]), ("weight_scale", scale.half())):
        with pytest.raises(CheckpointError, match=rf"lm_head\.{name} must be .*, got .* of shape"):
            load(layer, {name: tensor})
    scale[7] = float("nan")
    load(layer, {"weight_int8": rows, "weight_scale": scale})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scale must be finite"):
        method.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match=r"lm_head: tokens beside those of the checkpoint .* got 301 of 300"):
        Vocabulary(0, 1, TOKENS + 1).make(Int8RowsBase("lm_head"))


def packed_head() -> PackedHeadBase:
    part = Part("lm_head", Structure("lm_head", (24,), ()))
    return PackedHeadBase([part], "auto", "exact", Completeness())


@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_packed_head(rng: torch.Generator, ranks: int) -> None:
    packed = make_packed(WIDTH, TOKENS, [24], generator=rng)
    x = torch.randn(3, WIDTH, generator=rng)
    logits = []
    for rank in range(ranks):
        layer, method = Vocabulary(rank, ranks), packed_head()
        layer.make(method)
        load(layer, packed_to_state(packed))
        method.process_weights_after_loading(layer)
        assert not list(layer.parameters())
        logits.append(method.apply(layer, x))
    got = torch.cat(logits, -1)
    torch.testing.assert_close(got[:, :TOKENS], JoinedLinear([packed], activation="exact")(x))
    assert not got[:, TOKENS:].any()


def test_packed_heads_are_refused(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"lm_head: tokens beside those of the checkpoint"):
        Vocabulary(0, 1, TOKENS + 1).make(packed_head())
    layer, method = Vocabulary(0, 1), packed_head()
    layer.make(method)
    load(layer, packed_to_state(make_packed(WIDTH, TOKENS - 1, [24], generator=rng)))
    with pytest.raises(ValueError, match=r"lm_head: .* must be \(64, 300\), got \(64, 299\)"):
        method.process_weights_after_loading(layer)
