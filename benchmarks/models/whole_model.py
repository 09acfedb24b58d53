"""Time decode of a Llama of random weights, packed beside dense.

Packed models are `plain`, built in memory and run as transformers runs any model, or `loaded`: a random
checkpoint that littlebit2 wrote, loads and runs with its defaults. Dense and llama.cpp's models are measured
with few layers and extrapolated.

Steps: `generate` is transformers' `generate`, or for loaded models littlebit2's; `eager`, `compile` and
`graph` decode through littlebit2's static cache, by Python, torch.compile(mode="reduce-overhead") and one
CUDA graph. Every model decodes once per round, in rotating order, and ratios are formed within a round. Needs
transformers; downloads nothing.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace

from benchmarks import PROCESSORS
from benchmarks.options import add_json, cpu_threads, positive, usable_device
from benchmarks.shapes import LLAMA_SHAPES

__all__ = ["add_arguments", "run"]

STEPS = ("generate", "eager", "compile", "graph")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--shape", default="llama2-7b", help=f"{', '.join(LLAMA_SHAPES)}")
    parser.add_argument("--layers", type=positive(int), help="default: as the shape")
    parser.add_argument("--bpw", nargs="*", type=positive(float), default=[0.1, 0.55], help="packed models")
    parser.add_argument("--paths", type=positive(int), default=2, help="P (default %(default)s)")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=("plain", "loaded"),
        default=["plain", "loaded"],
        help="packed models as transformers runs them, and as littlebit2 does (default: both)",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        choices=("keep", "int8", "packed"),
        default=["int8"],
        help="what loaded models have for a head: dense, int8, or packed (default int8); unless dense, the "
        "embedding is int8",
    )
    parser.add_argument(
        "--dtype", help="dtype of packed models' activations (default: bfloat16; on a GPU float16)"
    )
    parser.add_argument("--dense", nargs="*", metavar="DTYPE", help="dense models (default: one of --dtype)")
    parser.add_argument(
        "--dense-layers",
        type=positive(int),
        help="layers of dense models; below --layers, half of them are measured too, and extrapolated "
        "(default: 4; on a GPU all)",
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="default: generate; on a GPU graph")
    parser.add_argument(
        "--rows", type=positive(int), default=1, help="sequences of a batch (default %(default)s)"
    )
    parser.add_argument("--prompt", nargs="+", type=positive(int), default=[16], help="tokens (default 16)")
    parser.add_argument("--tokens", type=positive(int), default=32, help="new ones (default %(default)s)")
    parser.add_argument("--rounds", type=positive(int), default=5, help="default %(default)s")
    parser.add_argument(
        "--threads", type=positive(int), default=min(2, len(PROCESSORS)), help="default %(default)s"
    )
    parser.add_argument(
        "--llama-bench",
        metavar="BINARY",
        help="llama.cpp's llama-bench: time Q1_0 and Q4_0 models of the same sizes too (needs the package "
        "gguf)",
    )
    parser.add_argument(
        "--llama-bench-prompt",
        type=positive(int),
        default=512,
        help="longest prompt for it (default %(default)s); its prefill takes long",
    )
    parser.add_argument("--profile", action="store_true", help="where the time of a `generate` step goes")
    parser.add_argument(
        "--memory-gib",
        type=positive(float),
        help="limit for all linear layers (default: 12; on a GPU its memory)",
    )
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure what the options ask for; returns 1 if nothing could be measured."""
    from benchmarks.models.llama import require_transformers
    from benchmarks.models.model_rows import models_table, profile_table
    from benchmarks.problems import dtype_name
    from benchmarks.records import describe_environment, environment, write_result

    require_transformers()
    import torch

    from benchmarks.models.model_runs import Session

    cpu_threads([options.threads])
    device = usable_device(options.device)
    session = Session(options, device)
    about = environment(device, [options.threads])
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        report = session.measure()
    finally:
        torch.set_num_threads(before)
    if not report.rows:
        return 1
    print(describe_environment(about))
    print(
        f"\n{session.shape.name}, {session.layers} layers, random weights, activations "
        f"{dtype_name(session.dtype)}, batch {options.rows}, {options.threads} threads; prompt of "
        f"{' or '.join(map(str, options.prompt))} tokens, {options.tokens} new ones, {options.rounds} "
        f"rounds; memory before any model {(report.memory_before or 0) / 2**20:.0f} MiB"
    )
    print(f"\n{models_table(report.rows)}")
    if report.profiles:
        print(f"\n{profile_table(report.profiles)}")
    if options.json is not None:
        path = write_result(options.json, options, about, **vars(report))
        print(f"\nwrote {path}", file=sys.stderr)
    return 0
