"""The attention implementation ``littlebit2`` in models: where it is chosen, and what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

import littlebit2
from littlebit2.integrations.decoding import attention as implementation
from littlebit2.integrations.decoding.cache import grow_caches_of
from littlebit2.integrations.transformers import attach
from tests.integrations.families import FAMILIES, dense_model, quantized_copy

#: Families with another structure of heads or masks than the table has.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 12, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3", {"sliding_window": 12}),
    "phi3": ("phi3", {"sliding_window": 12}),
    "opt": ("opt", {}),
}


def model_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    family, change = CHANGES[name]
    config, sizes, kind = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (config, {**sizes, **change}, kind))
    return dense_model(family)


def results_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of several kinds of calls, and what is generated."""
    torch._dynamo.reset()
    found = {}
    with torch.no_grad():
        found["prefill"] = model(ids, attention_mask=mask).logits[:, 7:]
        found["short prefill"] = model(ids[1:, :6]).logits
        for few in (1, 3):
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :-few], attention_mask=mask[:, :-few], past_key_values=cache)
            output = model(ids[:, -few:], attention_mask=mask, past_key_values=cache)
            found[f"{few} after prefill"] = output.logits
        cache = StaticCache(config=model.config, max_cache_len=40)
        model(ids[1:, :-1], past_key_values=cache)
        found["static"] = model(ids[1:, -1:], past_key_values=cache).logits
    settings: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    for name, more in {
        "greedy": {},
        "beams": {"num_beams": 2},
        "fixed": {"cache_implementation": "static"},
    }.items():
        found[name] = model.generate(ids, attention_mask=mask, disable_compile=True, **settings, **more)
    found["assisted"] = model.generate(ids[1:], prompt_lookup_num_tokens=3, **settings)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_as_the_implementation_of_the_library(name, monkeypatch, rng):
    model = model_of(name, monkeypatch)
    ids = torch.randint(3, 160, (2, 17), generator=rng)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    wanted = results_of(model, ids, mask)
    assert implementation.choose(model)
    assert model.config._attn_implementation == implementation.NAME
    grow_caches_of(model)
    calls = []
    kernel = implementation.attention
    monkeypatch.setattr(implementation, "attention", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    got = results_of(model, ids, mask)
    assert len(calls) > 100
    for key, one in wanted.items():
        if one.dtype == torch.int64:
            assert torch.equal(got[key], one), key
        else:
            torch.testing.assert_close(got[key], one, atol=2e-4, rtol=2e-4, msg=lambda text, k=key: k + text)


def test_training_takes_the_way_of_the_library(monkeypatch, rng):
    model = dense_model("llama")
    ids = torch.randint(3, 160, (1, 5), generator=rng)
    wanted = model(ids, labels=ids).loss
    wanted.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    assert implementation.choose(model)
    model.zero_grad()
    monkeypatch.setattr(implementation, "attention", None)  # a call would fail
    model(ids, labels=ids).loss.backward()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, gradient)


def test_soft_caps_have_gradients(monkeypatch, rng):
    model = model_of("gemma2", monkeypatch)
    ids = torch.randint(3, 160, (1, 5), generator=rng)
    model(ids, labels=ids).loss.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    wanted = weight.grad.clone()
    assert implementation.choose(model)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(weight.grad, wanted, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_computed_is_refused():
    module = torch.nn.Module()
    x = torch.zeros(1, 2, 1, 8)
    for settings, message in (
        ({"softcap": 2.0, "dropout": 0.1}, "takes a soft cap without dropout"),
        ({"softcap": 2.0, "position_bias": x}, "takes a soft cap without dropout"),
        ({"cache": object()}, "must not be used with a paged cache"),
    ):
        with pytest.raises(ValueError, match=message):
            implementation.attention_forward(module, x, x, x, None, **settings)


def test_biases_and_dropout_are_left_to_the_library(monkeypatch, rng):
    monkeypatch.setattr(implementation, "attention", None)
    query, key, value = (torch.randn(1, 2, 1, 8, generator=rng) for _ in range(3))
    bias = torch.randn(1, 2, 1, 1, generator=rng)
    module = torch.nn.Module()
    for settings in ({"position_bias": bias}, {"dropout": 0.5}):
        torch.manual_seed(0)
        wanted = implementation.sdpa_attention_forward(module, query, key, value, None, **settings)[0]
        torch.manual_seed(0)
        assert torch.equal(
            implementation.attention_forward(module, query, key, value, None, **settings)[0], wanted
        )


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        # By the name of the implementation, its code turns masks.
        (
            "FalconConfig",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40},
        ),
        # No part of the library's interface.
        ("BloomConfig", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40}),
    ],
)
def test_other_models_keep_theirs(config, sizes):
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    before = model.config._attn_implementation
    assert not implementation.choose(model)
    assert model.config._attn_implementation == before


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory):
    model = quantized_copy(dense_model("llama"))
    attach(model)
    path = tmp_path_factory.mktemp("attention") / "model"
    model.save_pretrained(path)
    return path


def test_load_chooses_and_the_caller_overrules(path, tmp_path):
    model = littlebit2.load(path)
    assert model.config._attn_implementation == "littlebit2"
    for name in ("sdpa", "eager"):
        assert littlebit2.load(path, attn_implementation=name).config._attn_implementation == name
        other = AutoModelForCausalLM.from_pretrained(path, attn_implementation=name)
        assert other.config._attn_implementation == name
    assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "littlebit2"
    model.save_pretrained(tmp_path / "again")
    stored = (tmp_path / "again" / "config.json").read_text("utf-8")
    assert "attn_implementation" not in stored
    assert copy.deepcopy(model).config._attn_implementation == "littlebit2"


def test_exported_for_any_length(rng):
    model = dense_model("llama")
    assert implementation.choose(model)
    ids = torch.randint(3, 160, (1, 12), generator=rng)
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=shapes
        )
        for length in (4, 12):
            got = program.module()(input_ids=ids[:, :length], use_cache=False).logits
            torch.testing.assert_close(got, model(ids[:, :length]).logits, atol=1e-4, rtol=1e-4)
