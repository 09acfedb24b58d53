"""``littlebit2.generate``: tokens, text, figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import littlebit2
from littlebit2.cli import main
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
    copied = tmp_path_factory.mktemp("generate") / "text"
    shutil.copytree(path, copied)
    vocabulary = {f"w{token}": token for token in range(160)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(copied)
    return copied


#: Says who speaks with a word, and refuses an unknown speaker.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user') %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ 'w11 ' if message.role == 'system' else 'w12 ' }}{{ message.content }} "
    "{% endfor %}{% if add_generation_prompt %}w13{% endif %}"
)


@pytest.fixture(scope="module")
def path_with_template(path_with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = tmp_path_factory.mktemp("generate") / "chat"
    shutil.copytree(path_with_tokenizer, copied)
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(copied)
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
        ({"prompt": [1], "step": "fast"}, "step must be one of library, eager, compile, graph, got 'fast'"),
        ({"prompt": [1], "step": "graph"}, "step='graph' cannot run: it needs a model on a CUDA device"),
        ({"prompt": [1], "top_k": -1}, "top_k must be at least 0, got -1"),
        ({"prompt": [1], "repetition_penalty": 0}, "repetition_penalty must be positive, got 0"),
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


# --- how tokens are decoded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "way"),
    [
        ({}, ("eager", "dynamic")),
        ({"cache": "static"}, ("eager", "static")),
        ({"step": "library"}, ("library", "dynamic")),
        ({"step": "library", "cache": "static"}, ("library", "static")),
        ({"step": "eager", "cache": "static"}, ("eager", "static")),
    ],
    ids=str,
)
def test_ways_give_the_same_tokens(path: Path, asked: dict[str, str], way: tuple[str, str]) -> None:
    model = littlebit2.load(path)
    ids = token_ids()
    result = littlebit2.generate(model, ids[0], max_new_tokens=16, ignore_eos=True, **asked)
    assert list(result.token_ids) == greedy(model, ids)
    assert (result.way.step, result.way.cache) == way
    assert result.way.reason
    if "step" not in asked:
        assert set(result.way.alternatives) == {"library", "eager", "compile", "graph"} - {way[0]}
        assert str(result.way).startswith(f"step {way[0]}, {way[1]} cache: ")
        assert "not graph: it needs a model on a CUDA device" in str(result.way)


def test_what_a_model_asks_for_is_followed(path: Path) -> None:
    """Settings that only the library's loop knows keep it; others change our choice as they change its."""
    model = littlebit2.load(path)
    ids = token_ids()
    model.generation_config.no_repeat_ngram_size = 2
    result = littlebit2.generate(model, ids, max_new_tokens=16, ignore_eos=True)
    assert result.way.step == "library"
    assert "no_repeat_ngram_size" in result.way.reason
    assert list(result.token_ids) == greedy(model, ids)
    with pytest.raises(ValueError, match=r"step='eager' cannot run: .*no_repeat_ngram_size"):
        littlebit2.generate(model, ids, step="eager")
    model.generation_config.no_repeat_ngram_size = None
    plain = littlebit2.generate(model, ids, max_new_tokens=16, ignore_eos=True)
    model.generation_config.repetition_penalty = 3.0
    result = littlebit2.generate(model, ids, max_new_tokens=16, ignore_eos=True)
    assert result.way.step == "eager"
    assert list(result.token_ids) == greedy(model, ids)
    assert result.token_ids != plain.token_ids


def test_models_with_other_loops_are_the_librarys() -> None:
    config = transformers.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config).eval()
    result = littlebit2.generate(model, token_ids(), max_new_tokens=4, ignore_eos=True)
    assert result.way.step == "library"
    assert len(result.token_ids) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.5},
        {"top_k": 3},
        {"top_k": 0, "top_p": 0.7},
        {"repetition_penalty": 2.5, "top_k": 9, "temperature": 3.0},
    ],
    ids=str,
)
def test_sampled_tokens_are_those_of_the_library(path: Path, settings: dict[str, Any]) -> None:
    model = littlebit2.load(path)
    results = [
        littlebit2.generate(
            model,
            [5, 6, 7],
            max_new_tokens=12,
            do_sample=True,
            seed=4,
            step=step,
            ignore_eos=True,
            **settings,
        ).token_ids
        for step in ("library", "eager")
    ]
    assert results[0] == results[1]


