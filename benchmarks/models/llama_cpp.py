"""llama.cpp on models of the same sizes: random GGUF files, and a llama-bench binary that times them.

The binary is the user's own build. Files hold random blocks, with the embedding and the head in Q8_0. A model
is measured with few layers, like dense ones.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import LlamaShape

__all__ = ["TYPES", "LlamaBenchError", "time_llama_bench", "write_gguf"]

#: Types of the linear layers, as ``gguf.GGMLQuantizationType`` names them.
TYPES = ("Q1_0", "Q4_0")
HEAD_TYPE = "Q8_0"
#: Largest value that a block's scale gives: 0.02 is the deviation of Llama's initialization.
SCALE = 0.02


class LlamaBenchError(RuntimeError):
    """llama-bench failed, or printed what cannot be read."""


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise RuntimeError(
            "files for llama-bench need the package gguf: pip install gguf (0.19 or newer)"
        ) from error
    return gguf


def _random_blocks(rng: np.random.Generator, kind: Any, rows: int, cols: int) -> np.ndarray[Any, Any]:
    """Random bytes of blocks that each begin with a float16 scale: uint8 ``[rows, bytes of a row]``."""
    size, block_bytes = _gguf().GGML_QUANT_SIZES[kind]
    if cols % size:
        raise ValueError(f"columns must be a multiple of {size} for {kind.name}, got {cols}")
    blocks = rng.integers(0, 256, (rows * cols // size, block_bytes), dtype=np.uint8)
    levels = 2 ** ((block_bytes - 2) * 8 // size - 1)
    blocks[:, :2] = np.array([SCALE / levels], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(path: Path, shape: LlamaShape, layers: int, type_name: str) -> None:
    """Write a Llama of random blocks without a tokenizer.

    Args:
        path: file to write.
        shape: sizes.
        layers: number of decoder layers.
        type_name: type of the linear layers, one of :data:`TYPES`.

    Raises:
        RuntimeError: the package gguf is not installed.
        ValueError: the installed one does not know the type, or the sizes are no multiples of its blocks.
    """
    gguf = _gguf()
    if type_name not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"the installed gguf does not know the type {type_name}")
    kind, head = gguf.GGMLQuantizationType[type_name], gguf.GGMLQuantizationType[HEAD_TYPE]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16384)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads or shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))

    def matrix(name: str, rows: int, cols: int, of: Any = kind) -> None:
        writer.add_tensor(f"{name}.weight", _random_blocks(rng, of, rows, cols), raw_dtype=of)

    matrix("token_embd", shape.vocabulary, shape.hidden, head)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        for name, rows in (("q", shape.hidden), ("k", shape.kv_size), ("v", shape.kv_size)):
            matrix(f"{block}.attn_{name}", rows, shape.hidden)
        matrix(f"{block}.attn_output", shape.hidden, shape.hidden)
        norm(f"{block}.ffn_norm")
        for name in ("gate", "up"):
            matrix(f"{block}.ffn_{name}", shape.intermediate, shape.hidden)
        matrix(f"{block}.ffn_down", shape.hidden, shape.intermediate)
    norm("output_norm")
    matrix("output", shape.vocabulary, shape.hidden, head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_llama_bench(
    binary: Path, model: Path, prompt: int, tokens: int, *, threads: int, rounds: int
) -> tuple[list[float], float]:
    """Time one model.

    Args:
        binary: llama-bench.
        model: a GGUF file.
        prompt: tokens of the prompt.
        tokens: tokens to decode after it.
        threads: of the CPU.
        rounds: repetitions.

    Returns:
        Seconds of a decoding step in each round, and median seconds of the prompt.

    Raises:
        LlamaBenchError: the binary fails; the message has the end of what it printed.
    """
    common = ["-m", str(model), "-t", str(threads), "-r", str(rounds), "-ngl", "0", "-o", "json"]
    (decode,) = _run(binary, [*common, "-p", "0", "-n", str(tokens), "-d", str(prompt)])
    (prefill,) = _run(binary, [*common, "-p", str(prompt), "-n", "0"])
    steps = [nanoseconds / 1e9 / tokens for nanoseconds in decode["samples_ns"]]
    return steps, float(np.median(prefill["samples_ns"])) / 1e9


def _run(binary: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    try:
        done = subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LlamaBenchError(f"{binary} cannot be run: {error}") from error
    if done.returncode != 0:
        last = "; ".join(done.stderr.strip().splitlines()[-3:])
        raise LlamaBenchError(f"{binary.name} failed with status {done.returncode}: {last}")
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise LlamaBenchError(f"{binary.name} printed no JSON: {done.stdout[:200]!r}") from error
    return rows
