"""A small Llama with a byte-level tokenizer, and text for it."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.integrations.models.moe import MIXTURES

WORDS = tuple(
    "the quick brown fox jumps over a lazy dog while rain falls on green hills and rivers".split()  # noqa: SIM905
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def llama_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return LlamaConfig(**{**settings, **changes})


def write_teacher(
    path: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """Write a model whose logits are far from uniform, so that there is something to distil."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**changes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_mixture(name: str, path: Path) -> Path:
    """Write a mixture of experts of the tests' list, with a byte-level tokenizer."""
    kind, sizes = MIXTURES[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    tokens = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    cls(cls.config_class(**{**sizes, **tokens})).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def text(length: int, seed: int = 0) -> str:
    """At least ``length`` characters of words."""
    draw = random.Random(seed)
    words: list[str] = []
    while sum(map(len, words)) + len(words) < length:
        words.append(draw.choice(WORDS))
    return " ".join(words) + "\n"


def write_text(path: Path, length: int = 4000, seed: int = 0) -> Path:
    path.write_text(text(length, seed))
    return path
