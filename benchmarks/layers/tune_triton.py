"""Tune the Triton kernels on a GPU.

For each shape, token count and stage, the configurations of a small curated set take the place of the
default in a whole call, timed by CUDA-graph replays (weights in the L2 cache); for one token, one launch
is compared with two. The best ones, some kilobytes of JSON, are added to the file in the user's cache
folder that every later process reads (littlebit2_kernels/triton/configs.py). The defaults need no file.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from benchmarks.options import positive
from benchmarks.shapes import parse_shape

__all__ = ["KERNELS", "add_arguments", "run"]

DEFAULT_SHAPES = ("llama2-7b-qo", "llama2-7b-up", "llama2-7b-down", "llama2-70b-up", "llama2-70b-down")
#: Layers for which one launch instead of two is worth a measurement.
SMALL_SHAPES = ("1024,1024", "2048,2048")
KERNELS = ("decode", "gemv", "gemm", "xnor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--shapes", nargs="+", default=[*DEFAULT_SHAPES, *SMALL_SHAPES], help="K,N, or names as of sweep"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bpw", nargs="+", type=positive(float), default=(0.1, 0.55))
    parser.add_argument("--tokens", nargs="+", type=positive(int), default=(1, 16, 64, 512), metavar="M")
    parser.add_argument("--activations", nargs="+", default=("auto", "int8"))
    parser.add_argument(
        "--dry-run", action="store_true", help="count what would be measured on an H200; needs no GPU"
    )


def run(options: Namespace) -> int:
    """Tune and store."""
    import torch

    from benchmarks.layers.triton_tuning import on_gpu, tune
    from benchmarks.options import usable_device
    from benchmarks.problems import Problem
    from littlebit2_kernels.gpu import GPUS, gpu_properties
    from littlebit2_kernels.triton.configs import store_table

    device = torch.device("cpu") if options.dry_run else usable_device("cuda")
    problems = [
        Problem(parse_shape(shape), bpw, 2, device) for shape in options.shapes for bpw in options.bpw
    ]
    if options.dry_run:
        count = 0

        def counted(*_: object) -> float:
            nonlocal count
            count += 1
            return 1.0

        tune(problems, options.tokens, options.activations, GPUS["H200"], counted, options.kernels)
        print(f"{count} measurements")
        return 0
    gpu = gpu_properties(device)
    entries = tune(problems, options.tokens, options.activations, gpu, on_gpu(device), options.kernels)
    path = store_table(torch.cuda.get_device_name(device), entries)
    print(f"{len(entries)} configurations, in {path}")
    return 0
