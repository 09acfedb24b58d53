"""Time attention of one query on the CPU: the native kernel, torch's, and its steps by torch's operations.

Keys and values are outside the caches, as they are in a step of a whole model. GB/s counts each of their
bytes once, whatever a candidate reads; ``read`` is the rate at which torch sums as many bytes. torch's kernel
gets the heads that share keys as queries, without repeating keys, as transformers gives them to it.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import PROCESSORS
from benchmarks.caches import default_cold_bytes
from benchmarks.markdown import markdown
from benchmarks.options import add_json, cpu_threads, positive
from benchmarks.records import describe_environment, environment, write_result
from benchmarks.timing import Timer, Timing, time_interleaved

if TYPE_CHECKING:
    import torch

__all__ = ["Row", "add_arguments", "measure", "run"]

KERNEL, TORCH, STEPS, READ = "kernel", "torch's sdpa", "eager", "read"


@dataclass(frozen=True)
class Row:
    """The times of one shape.

    Attributes:
        dtype: of queries, keys and values.
        threads: of torch.
        heads: of the query.
        kv_heads: of keys and values.
        keys: length of the context.
        nbytes: of keys and values.
        seconds: of a call, by candidate.
    """

    dtype: str
    threads: int
    heads: int
    kv_heads: int
    keys: int
    nbytes: int
    seconds: dict[str, Timing]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="default %(default)s")
    parser.add_argument("--threads", nargs="+", type=positive(int), help="default: 1 and all")
    parser.add_argument(
        "--heads", nargs="+", default=["32/32", "32/8"], help="heads/kv heads (default %(default)s)"
    )
    parser.add_argument("--head-size", type=positive(int), default=128, help="default %(default)s")
    parser.add_argument(
        "--keys", nargs="+", type=positive(int), default=[16, 512, 4096], help="default %(default)s"
    )
    parser.add_argument("--repetitions", type=positive(int), default=7, help="default %(default)s")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure and print."""
    import torch

    from benchmarks.problems import parse_dtype

    threads = cpu_threads(options.threads or sorted({1, len(PROCESSORS)}))
    heads = [parse_heads(text) for text in options.heads]
    rows = [
        row
        for count in threads
        for dtype in map(parse_dtype, options.dtypes)
        for pair in heads
        for row in measure(
            dtype, count, pair, options.head_size, options.keys, repetitions=options.repetitions
        )
    ]
    about = environment(torch.device("cpu"), threads)
    print(describe_environment(about))
    print()
    print(table(rows))
    if options.json is not None:
        write_result(options.json, options, about, rows=rows)
    return 0


def parse_heads(text: str) -> tuple[int, int]:
    """Return the two numbers of ``heads/kv heads``.

    Raises:
        ValueError: it is something else, or the second does not divide the first.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"heads must be like 32/8, got {text!r}")
    heads, kv_heads = int(parts[0]), int(parts[1])
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv heads, got {text!r}")
    return heads, kv_heads


def measure(
    dtype: torch.dtype,
    threads: int,
    heads: tuple[int, int],
    head_size: int,
    lengths: Sequence[int],
    *,
    repetitions: int = 7,
    cold_bytes: int | None = None,
    timer: Timer | None = None,
) -> list[Row]:
    """Time the candidates at each length of the context.

    Args:
        dtype: of queries, keys and values.
        threads: of torch, restored afterwards.
        heads: of the query, and of keys and values.
        head_size: elements of a row.
        lengths: numbers of keys.
        repetitions: turns of each candidate.
        cold_bytes: bytes of all copies of keys and values together; by default more than the caches hold.
        timer: what measures, by default the clock.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return [
                _row(dtype, threads, heads, head_size, keys, repetitions, cold_bytes, timer)
                for keys in lengths
            ]
    finally:
        torch.set_num_threads(before)


def _row(
    dtype: torch.dtype,
    threads: int,
    heads: tuple[int, int],
    size: int,
    keys: int,
    repetitions: int,
    cold_bytes: int | None,
    timer: Timer | None,
) -> Row:
    import torch

    many, few = heads
    nbytes = 2 * few * keys * size * dtype.itemsize
    wanted = default_cold_bytes(torch.device("cpu")) if cold_bytes is None else cold_bytes
    copies = min(max(1, -(-wanted // nbytes)), 512)
    query = torch.randn(1, many, 1, size).to(dtype)
    made = [torch.randn(2, 1, few, keys, size).to(dtype) for _ in range(copies)]
    names: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        KERNEL: _kernel(query),
        TORCH: _torch(query, few),
        STEPS: _steps(query, few),
        READ: _read,
    }
    calls = {name: [_bound(function, *one.unbind(0)) for one in made] for name, function in names.items()}
    seconds = time_interleaved(calls, repetitions=repetitions, cold=True, timer=timer)
    return Row(str(dtype).removeprefix("torch."), threads, many, few, keys, nbytes, seconds)


def _bound(
    function: Callable[[torch.Tensor, torch.Tensor], object], key: torch.Tensor, value: torch.Tensor
) -> Callable[[], object]:
    return lambda: function(key, value)


def _kernel(query: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], object]:
    from littlebit2_kernels import attention

    return lambda key, value: attention(query, key, value)


def _torch(query: torch.Tensor, kv_heads: int) -> Callable[[torch.Tensor, torch.Tensor], object]:
    import torch

    grouped = query.reshape(1, kv_heads, -1, query.shape[-1])
    return lambda key, value: torch.nn.functional.scaled_dot_product_attention(grouped, key, value)


def _steps(query: torch.Tensor, kv_heads: int) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """What the ``eager`` implementation of transformers does: it repeats keys that heads share."""
    groups = query.shape[1] // kv_heads

    def call(key: torch.Tensor, value: torch.Tensor) -> object:
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
        return weights.float().softmax(-1).to(query.dtype) @ value

    return call


def _read(key: torch.Tensor, value: torch.Tensor) -> object:
    import torch

    return key.view(torch.float32).sum(), value.view(torch.float32).sum()


def table(rows: Sequence[Row]) -> str:
    """A markdown table of the rows."""
    head = ["dtype", "threads", "heads", "keys"]
    head += [f"{name}, us" for name in (KERNEL, TORCH, STEPS)]
    head += ["kernel, GB/s", "read, GB/s", "faster than sdpa", "than eager"]
    lines = []
    for row in rows:
        kernel = row.seconds[KERNEL]
        lines.append(
            [
                row.dtype,
                str(row.threads),
                f"{row.heads}/{row.kv_heads}",
                str(row.keys),
                *(f"{row.seconds[name].median * 1e6:.1f}" for name in (KERNEL, TORCH, STEPS)),
                *(f"{row.nbytes / row.seconds[name].median / 1e9:.1f}" for name in (KERNEL, READ)),
                *(f"{kernel.speedup_over(row.seconds[name]):.1f}x" for name in (TORCH, STEPS)),
            ]
        )
    return markdown(head, lines)
