"""The first call of a process, captured: ``python -m tests.cuda.first_call TOKENS MODE``.

Nothing of a first call may be forbidden in a capture, such as loading a module or setting a kernel's limits.
Earlier calls in the same process would have done all of it before.
"""

from __future__ import annotations

import sys

import torch

from littlebit2_kernels import littlebit_linear
from littlebit2_kernels.testing import make_problem
from tests import problems
from tests.cuda import modes

__all__ = ["main"]


def main(tokens: int, mode: str, device: str = "cuda") -> str:
    """Make the call; returns what is wrong, or nothing. On the CPU nothing is captured."""
    generator = torch.Generator().manual_seed(tokens)
    # A rank and sizes that leave no part of the kernels out: ragged rows, several slices, two paths.
    x, packed = make_problem(tokens, 1100, 700, [264, 72], dtype=torch.float16, generator=generator)
    packed = problems.scaled_down(packed)
    static, layer = x.to(device), packed.to(device)
    if device == "cpu":
        y = littlebit_linear(static, layer, activation=mode)
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = littlebit_linear(static, layer, activation=mode)
        graph.replay()
        torch.cuda.synchronize()
    again = littlebit_linear(static, layer, activation=mode)
    if not torch.equal(y, again):
        return "a call after the capture gives other bits"
    error, allowed = modes.error_of(y, x, packed, mode), modes.allowed(x.dtype, mode, y.numel())
    return "" if error <= allowed else f"relative error {error:.2e}, allowed {allowed:.2e}"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2]) or 0)
