"""``littlebit2.generate``: tokens, text, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import littlebit2
from littlebit2.integrations.transformers import attach
from tests.integrations.families import dense_model, greedy, quantized_copy, token_ids


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = quantized_copy(dense_model("llama"))
    attach(model)
    path = tmp_path_factory.mktemp("generate") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def path_with_tokenizer(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    copied = tmp_path_factory.mktemp("generate") / "text"
    shutil.copytree(path, copied)
    vocabulary = {f"w{token}": token for token in range(160)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(copied)
    return copied


def test_token_ids(path: Path) -> None:
    ids = token_ids()
    seen: list[str] = []
    result = littlebit2.generate(
        path, ids[0].tolist(), max_new_tokens=16, ignore_eos=True, stream=seen.append
    )
    assert list(result.token_ids) == greedy(littlebit2.load(path), ids)
    assert "".join(seen).split() == [str(token) for token in result.token_ids]
    assert result.text is None
    assert result.prompt_tokens == ids.shape[1]
    assert result.load_seconds > 0
    assert result.prefill_seconds > 0
    assert result.tokens_per_second == pytest.approx(15 / result.decode_seconds)
    assert result.resident_bytes is None or result.resident_bytes <= (result.peak_resident_bytes or 0)


def test_loaded_model_and_caches(path: Path) -> None:
    model = littlebit2.load(path)
    ids = token_ids()
    results = [
        littlebit2.generate(model, ids, max_new_tokens=8, ignore_eos=True, cache=cache)
        for cache in ("dynamic", "static")
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].load_seconds == 0


def test_text(path_with_tokenizer: Path) -> None:
    seen: list[str] = []
    result = littlebit2.generate(
        path_with_tokenizer, "w5 w9 w17", max_new_tokens=6, ignore_eos=True, stream=seen.append
    )
    assert result.prompt_tokens == 3
    # Text leaves the padding token out, which the model may well generate.
    assert result.text == " ".join(f"w{token}" for token in result.token_ids if token != 0)
    assert "".join(seen).split() == result.text.split()


def test_text_of_no_tokens(path_with_tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one token, got '', which holds none"):
        littlebit2.generate(path_with_tokenizer, "", max_new_tokens=2)


def test_sampling_is_repeatable(path: Path) -> None:
    model = littlebit2.load(path)
    torch.manual_seed(3)
    state = torch.get_rng_state()

    def sample(seed: int) -> Any:
        return littlebit2.generate(
            model, [5, 6], max_new_tokens=8, do_sample=True, temperature=2.0, top_p=0.9, seed=seed
        ).token_ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(3)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "text"}, "prompt must be token ids, for .* has no tokenizer"),
        ({"prompt": []}, "prompt must hold at least one token id"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": [1], "cache": "paged"}, "cache must be one of dynamic, static, got 'paged'"),
        ({"prompt": [1], "temperature": 0.0}, "temperature must be positive, got 0"),
        ({"prompt": [1], "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"prompt": [1, 160]}, "prompt must hold token ids from 0 to 159, got .*160"),
    ],
)
def test_bad_arguments(path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        littlebit2.generate(path, **arguments)


def test_load_options_need_a_directory(path: Path) -> None:
    with pytest.raises(TypeError, match="backend must not be given with a loaded model"):
        littlebit2.generate(littlebit2.load(path), [1], backend="auto")


def test_what_cannot_generate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model must be a checkpoint directory"):
        littlebit2.generate(tmp_path / "absent", "text")
    with pytest.raises(ValueError, match="model must be one that generates, got BertModel"):
        littlebit2.generate(dense_model("bert"), [1])
