"""Heads and embeddings in int8 rows: in memory, saved, loaded, and what is refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import littlebit2
from littlebit2.architecture.int8 import TiedInt8Linear, find_rows, int8_
from littlebit2.checkpoint import CheckpointError, open_checkpoint
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import Int8Embedding, Int8Linear
from tests.integrations.families import (
    GENERATIVE,
    assert_same,
    dense_model,
    greedy,
    outputs,
    quantized_copy,
    token_ids,
)

IDS = token_ids(9, 2)


def rounded_copy(model: Any) -> Any:
    """The dense model with the values that its int8 rows stand for."""
    dense = copy.deepcopy(model)
    for module in {dense.get_input_embeddings(), dense.get_output_embeddings()}:
        weight = module.weight.detach()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        module.weight = nn.Parameter((weight / scale).round() * scale)
    return dense


@pytest.mark.parametrize("family", GENERATIVE)
def test_every_family_computes_what_its_rounded_weights_do(family):
    model = dense_model(family)
    wanted = outputs(rounded_copy(model), IDS)
    rows = int8_(model)
    assert rows.tied == bool(model.config.tie_word_embeddings)
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert isinstance(model.get_output_embeddings(), TiedInt8Linear if rows.tied else Int8Linear)
    torch.testing.assert_close(outputs(model, IDS), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    names = [name for name in model.state_dict() if name.endswith("weight_int8")]
    assert len(names) == (1 if rows.tied else 2)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_copies_and_pickles_keep_their_tie(family):
    model = dense_model(family)
    int8_(model)
    wanted = outputs(model, IDS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(outputs(twin, IDS), wanted)
        twin.get_input_embeddings().weight_scale.zero_()
        assert not outputs(twin, IDS).any()
    assert torch.equal(outputs(model, IDS), wanted)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "opt", "phi3"])
def test_saved_and_loaded(family, tmp_path):
    model = quantized_copy(dense_model(family))
    rows = int8_(model)
    wanted = outputs(model, IDS)
    attach(model)
    model.save_pretrained(tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as checkpoint:
        assert set(checkpoint.int8) == set(rows.stored)
        assert set(checkpoint.config["quantization_config"]["int8"]) == set(rows.stored)
        assert not any("weight_int8" in name or "weight_scale" in name for name in checkpoint.dense)
    loaded = littlebit2.load(tmp_path / "saved")
    assert_same(outputs(loaded, IDS), wanted)
    assert greedy(loaded, IDS[:1]) == greedy(model, IDS[:1])
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert_same(outputs(again, IDS), wanted)


def test_scales_are_exact_in_bfloat16(tmp_path):
    model = quantized_copy(dense_model("gemma3"))
    int8_(model)
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = littlebit2.load(tmp_path, dtype=torch.bfloat16)
    embedding = loaded.get_input_embeddings()
    assert torch.equal(embedding.weight_scale, model.get_input_embeddings().weight_scale)
    assert embedding(IDS).dtype == torch.bfloat16
    assert loaded(IDS).logits.dtype == torch.bfloat16


def test_a_bias_of_the_head_stays(tmp_path):
    config = transformers.PhiConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    wanted = outputs(rounded_copy(model), IDS)
    model = quantized_copy(model)
    before = outputs(model, IDS)
    int8_(model)
    assert (outputs(model, IDS) - before).norm() < 0.05 * before.norm()
    assert (wanted - before).norm() > 0  # other weights are packed
    attach(model)
    model.save_pretrained(tmp_path)
    assert_same(outputs(littlebit2.load(tmp_path), IDS), outputs(model, IDS))


def test_head_alone_and_embedding_alone():
    head, embedding = dense_model("llama"), dense_model("llama")
    assert int8_(head, embedding=False).stored == ("lm_head",)
    assert type(head.get_input_embeddings()) is nn.Embedding
    assert int8_(embedding, head=False).stored == ("model.embed_tokens",)
    assert type(embedding.lm_head) is nn.Linear
    tied = dense_model("llama-tied")
    assert int8_(tied, embedding=False).stored == ("model.embed_tokens",)
    assert isinstance(tied.lm_head, TiedInt8Linear)


def test_a_tied_bias_of_the_head_stays_tied(tmp_path):
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = quantized_copy(transformers.BertForMaskedLM(config).eval())
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    int8_(model)
    assert model.get_output_embeddings().bias is model.cls.predictions.bias
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = littlebit2.load(tmp_path)
    assert torch.equal(outputs(loaded, IDS), outputs(model, IDS))
    assert loaded.get_output_embeddings().bias is loaded.cls.predictions.bias


def test_values_of_the_dense_weight_are_not_there():
    model = dense_model("llama")
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    int8_(model)
    outputs(model, IDS)
    assert calls == [1]
    handle.remove()
    weight = model.model.embed_tokens.weight
    assert (weight.shape, weight.dtype, weight.is_meta) == ((160, 64), torch.float32, True)
    with pytest.raises(ValueError, match="int8 rows cannot be resized"):
        model.resize_token_embeddings(200)


class Odd(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight).tanh()


def test_refused():
    model = dense_model("llama")
    before = outputs(model, IDS)
    odd = Odd(160, 64)
    odd.weight = model.model.embed_tokens.weight
    plain, model.model.embed_tokens = model.model.embed_tokens, odd
    with pytest.raises(ValueError, match="embed_tokens is a Odd, which is read otherwise than by rows"):
        int8_(model)
    model.model.embed_tokens = plain
    model.model.other = nn.Linear(64, 160, bias=False)
    model.model.other.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"its weight is that of model\.other\.weight too"):
        find_rows(model, head=True, embedding=False)
    del model.model.other
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        int8_(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 0
    assert outputs(model, IDS).shape == before.shape
    with pytest.raises(ValueError, match="BertModel has no output head"):
        int8_(dense_model("bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight_scale"), "lm_head.weight_scale is missing"),
        (
            lambda state: state.update({"lm_head.weight_scale": state["lm_head.weight_scale"].half()}),
            r"lm_head.weight_scale must be float32 \[160\], got torch.float16",
        ),
        (
            lambda state: state.update({"lm_head.weight_int8": state["lm_head.weight_int8"].int()}),
            r"lm_head.weight_int8 must be int8 \[rows, columns\]",
        ),
        (
            lambda state: state.update(
                {
                    "lm_head.weight_int8": state["lm_head.weight_int8"][:-1].clone(),
                    "lm_head.weight_scale": state["lm_head.weight_scale"][:-1].clone(),
                }
            ),
            r"lm_head must have shape \[160, 64\], got \[159, 64\]",
        ),
        (
            lambda state: state["lm_head.weight_scale"].fill_(torch.nan),
            "lm_head.weight_scale must be finite",
        ),
        (
            lambda state: [state.pop(f"lm_head.weight_{leaf}") for leaf in ("int8", "scale")],
            "int8 rows of 'lm_head': expected tensors, as the config says, got none",
        ),
    ],
)
def test_damaged_files(tmp_path, change, message):
    model = quantized_copy(dense_model("llama"))
    int8_(model)
    attach(model)
    model.save_pretrained(tmp_path)
    file = Path(tmp_path, "model.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        littlebit2.load(tmp_path)
