"""Layers grouped by their names, in models whose classes are not recognized."""

from __future__ import annotations

import torch
import transformers

import littlebit2
from tests.integrations.families import quantized_copy, token_ids


def test_cross_attention_goes_alone() -> None:
    """T5-like models call k and v with the encoder's states; results are those of the layers alone."""
    config = transformers.BartConfig(
        vocab_size=160,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = quantized_copy(transformers.BartModel(config).eval())
    ids = token_ids()
    with torch.no_grad():
        alone = model(ids, decoder_input_ids=ids[:, :5]).last_hidden_state
        fusion = littlebit2.fuse_projections(model, on_cpu=True)
        for _ in range(3):
            states = model(ids, decoder_input_ids=ids[:, :5]).last_hidden_state
            torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
    assert [len(group.members) for group in fusion.groups] == [3, 3, 3]
    kinds = {name: m._group.together for name, m in model.named_modules() if name.endswith("k_proj")}
    assert kinds == {name: "encoder_attn" not in name for name in kinds}
    assert len(kinds) == 3
