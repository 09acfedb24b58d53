"""Predict GPU times of packed layers and models from counts of bytes and instructions. Nothing is measured.

Parts: decode (one token through a layer), prefill (many tokens through a layer), models (the packed
layers of a decode step). What is counted and assumed: docs/cuda.md, "Counted and predicted". Needs no
GPU.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from benchmarks.estimates.rates import RATES
from benchmarks.options import add_json, positive
from benchmarks.shapes import LLAMA_SHAPES, parse_llama_shape, parse_shape

__all__ = ["PARTS", "add_arguments", "run"]

PARTS = ("decode", "prefill", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--gpu", nargs="+", choices=RATES, default=["H200", "A100", "4090"])
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["llama2-7b-qo", "llama2-7b-up", "llama2-70b-up"],
        help="layers of decode and prefill: K,N, or names as of sweep",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[name for name in LLAMA_SHAPES if name != "tiny"],
        choices=LLAMA_SHAPES,
        help="models of the part models",
    )
    parser.add_argument("--bpw", nargs="+", type=positive(float), default=[0.1, 0.3, 0.55, 1.0])
    parser.add_argument("--activation", default="auto", help="auto, exact, float16, int16, int8 or sign")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=positive(int),
        default=[32, 128, 512, 2048],
        metavar="M",
        help="token counts of prefill, 17 or more",
    )
    add_json(parser)


def run(options: Namespace) -> int:
    """Print the predictions as markdown tables."""
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    from benchmarks.estimates import decode_calls, model_steps, prefill_calls
    from benchmarks.problems import Problem
    from benchmarks.records import host_environment, write_result

    problems = [Problem(parse_shape(name), bpw) for name in options.shapes for bpw in options.bpw]
    found = {}
    for part in options.parts or PARTS:
        if part == "decode":
            found[part] = decode_calls.rows(options.gpu, problems, options.activation)
            text = decode_calls.table(found[part])
        elif part == "prefill":
            found[part] = prefill_calls.rows(options.gpu, problems, options.tokens, options.activation)
            text = prefill_calls.table(found[part])
        else:
            shapes = [parse_llama_shape(name) for name in options.models]
            found[part] = model_steps.rows(options.gpu, shapes, options.bpw)
            text = model_steps.table(found[part])
        print(f"predicted, {part}:\n\n{text}\n")
    if options.json is not None:
        write_result(options.json, options, host_environment(), **found)
    return 0
