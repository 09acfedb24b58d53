"""``littlebit2.generate`` on models whose own loop it leaves to transformers, and prompts it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForCausalLM, T5Config, T5ForConditionalGeneration

import littlebit2
from tests.integrations.families import dense_model


@pytest.fixture(scope="module")
def llama() -> Any:
    return dense_model("llama").eval()


@pytest.mark.parametrize("length", [6, 12])
def test_encoder_decoders(length: int, rng: torch.Generator) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.decoder_start_token_id = config.pad_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(5, 90, (length,), generator=rng)
    result = littlebit2.generate(model, ids, max_new_tokens=8, ignore_eos=True)
    expected = model.generate(ids[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert list(result.token_ids) == expected[0, 1:].tolist()


def test_positions_that_a_model_makes(rng: torch.Generator) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = RobertaForCausalLM(RobertaConfig(vocab_size=160, is_decoder=True, **sizes)).eval()
    prompts = [torch.randint(5, 150, (length,), generator=rng).tolist() for length in (4, 9)]
    together = littlebit2.generate_batch(model, prompts, max_new_tokens=6, ignore_eos=True)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.way.step == "library"
        alone = littlebit2.generate(model, prompt, max_new_tokens=6, ignore_eos=True)
        assert alone.token_ids == found.token_ids


def test_batches_draw_one_after_another(llama: Any) -> None:
    settings = {"do_sample": True, "seed": 1, "max_new_tokens": 6, "ignore_eos": True}
    found = littlebit2.generate_batch(llama, [[5, 6, 7]] * 3, batch_size=1, **settings)
    assert len({one.token_ids for one in found}) > 1
    again = littlebit2.generate_batch(llama, [[5, 6, 7]] * 3, batch_size=1, **settings)
    assert [one.token_ids for one in found] == [one.token_ids for one in again]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"pad_token_id": -1},
        {"pad_token_id": 10**6},
    ],
)
def test_settings_of_a_model(settings: dict[str, Any], llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setattr(llama.generation_config, name, value)
    found = littlebit2.generate_batch(llama, [[5, 6, 7], [8]], max_new_tokens=4, ignore_eos=True)
    assert [len(one.token_ids) for one in found] == [4, 4]
    assert all(one.prefill_seconds > 0 for one in found)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"role": "user", "content": "x"}], "prompts must hold prompts, got what looks like one prompt"),
        ([5, 6], "prompts must hold prompts, got what looks like one prompt"),
        ([[5.7, 6.2]], "prompt must hold integers as token ids, got torch.float32"),
        ([[[5, 6], [7, 8]]], r"prompt must be one row of token ids, got shape \[2, 2\]"),
    ],
)
def test_prompts_that_are_none(prompts: Any, message: str, llama: Any) -> None:
    with pytest.raises(ValueError, match=message):
        littlebit2.generate_batch(llama, prompts, max_new_tokens=2)


def test_two_system_messages(llama: Any) -> None:
    conversation = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="system must not be given with messages that have one"):
        littlebit2.generate(llama, conversation, system="c", tokenizer=object())
