"""Time the experts of one layer of a mixture against the experts that tokens are routed to.

The layer has the sizes of Qwen3-30B-A3B: 128 experts, hidden size 2048, inner size 768, 8 experts a token.
Packed experts (random signs) stand beside transformers' own module with dense weights. Each row routes
tokens to a given number of different experts; packed layers are used in turn, so that the caches do not hold
the weights of a call. Needs transformers; downloads nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.options import add_json, cpu_threads, positive

if TYPE_CHECKING:
    import torch

    from benchmarks.timing import Timing

__all__ = ["ExpertRow", "add_arguments", "run"]


@dataclass(frozen=True)
class ExpertRow:
    """One routing.

    Attributes:
        tokens: M.
        experts_per_token: k.
        routed: different experts that get at least one token.
        packed: seconds of a call.
        dense: likewise, of transformers' module; ``None`` where it was left out.
    """

    tokens: int
    experts_per_token: int
    routed: int
    packed: Timing
    dense: Timing | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--experts", type=positive(int), default=128, help="default %(default)s")
    parser.add_argument("--hidden", type=positive(int), default=2048, help="default %(default)s")
    parser.add_argument("--inner", type=positive(int), default=768, help="default %(default)s")
    parser.add_argument(
        "--top-k", type=positive(int), default=8, help="experts a token (default %(default)s)"
    )
    parser.add_argument("--tokens", nargs="+", type=positive(int), default=[1, 16, 128, 512])
    parser.add_argument(
        "--routed",
        nargs="+",
        type=positive(int),
        default=[1, 2, 4, 8, 16, 32, 64, 128],
        help="different experts of a call; below --top-k, tokens go to that many (default %(default)s)",
    )
    parser.add_argument("--bpw", type=positive(float), default=0.1, help="default %(default)s")
    parser.add_argument("--paths", type=positive(int), default=1, help="P (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of activations (default %(default)s)")
    parser.add_argument(
        "--copies", type=positive(int), default=8, help="packed layers in turn (default %(default)s)"
    )
    parser.add_argument("--no-dense", action="store_true", help="leave transformers' module out")
    parser.add_argument("--repetitions", type=positive(int), default=11, help="default %(default)s")
    parser.add_argument(
        "--seconds", type=positive(float), default=0.02, help="least duration of a turn (default %(default)s)"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the CPU time of the one thread instead of the clock: on a machine that others use",
    )
    parser.add_argument("--threads", type=positive(int), default=1, help="default %(default)s")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure every routing that is possible; returns 0."""
    from benchmarks.models.llama import require_transformers
    from benchmarks.problems import parse_dtype
    from benchmarks.records import describe_environment, environment, write_result

    require_transformers()
    import torch

    cpu_threads([options.threads])
    if options.cpu_time and options.threads != 1:
        raise ValueError(f"--cpu-time needs --threads 1, got {options.threads}")
    about = environment(torch.device("cpu"), [options.threads])
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with torch.inference_mode():
            rows = _measure(options, parse_dtype(options.dtype))
    finally:
        torch.set_num_threads(before)
    print(describe_environment(about))
    print(f"\n{rows_table(rows)}")
    if options.json is not None:
        path = write_result(options.json, options, about, rows=rows)
        print(f"\nwrote {path}", file=sys.stderr)
    return 0


def rows_table(rows: Sequence[ExpertRow]) -> str:
    """Return the rows as markdown."""
    from benchmarks.markdown import markdown

    def cells(row: ExpertRow) -> list[str]:
        dense = "" if row.dense is None else f"{row.dense.median * 1e3:.2f}"
        ratio = "" if row.dense is None else f"{row.packed.speedup_over(row.dense):.1f}x"
        each = row.packed.median / row.routed * 1e6
        return [
            str(row.tokens),
            str(row.experts_per_token),
            str(row.routed),
            f"{row.packed.median * 1e3:.2f}",
            f"{each:.0f}",
            dense,
            ratio,
        ]

    head = [
        "tokens",
        "k",
        "routed experts",
        "packed ms",
        "us per routed expert",
        "dense ms",
        "dense / packed",
    ]
    return markdown(head, map(cells, rows))


def routing(tokens: int, per_token: int, routed: int, experts: int) -> torch.Tensor:
    """Return expert indices ``[M, k]`` that name ``routed`` experts, spread over all, about equally often."""
    import torch

    pool = torch.arange(routed) * experts // routed
    return pool[torch.arange(tokens * per_token) % routed].view(tokens, per_token)


def _measure(options: Namespace, dtype: torch.dtype) -> list[ExpertRow]:
    import torch

    from benchmarks.timing import CpuTimer, time_interleaved

    dense = _dense_module(options, dtype)
    packed = _packed_modules(options, dtype)
    candidates: dict[str, Any] = {}
    routings = []
    for tokens in options.tokens:
        for routed in options.routed:
            per_token = min(options.top_k, routed)
            if routed > min(tokens * per_token, options.experts):
                continue
            index = routing(tokens, per_token, routed, options.experts)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(tokens, options.hidden, generator=generator).to(dtype)
            weights = torch.full(index.shape, 1 / per_token, dtype=dtype)
            name = f"{tokens} tokens, {routed} experts"
            routings.append((name, tokens, per_token, routed))
            candidates[name] = [partial(module, x, index, weights) for module in packed]
            if dense is not None:
                candidates[f"{name}, dense"] = partial(dense, x, index, weights)
    # All in one rotation: whatever else the machine does falls on every row alike.
    timer = CpuTimer(time.thread_time) if options.cpu_time else CpuTimer()
    found = time_interleaved(
        candidates, repetitions=options.repetitions, seconds=options.seconds, cold=True, timer=timer
    )
    return [
        ExpertRow(tokens, per_token, routed, found[name], found.get(f"{name}, dense"))
        for name, tokens, per_token, routed in routings
    ]


def _source(options: Namespace, dtype: torch.dtype) -> Any:
    """Return transformers' module without values."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.inner,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        return Qwen3MoeExperts(config).to(dtype).eval()


def _dense_module(options: Namespace, dtype: torch.dtype) -> Any:
    if options.no_dense:
        return None
    module = _source(options, dtype).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def _packed_modules(options: Namespace, dtype: torch.dtype) -> list[Any]:
    import torch

    from littlebit2.architecture.experts import LittleBitExperts
    from littlebit2.integrations.synthesis import random_layer
    from littlebit2.quantize import QuantConfig
    from littlebit2_kernels import LittleBitLinear

    config = QuantConfig(bpw=options.bpw, paths=options.paths)
    generator = torch.Generator().manual_seed(0)
    modules = []
    for _ in range(options.copies):
        module = LittleBitExperts(_source(options, dtype))
        for index in range(options.experts):
            expert = module.expert(index)
            for name, linear in list(expert.named_children()):
                assert isinstance(linear, torch.nn.Linear)
                ranks = config.ranks_for(linear.in_features, linear.out_features)
                layer = LittleBitLinear.from_packed(random_layer(linear, ranks, generator))
                layer.prepack_()
                expert.add_module(name, layer.eval())
        modules.append(module.eval())
    return modules
