"""The steps of `finetune`: a dense model, initializations of it, and their training."""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.options import note
from benchmarks.plots import finetune_figure
from benchmarks.quality.small_lm import Corpus, ModelSize, standard_library, train_small_lm, train_tokenizer
from benchmarks.records import environment, write_result

__all__ = ["Outcome", "train_and_measure"]

BLOCK = 128
#: Of the held-out text; enough for the third digit of a perplexity.
EVAL_TOKENS = 20_000


@dataclass(frozen=True)
class Outcome:
    """One initialization, trained.

    Attributes:
        bpw: bits per weight asked for.
        counted_bpw: bits per weight reached.
        method: the initialization.
        start: perplexity before training.
        trained: perplexity after training.
        packed: perplexity of the checkpoint that was written, on the packed kernels.
        agreement: largest relative difference of logits, packed against trained.
        flipped: share of the signs that differ from the start.
        seconds: quantization and training.
        history: entries of the metrics.
    """

    bpw: float
    counted_bpw: float
    method: str
    start: float
    trained: float
    packed: float
    agreement: float
    flipped: float
    seconds: float
    history: list[dict[str, Any]]


def train_and_measure(options: Namespace) -> None:
    """Run it: the table goes to stdout, JSON and plot to ``options.out``."""
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    about = environment(torch.device("cpu"), [options.threads])
    corpus = standard_library()
    dense, size = (options.dense, ModelSize()) if options.dense else dense_model(options, corpus)
    outcomes = [
        outcome(options, corpus, dense, bpw, method) for bpw in options.bpw for method in options.methods
    ]
    teacher = perplexity_of(dense, held_out(corpus))
    show(outcomes, teacher)
    sample = sample_text(options, outcomes[0])
    plot = finetune_figure(options.out / "finetune.png", [asdict(o) for o in outcomes], teacher)
    seconds, processor_seconds = time.perf_counter() - began, time.process_time()
    print(
        f"\n{sample}\n\n{seconds:.0f} s, of which {processor_seconds:.0f} s of processor time, "
        f"{options.threads} thread(s), load average {os.getloadavg()[1]:.1f}; plot: {plot}"
    )
    write_result(
        options.out / "finetune.json",
        options,
        about,
        seconds=seconds,
        processor_seconds=processor_seconds,
        train_files=len(corpus.train),
        held_out_files=len(corpus.held_out),
        evaluated_files=[file.name for file in held_out(corpus)],
        model=size,
        teacher=teacher,
        outcomes=outcomes,
    )


def dense_model(options: Namespace, corpus: Corpus) -> tuple[Path, ModelSize]:
    """Train tokenizer and dense model; return its checkpoint."""
    from littlebit2.train.data import TokenBlocks, read_texts, write_tokens

    size = ModelSize()
    tokenizer = train_tokenizer(corpus.train, size.vocabulary)
    tokens = write_tokens(options.out / "dense.tokens", read_texts(corpus.train), tokenizer)
    print(
        f"{len(corpus.train)} files of the standard library, {tokens.characters / 1e6:.1f}M characters, "
        f"{tokens.tokens / 1e6:.1f}M tokens; {len(corpus.held_out)} files held out, "
        f"{len(held_out(corpus))} of them evaluated"
    )

    def progress(step: int, loss: float, seconds: float) -> None:
        if step % 100 == 0 or step == options.dense_steps:
            note(f"dense model: step {step} of {options.dense_steps}, loss {loss:.3f}, {seconds:.0f} s")

    model = train_small_lm(
        TokenBlocks(tokens, BLOCK),
        size,
        steps=options.dense_steps,
        batch_size=8,
        lr=3e-3,
        seed=options.seed,
        progress=progress,
    )
    path: Path = options.out / "dense"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    tokens.path.unlink()
    weights, seen = sum(p.numel() for p in model.parameters()), options.dense_steps * 8 * BLOCK
    print(f"dense model: {weights / 1e6:.2f}M parameters, {seen / 1e6:.2f}M tokens seen")
    return path, size


def outcome(options: Namespace, corpus: Corpus, dense: Path, bpw: float, method: Any) -> Outcome:
    """Quantize by one method and train."""
    from littlebit2.quantize import QuantConfig
    from littlebit2.train.recipe import Recipe, finetune

    report = finetune(
        dense,
        options.out / f"{method}-{bpw:g}",
        corpus.train[::4],  # more than is seen
        QuantConfig(bpw=bpw, method=method, paths=1, seed=options.seed),
        recipe=Recipe(
            block=BLOCK,
            steps=options.steps,
            batch_size=8,
            lr=options.lr,
            log_steps=min(5, options.steps),
            eval_steps=min(50, options.steps),
            save_steps=10**9,
            seed=options.seed,
            quiet=True,
        ),
        eval_data=held_out(corpus),
    )
    assert report.agreement is not None  # nothing is sharded
    last = [entry for entry in report.history if "flipped" in entry][-1]
    found = report.perplexity
    note(
        f"{bpw:g} bpw, {method}: {found['start']:.1f} -> {found['trained']:.1f}, "
        f"packed {found['packed']:.1f}, {last['flipped']:.1%} flipped, {report.seconds:.0f} s"
    )
    return Outcome(
        bpw=bpw,
        counted_bpw=report.bpw,
        method=method,
        start=found["start"],
        trained=found["trained"],
        packed=found["packed"],
        agreement=report.agreement,
        flipped=last["flipped"],
        seconds=report.seconds,
        history=report.history,
    )


def held_out(corpus: Corpus) -> list[Path]:
    """The first held-out files that together have enough tokens, at about 2.7 characters a token."""
    chosen, characters = [], 0.0
    for file in corpus.held_out:
        if characters < 2.7 * EVAL_TOKENS:
            chosen.append(file)
            characters += file.stat().st_size
    return chosen


def perplexity_of(checkpoint: Path, files: list[Path]) -> float:
    """Perplexity on ``files``."""
    from littlebit2.train.recipe import evaluate_model

    found = evaluate_model(checkpoint, files, block=BLOCK).perplexity
    assert found is not None  # there is text
    return found.value


def show(outcomes: list[Outcome], teacher: float) -> None:
    """Print the table."""
    lines = [
        [
            f"{o.bpw:g}",
            o.method,
            f"{o.counted_bpw:.3f}",
            f"{o.start:.1f}",
            f"{o.trained:.1f}",
            f"{o.packed:.1f}",
            f"{o.agreement:.0e}",
            f"{o.flipped:.1%}",
        ]
        for o in outcomes
    ]
    head = ("bpw", "start", "counted", "before training", "trained", "packed", "logits", "flipped")
    print(f"\ndense model: perplexity {teacher:.1f}\n")
    print(markdown(head, lines))


def sample_text(options: Namespace, first: Outcome) -> str:
    """A few tokens from a packed checkpoint, through ``generate``."""
    import littlebit2

    prompt = "def "
    result = littlebit2.generate(options.out / f"{first.method}-{first.bpw:g}", prompt, max_new_tokens=24)
    return f"{first.method} at {first.bpw:g} bpw continues {prompt!r}: {result.text!r}"