# --- several prompts, and conversations ------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, "library"])
def test_a_batch_is_its_prompts(path: Path, step: str | None) -> None:
    model = littlebit2.load(path)
    prompts = [token_ids(length)[0].tolist() for length in (4, 11, 7)]
    alone = [littlebit2.generate(model, prompt, max_new_tokens=10).token_ids for prompt in prompts]
    results = littlebit2.generate_batch(model, prompts, max_new_tokens=10, step=step)
    assert [result.token_ids for result in results] == alone
    assert [result.prompt_tokens for result in results] == [4, 11, 7]
    assert {result.way.step for result in results} == {step or "eager"}


def test_rows_end_by_themselves(path: Path) -> None:
    model = littlebit2.load(path)
    prompts = [[5, 6, 7], [20, 21], [9, 8, 7, 6]]
    whole = littlebit2.generate_batch(model, prompts, max_new_tokens=8, ignore_eos=True)
    end = whole[0].token_ids[2]
    model.generation_config.eos_token_id = [end]
    for step in (None, "library"):
        results = littlebit2.generate_batch(model, prompts, max_new_tokens=8, step=step)
        for result, free in zip(results, whole, strict=True):
            tokens = free.token_ids
            assert result.token_ids == tokens[: tokens.index(end) + 1 if end in tokens else None]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "opt"])
def test_batches_of_families(family: str) -> None:
    model = quantized_copy(dense_model(family))
    prompts = [token_ids(length)[0] for length in (3, 9)]
    results = littlebit2.generate_batch(model, prompts, max_new_tokens=6, ignore_eos=True)
    for prompt, result in zip(prompts, results, strict=True):
        assert (
            result.token_ids
            == littlebit2.generate(model, prompt, max_new_tokens=6, ignore_eos=True, step="library").token_ids
        )


def test_penalized_batches_are_the_librarys(path: Path) -> None:
    model = littlebit2.load(path)
    for prompts, step in (([[5, 6], [7, 8]], "eager"), ([[5, 6], [7, 8, 9]], "library")):
        results = littlebit2.generate_batch(
            model, prompts, max_new_tokens=8, repetition_penalty=3.0, ignore_eos=True
        )
        assert results[0].way.step == step
        alone = littlebit2.generate(
            model, prompts[0], max_new_tokens=8, repetition_penalty=3.0, ignore_eos=True, step="library"
        )
        assert results[0].token_ids == alone.token_ids


