"""A small language model of Python source, trained from scratch on text that every machine has."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Corpus", "ModelSize", "standard_library", "train_small_lm", "train_tokenizer"]

#: Folders of the standard library that are no typical source, or generated.
_LEFT_OUT = {
    "__pycache__",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
#: Every so many files, in the order of their paths, one is held out.
_HELD_OUT = 20
_EOS = "<eos>"


@dataclass(frozen=True)
class Corpus:
    """Two lists of files without a file in common."""

    train: list[Path]
    held_out: list[Path]


@dataclass(frozen=True)
class ModelSize:
    """Shape of the model, a Llama."""

    hidden: int = 192
    intermediate: int = 512
    layers: int = 2
    heads: int = 3
    vocabulary: int = 1024
    context: int = 256


def standard_library() -> Corpus:
    """Return the source files of this interpreter's standard library, every 20th of them held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not _LEFT_OUT & set(file.relative_to(root).parts) and _is_text(file)
    ]
    held_out = files[_HELD_OUT // 2 :: _HELD_OUT]
    return Corpus([file for file in files if file not in set(held_out)], held_out)


def _is_text(file: Path) -> bool:
    try:
        return bool(file.read_text("utf-8").strip())
    except UnicodeDecodeError:
        return False


def train_tokenizer(files: list[Path], size: int) -> Any:
    """Train a byte-level BPE tokenizer of ``size`` tokens; the first ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.read_text("utf-8") for file in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS)


def train_small_lm(
    blocks: Any, size: ModelSize, *, steps: int, batch_size: int, lr: float, seed: int, progress: Any
) -> Any:
    """Train a model from random weights with AdamW and a cosine; return it.

    Args:
        blocks: :class:`littlebit2.train.data.TokenBlocks` of the training text.
        size: of the model.
        steps: of the optimizer.
        batch_size: blocks in a step.
        lr: peak learning rate, after a warm-up of 5%.
        seed: of weights and order.
        progress: called with the step, the loss and the seconds so far.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))),
    )
    began = time.perf_counter()
    batches = _batches(blocks, batch_size, seed)
    for step in range(steps):
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step + 1, float(loss.detach()), time.perf_counter() - began)
    return model.eval()


def _batches(blocks: Any, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled batches without end, each block once a pass."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks), generator=rng).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield torch.stack([blocks[i]["input_ids"] for i in order[start : start + size]])
