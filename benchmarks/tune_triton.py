"""``python -m benchmarks.tune_triton``: measures configurations of the Triton kernels on a GPU.

For each shape, number of tokens and stage, the configurations of a small curated set take the place of the
default in a whole call, which is timed by replays of a CUDA graph. The winners, some kilobytes of JSON, go to
the user's cache folder, where every later process finds them (littlebit2_kernels/triton/configs.py). The
defaults need no file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.problems import SHAPES, Problem
from littlebit2_kernels.gpu import GPUS, GpuProperties, gpu_properties
from littlebit2_kernels.triton.configs import store_table
from littlebit2_kernels.triton.plan import (
    GemmConfig,
    GemvConfig,
    Method,
    StageShape,
    XnorConfig,
    choose_method,
    fits_shared,
    stage_config,
)

__all__ = ["curated", "main", "tune"]

Config = GemvConfig | GemmConfig | XnorConfig
#: Runs a call with a configuration for one stage, and returns its seconds.
Measure = Callable[[Method, Problem, int, bool, Config], float]

DEFAULT_SHAPES = ("llama2-7b-qo", "llama2-7b-up", "llama2-7b-down", "llama2-70b-up", "llama2-70b-down")


def curated(method: Method, shape: StageShape, tokens: int, gpu: GpuProperties) -> Iterator[Config]:
    """The configurations worth measuring for a stage; the default is the first one."""
    default = stage_config(method, shape, tokens, gpu)
    yield default
    found: list[Config] = []
    splits = (1,) if shape.last else (1, 2, 4, 8)
    if method.kernel == "gemv":
        for words, per_step, split in itertools.product((8, 16, 32), (512, 1024), splits):
            found.append(GemvConfig(per_step // words, words, split, 4))
    elif method.kernel == "xnor":
        for rows, split in itertools.product((32, 64, 128), splits):
            found.append(XnorConfig(rows, split, 4))
    elif isinstance(default, GemmConfig):
        blocks = {default.block_tokens, max(16, default.block_tokens // 2)}
        for (rows, warps), block, stages, unroll in itertools.product(
            ((64, 4), (128, 4), (128, 8)), sorted(blocks), (2, 3), sorted({1, default.unroll})
        ):
            config = GemmConfig(rows, block, default.splits, warps, stages, unroll)
            if fits_shared(method.kind, config, gpu):
                found.append(config)
    yield from (config for config in found if config != default)


def tune(
    problems: Sequence[Problem],
    token_counts: Sequence[int],
    activations: Sequence[str],
    gpu: GpuProperties,
    measure: Measure,
) -> list[tuple[str, StageShape, int, Config]]:
    """Measure every stage of every problem; entries for ``store_table`` where a default is beaten by 3 %."""
    entries: dict[tuple[str, StageShape, int], Config] = {}
    for problem, tokens, activation in itertools.product(problems, token_counts, activations):
        method = choose_method(tokens, activation, float32=False)
        ranks, sizes = tuple(problem.ranks), (problem.shape.in_features, problem.shape.out_features)
        for shape in (
            StageShape(ranks, (sizes[0],) * len(ranks), last=False),
            StageShape((sizes[1],) * len(ranks), ranks, last=True),
        ):
            name = f"gemm {method.kind}" if method.kernel == "gemm" else method.kernel
            key = (name, shape, tokens if method.kernel == "gemm" else 1)
            if key in entries:
                continue
            times = {
                config: measure(method, problem, tokens, shape.last, config)
                for config in curated(method, shape, tokens, gpu)
            }
            default = next(iter(times))
            best = min(times, key=times.__getitem__)
            if times[best] < 0.97 * times[default]:
                entries[key] = best
            print(
                f"{name} {shape} {tokens}: {times[default]:.2e} s, best {times[best]:.2e} s with {best}",
                flush=True,
            )
    return [(*key, config) for key, config in entries.items()]


def on_gpu(device: torch.device) -> Measure:
    """Times calls on ``device``; a configuration that does not run takes forever."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    from littlebit2_kernels.triton import forward as calls
    from littlebit2_kernels.triton.launch import direct_launches

    def measure(method: Method, problem: Problem, tokens: int, last: bool, config: Config) -> float:
        packed = problem.packed
        layer = calls.Layer(*(tensors or [] for tensors in packed.operands))
        x = problem.activations(tokens).to(torch.float16)
        out = x.new_empty(tokens, packed.out_features)

        def chosen(*arguments: Any) -> Config:
            return config if arguments[1].last == last else stage_config(*arguments[:4])

        default, calls.stage_config = calls.stage_config, chosen
        try:
            with direct_launches(device):
                return do_bench_cudagraph(lambda: calls.forward(x, layer, packed.bias, out, method)) / 1e3
        except OutOfResources:
            return float("inf")
        finally:
            calls.stage_config = default

    return measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and store; with ``--dry-run`` count what would be measured, for an H200."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_triton", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=sorted(SHAPES), default=DEFAULT_SHAPES, metavar="SHAPE"
    )
    parser.add_argument("--bpw", nargs="+", type=float, default=(0.1, 0.55))
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16, 64, 512))
    parser.add_argument("--activations", nargs="+", default=("auto", "int8"))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    problems = [Problem(SHAPES[name], bpw, 2, device) for name in options.shapes for bpw in options.bpw]
    if options.dry_run:
        count = 0

        def counted(*_: Any) -> float:
            nonlocal count
            count += 1
            return 1.0

        tune(problems, options.tokens, options.activations, GPUS["H200"], counted)
        print(f"{count} measurements")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune for; --dry-run counts what would be measured")
    entries = tune(problems, options.tokens, options.activations, gpu_properties(device), on_gpu(device))
    path = store_table(torch.cuda.get_device_name(device), entries)
    print(f"{len(entries)} configurations better than the defaults, in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
