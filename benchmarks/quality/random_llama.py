"""A dense Llama checkpoint with random weights, a tokenizer of bytes, and text, for times alone."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.models.llama import build_dense
from benchmarks.quality.small_lm import standard_library
from benchmarks.shapes import LlamaShape

__all__ = ["write_random_llama"]

_TEXT = 4_000_000


def write_random_llama(folder: Path, shape: LlamaShape, blocks: int) -> tuple[Path, Path]:
    """Write a model of some blocks in bfloat16; return its folder and a file of text.

    Args:
        folder: to make; what is there is kept.
        shape: sizes.
        blocks: number of decoder layers.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = folder / f"{shape.name}-{blocks}"
    if not (model / "config.json").is_file():
        build_dense(shape, blocks, torch.bfloat16).save_pretrained(model)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    text = folder / "text.txt"
    if not text.is_file():
        files = standard_library().train
        text.write_text("\n\n".join(file.read_text("utf-8") for file in files)[:_TEXT], "utf-8")
    return model, text
