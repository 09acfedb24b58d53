"""One layer on the CPU against the unpacked low-rank forward and the dense layer, side by side.

``python -m benchmarks.linear --threads 1`` prints a markdown table. Low-rank is what unpacking gives: two
float32 matrix products with +-1 factors. Weights are hot, that is, used again and again.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks.timing import time_interleaved
from littlebit2.quantize import rank_for_bpw
from littlebit2_kernels import explain, littlebit_linear
from littlebit2_kernels.testing import make_problem

__all__ = ["main"]


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch's pool")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 11008), metavar=("K", "N"))
    parser.add_argument(
        "--bpw", type=float, nargs="+", default=[0.1, 0.55, 1.0], help="counted bits per weight"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128], metavar="M")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    in_features, out_features = options.shape
    weight = torch.randn(out_features, in_features)
    print(f"{in_features} -> {out_features}, float32, {options.threads} threads, torch {torch.__version__}\n")
    print("| bpw | M | us | GMAC/s | vs low-rank fp32 | vs dense fp32 |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for bpw in options.bpw:
            rank = rank_for_bpw(in_features, out_features, bpw, paths=2)
            for tokens in options.tokens:
                print_row(bpw, rank, tokens, weight)


def print_row(bpw: float, rank: int, tokens: int, weight: torch.Tensor) -> None:
    """Time one problem of two paths and print its row."""
    out_features, in_features = weight.shape
    x, packed = make_problem(tokens, in_features, out_features, [rank, rank])
    v = torch.randn(2 * rank, in_features).sign()
    u = torch.randn(out_features, 2 * rank).sign()
    candidates: dict[str, Any] = {
        "packed": lambda: littlebit_linear(x, packed),
        "low-rank": lambda: nn.functional.linear(nn.functional.linear(x, v), u),
        "dense": lambda: nn.functional.linear(x, weight),
    }
    timings = time_interleaved(candidates)
    packed_time = timings["packed"]
    cells = (
        f"{bpw:g}",
        f"{tokens}",
        f"{packed_time.median * 1e6:.0f}",
        f"{explain(x, packed).macs / packed_time.median / 1e9:.0f}",
        f"{packed_time.speedup_over(timings['low-rank']):.1f}x",
        f"{packed_time.speedup_over(timings['dense']):.1f}x",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
