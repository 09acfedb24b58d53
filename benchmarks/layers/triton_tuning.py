"""Measure configurations of the Triton kernels on a GPU.

For each shape, number of tokens and stage, the configurations of a small curated set take the place of the
default in a whole call, which is timed by replays of a CUDA graph (so with weights in the L2 cache); and for
one token, one launch against two. The best ones are what ``littlebit2_kernels/triton/configs.py`` reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.problems import Problem
from littlebit2_kernels.gpu import GpuProperties
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

__all__ = ["chosen", "curated", "on_gpu", "tune"]

Config = DecodeConfig | GemvConfig | GemmConfig | XnorConfig
#: Runs a call with a configuration for one stage, or for the GEMV's number of launches; returns its seconds.
Measure = Callable[[Method, Problem, int, bool, Config], float]
#: Kernel, what it is looked up by, number of tokens.
Key = tuple[str, StageShape, int]


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
    """The choices of a call: key, whether it is for a last stage, configurations."""
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
    kernels: Sequence[str] | None = None,
) -> list[tuple[str, StageShape, int, Config]]:
    """Measure every choice of every problem for ``kernels``, by default all.

    A default is kept unless it is beaten by 3 %, and is then stored as well: otherwise its shape would get
    the best choice of a neighbor.

    Returns:
        Entries for ``store_table``.
    """
    entries: dict[Key, Config] = {}
    for problem, tokens, activation in itertools.product(problems, token_counts, activations):
        method = choose_method(tokens, activation, float32=False)
        for key, last, configs in _choices(problem, tokens, method, gpu):
            if key in entries or (kernels is not None and key[0].split()[0] not in kernels):
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
    """Let calls use ``config`` for their first or last stage, or for the number of launches."""
    from littlebit2_kernels.triton import forward as calls

    def stage(*arguments: Any) -> Any:
        return config if arguments[1].last == last else stage_config(*arguments[:4])

    def both(*arguments: Any) -> Any:
        # A stage's configuration is for a launch of its own.
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
    """Time calls on ``device``; a configuration that cannot be compiled takes infinitely long."""
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
