"""Three calls of one token at 8192->28672, 0.1 bpw, for a profiler: the first two launches are warm-ups."""

from __future__ import annotations

import sys

__all__ = ["main"]

CALLS = 3
#: Of each of two paths, for 0.1 bits per weight.
RANK = 296


def main(device: str = "cuda") -> int:
    """Make the calls; fails if the result is not finite."""
    import torch

    from benchmarks.problems import random_packed
    from benchmarks.shapes import SHAPES
    from littlebit2_kernels import littlebit_linear

    shape = SHAPES["llama2-70b-up"]
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.in_features, shape.out_features, [RANK] * 2)
    packed = random_packed(*sizes, std=0.02, generator=generator).to(device)
    x = torch.randn(1, shape.in_features, dtype=torch.float16, device=device)
    backend = "cuda" if device == "cuda" else "auto"
    for _ in range(CALLS):
        y = littlebit_linear(x, packed, backend=backend, activation="int16" if device == "cuda" else "auto")
    if not bool(torch.isfinite(y.float()).all()):
        print("error: the result is not finite", file=sys.stderr)
        return 1
    print(f"{CALLS} calls, norm of the result {float(y.float().norm()):.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
