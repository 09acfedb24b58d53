"""``python -m benchmarks.layers.tune_triton``: measures configurations of the Triton kernels on a GPU.

For each shape, number of tokens and stage, the configurations of a small curated set take the place of the
default in a whole call, which is timed by replays of a CUDA graph (so with weights in the L2 cache); and for
one token, one launch against two. What is best, some kilobytes of JSON, is added to the file in the user's
cache folder, where every later process finds it (littlebit2_kernels/triton/configs.py). The defaults need no
file.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.problems import Problem, parse_shape
from littlebit2_kernels.gpu import GPUS, GpuProperties, gpu_properties
from littlebit2_kernels.triton.configs import store_table
from littlebit2_kernels.triton.plan import (
    DecodeConfig,
    GemmConfig,
    GemvConfig,
    Method,
    StageShape,
    XnorConfig,
    choose_method,
    decode_config,
    decode_shape,
    fits_shared,
    fused_config,
    stage_config,
)

__all__ = ["KERNELS", "chosen", "curated", "main", "tune"]

Config = DecodeConfig | GemvConfig | GemmConfig | XnorConfig
#: Runs a call with a configuration, of one stage or of how the GEMV does both; returns its seconds.
Measure = Callable[[Method, Problem, int, bool, Config], float]
#: Kernel, what it is looked up by, number of tokens.
Key = tuple[str, StageShape, int]

DEFAULT_SHAPES = ("llama2-7b-qo", "llama2-7b-up", "llama2-7b-down", "llama2-70b-up", "llama2-70b-down")
#: Layers for which one launch instead of two is worth a measurement.
SMALL_SHAPES = ("1024,1024", "2048,2048")
KERNELS = ("decode", "gemv", "gemm", "xnor")


def curated(method: Method, shape: StageShape, tokens: int, gpu: GpuProperties) -> Iterator[Config]:
    """The configurations worth measuring for a stage; the default is the first one."""
    default = stage_config(method, shape, tokens, gpu)
    yield default
    found: list[Config] = []
    splits = (1,) if shape.last else (1, 2, 4, 8)
    if method.kernel == "gemv":
        for words, per_step, split in itertools.product((8, 16, 32), (512, 1024), splits):
            found.append(GemvConfig(per_step // words, words, split, default.num_warps))
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


def _choices(
    problem: Problem, tokens: int, method: Method, gpu: GpuProperties
) -> Iterator[tuple[Key, bool, list[Config]]]:
    """What there is to choose for a call: its key, whether it is of a last stage, configurations."""
    ranks, sizes = tuple(problem.ranks), (problem.shape.in_features, problem.shape.out_features)
    first = StageShape(ranks, (sizes[0],) * len(ranks), last=False)
    last = StageShape((sizes[1],) * len(ranks), ranks, last=True)
    if method.kernel == "gemv":
        default = decode_config(first, last, gpu)
        key = ("decode", decode_shape(first, last), 1)
        yield key, True, [default, DecodeConfig(3 - default.launches)]
    for shape in (first, last):
        name = f"gemm {method.kind}" if method.kernel == "gemm" else method.kernel
        key = (name, shape, tokens if method.kernel == "gemm" else 1)
        yield key, shape.last, list(curated(method, shape, tokens, gpu))


def tune(
    problems: Sequence[Problem],
    token_counts: Sequence[int],
    activations: Sequence[str],
    gpu: GpuProperties,
    measure: Measure,
    kernels: Sequence[str] = KERNELS,
) -> list[tuple[str, StageShape, int, Config]]:
    """Measure every choice of every problem; entries for ``store_table``.

    A default is kept unless it is beaten by 3 %, and then stored as well: else its shape would get what is
    best for a neighbour.
    """
    entries: dict[Key, Config] = {}
    for problem, tokens, activation in itertools.product(problems, token_counts, activations):
        method = choose_method(tokens, activation, float32=False)
        for key, last, configs in _choices(problem, tokens, method, gpu):
            if key in entries or key[0].split()[0] not in kernels:
                continue
            times = {config: measure(method, problem, tokens, last, config) for config in configs}
            default, best = configs[0], min(times, key=times.__getitem__)
            entries[key] = best if times[best] < 0.97 * times[default] else default
            print(
                f"{key[0]} {key[1]} {tokens}: {times[default]:.2e} s, best {times[best]:.2e} s with {best}",
                flush=True,
            )
    return [(*key, config) for key, config in entries.items()]


@contextmanager
def chosen(last: bool, config: Config) -> Iterator[None]:
    """Let calls use ``config``: one of a stage for first or last ones, in as many launches as there are."""
    from littlebit2_kernels.triton import forward as calls

    def stage(*arguments: Any) -> Any:
        return config if arguments[1].last == last else stage_config(*arguments[:4])

    def both(*arguments: Any) -> Any:
        # Of a stage, a configuration is that of its own launch.
        launches = config if isinstance(config, DecodeConfig) else DecodeConfig(2)
        return fused_config(*arguments[:3], lambda name, *_: asdict(launches) if name == "decode" else None)

    own = calls.stage_config, calls.fused_config
    calls.fused_config = both
    if not isinstance(config, DecodeConfig):
        calls.stage_config = stage
    try:
        yield
    finally:
        calls.stage_config, calls.fused_config = own


def on_gpu(device: torch.device) -> Measure:
    """Times calls on ``device``; a configuration that cannot be compiled takes forever."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench_cudagraph

    from littlebit2_kernels.triton import forward as calls
    from littlebit2_kernels.triton.launch import direct_launches, on_device

    def measure(method: Method, problem: Problem, tokens: int, last: bool, config: Config) -> float:
        packed = problem.packed
        layer = calls.Layer(*(tensors or [] for tensors in packed.operands))
        x = problem.activations(tokens).to(torch.float16)
        out = x.new_empty(tokens, packed.out_features)
        try:
            with chosen(last, config), direct_launches(), on_device(device):
                return do_bench_cudagraph(lambda: calls.forward(x, layer, packed.bias, out, method)) / 1e3
        except (OutOfResources, CompilationError) as error:
            print(f"{config} cannot run: {error}", flush=True)
            return float("inf")

    return measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and store; with ``--dry-run`` count what would be measured, for an H200."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers.tune_triton", description=__doc__)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        default=[parse_shape(name) for name in (*DEFAULT_SHAPES, *SMALL_SHAPES)],
        metavar="SHAPE",
        help="names of benchmarks/problems.py, or K,N",
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bpw", nargs="+", type=float, default=(0.1, 0.55))
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16, 64, 512))
    parser.add_argument("--activations", nargs="+", default=("auto", "int8"))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    problems = [Problem(shape, bpw, 2, device) for shape in options.shapes for bpw in options.bpw]
    if options.dry_run:
        count = 0

        def counted(*_: Any) -> float:
            nonlocal count
            count += 1
            return 1.0

        tune(problems, options.tokens, options.activations, GPUS["H200"], counted, options.kernels)
        print(f"{count} measurements")
        return 0
    if not torch.cuda.is_available():
        parser.error("there is no GPU to tune for; --dry-run counts what would be measured")
    gpu = gpu_properties(device)
    entries = tune(problems, options.tokens, options.activations, gpu, on_gpu(device), options.kernels)
    path = store_table(torch.cuda.get_device_name(device), entries)
    print(f"{len(entries)} configurations, in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
