"""Measure what each quantization method reaches, and in what time.

Parts: errors (every method on MiniLM's layers and synthetic weights), itq (the speed of Joint-ITQ),
batches (several layers at once), model (MiniLM whole, by budget). Prints markdown tables and writes a
JSON for each part, and the plots, to --out. Everything runs in one process, on one thread unless
--threads says otherwise. Errors are squared relative Frobenius errors of one path. The baselines run
beside ours: Dual-SVID from a plain SVD, and Joint-ITQ with 50 iterations whose Procrustes steps are SVDs,
as LittleBit-2 describes it.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from benchmarks.options import positive

__all__ = ["PARTS", "add_arguments", "run"]

PARTS = ("errors", "itq", "batches", "model")
BPWS = (0.3, 0.55, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--layers", type=positive(int), help="only the first layers of MiniLM")
    parser.add_argument("--iterations", type=positive(int), default=300, help="ADMM (default %(default)s)")
    parser.add_argument("--bpw", type=positive(float), nargs="+", default=list(BPWS), help="bits per weight")
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--out", type=Path, default=Path("build/quantizer"), help="default %(default)s")


def run(options: Namespace) -> int:
    """Run the parts that are asked for."""
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    import torch

    from benchmarks.quality import embeddings, methods
    from benchmarks.records import describe_environment, environment, write_result

    torch.set_num_threads(options.threads)
    about = environment(torch.device("cpu"), [options.threads])
    print(f"{describe_environment(about)}\n")
    measure = {
        "errors": methods.errors,
        "itq": methods.itq,
        "batches": methods.batches,
        "model": embeddings.model,
    }
    for part in options.parts or PARTS:
        rows = measure[part](options)
        write_result(options.out / f"{part}.json", options, about, rows=rows)
    return 0