def test_conversations(path_with_template: Path) -> None:
    seen: list[str] = []
    model = littlebit2.load(path_with_template)
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w9 w17"}]
    said = littlebit2.generate(model, messages, max_new_tokens=6, ignore_eos=True, stream=seen.append)
    plain = littlebit2.generate(model, "w11 w5 w12 w9 w17 w13", max_new_tokens=6, ignore_eos=True)
    assert said.prompt_tokens == 6
    assert said.token_ids == plain.token_ids
    assert "".join(seen).split() == (said.text or "").split()
    same = littlebit2.generate(model, "w9 w17", system="w5", max_new_tokens=6, ignore_eos=True)
    assert same.token_ids == said.token_ids
    chats = littlebit2.generate_batch(model, ["w9", "w9 w17"], chat=True, max_new_tokens=2)
    assert [result.prompt_tokens for result in chats] == [3, 4]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([{"role": "user"}], {}, "message 0 of prompt must have role and content, got"),
        ([{"role": "nobody", "content": "w5"}], {}, "cannot be told by the chat template: .*no such role"),
        ([5, 6], {"chat": True}, "prompt must be text or messages for chat, got token ids"),
    ],
)
def test_bad_conversations(
    path_with_template: Path, prompt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        littlebit2.generate(path_with_template, prompt, **settings)


def test_chat_without_a_template(path: Path, path_with_tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no chat template; got messages"):
        littlebit2.generate(path_with_tokenizer, "w5", chat=True)
    with pytest.raises(ValueError, match="has no tokenizer; got messages"):
        littlebit2.generate(path, "w5", system="w6")


# --- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [[], ["--step", "library"]])
def test_command_says_that_positions_are_used_up(
    path_with_tokenizer: Path, step: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    most = json.loads((path_with_tokenizer / "config.json").read_text())["max_position_embeddings"]
    given = ["generate", str(path_with_tokenizer), "--ignore-eos", *step, "--max-new-tokens"]
    said = "stopped before --max-new-tokens: the model has no more positions\n"
    assert main([*given, str(most), "w5 w9"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert f"{most - 2} tokens, loaded" in error
    assert main([*given, str(most), "--batch-size", "1", "w5 w9", "w7"]) == 0
    assert capsys.readouterr().err.startswith(f"2 of 2 texts {said}")
    assert main([*given, str(most), "--json", "w5 w9"]) == 0
    assert json.loads(capsys.readouterr().out)["out_of_positions"]
    # As many as were asked for.
    assert main([*given, str(most - 2), "w5 w9"]) == 0
    assert "stopped" not in capsys.readouterr().err


def test_the_end_of_text_at_the_last_position_is_an_end(path: Path) -> None:
    model = littlebit2.load(path)
    most = model.config.max_position_embeddings
    whole = littlebit2.generate(model, [5, 6], max_new_tokens=most, ignore_eos=True)
    assert whole.out_of_positions
    last = whole.token_ids[-1]
    model.generation_config.eos_token_id = [last]
    cut = littlebit2.generate(model, [5, 6], max_new_tokens=most)
    assert cut.token_ids[-1] == last
    assert not cut.out_of_positions


def test_command_streams_and_explains(path_with_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(path_with_template), "--max-new-tokens", "6", "--ignore-eos"]
    wanted = littlebit2.generate(path_with_template, "w5 w9", max_new_tokens=6, ignore_eos=True)
    assert main([*given, "--explain", "w5 w9"]) == 0  # a prompt after the options
    captured = capsys.readouterr()
    assert captured.out.split() == (wanted.text or "").split()
    assert "step eager, dynamic cache: " in captured.err
    assert "not compile: compiling takes tens of seconds" in captured.err
    assert "6 tokens, loaded in" in captured.err
    assert "tokens/s" in captured.err


def test_command_takes_prompts(
    path_with_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["w5 w9", "w6", "w7 w8 w9"]
    (tmp_path / "prompts.txt").write_text("w5 w9\n\nw6\nw7 w8 w9\n")
    given = ["generate", str(path_with_template), "--max-new-tokens", "4", "--ignore-eos"]
    results = littlebit2.generate_batch(path_with_template, prompts, max_new_tokens=4, ignore_eos=True)
    texts = [result.text for result in results]
    file = ["--prompts-file", str(tmp_path / "prompts.txt")]
    for more in (prompts, file, [*file, "--batch-size", "2"]):
        assert main([*given, *more, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert [one["text"] for one in made] == texts
        assert made[0]["way"]["step"] == "eager"
    assert main([*given, *file]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"> {p}\n{t}\n\n" for p, t in zip(prompts, texts, strict=True))
    assert "12 tokens for 3 prompts" in captured.err
    (tmp_path / "prompts.txt").write_text("\n")
    assert main([*given, *file]) == 2
    assert "--prompts-file must hold at least one prompt, got none in" in capsys.readouterr().err


def test_command_samples_and_chats(path_with_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(path_with_template), "w9 w17", "--max-new-tokens", "8", "--json"]
    options = ["--system", "w5", "--top-k", "5", "--repetition-penalty", "1.5", "--seed", "3"]
    assert main([*given, *options]) == 0
    made = json.loads(capsys.readouterr().out)
    wanted = littlebit2.generate(
        path_with_template,
        [{"role": "system", "content": "w5"}, {"role": "user", "content": "w9 w17"}],
        max_new_tokens=8,
        do_sample=True,
        top_k=5,
        repetition_penalty=1.5,
        seed=3,
    )
    assert made["token_ids"] == list(wanted.token_ids)
    assert main([*given, "--chat", "--sample", "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 4
