"""``python -m benchmarks.models.model_steps``: tokens per second and memory of whole models, packed beside dense.

Models of random weights decode through ``littlebit2``'s static cache: each step by Python, through
``torch.compile(mode="reduce-overhead")``, or as one CUDA graph. All models are resident; each decodes once
per round, in rotating order, and ratios are formed within a round. A step takes its token from the one before
it on the device, so that nothing waits for the host but what a kind of step itself waits for.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.candidates import dtype_name
from benchmarks.markdown import markdown
from benchmarks.models.llama import (
    LLAMA_SHAPES,
    LlamaShape,
    build_dense,
    build_packed,
    parse_llama_shape,
    require_transformers,
    weight_bytes,
)
from benchmarks.problems import parse_dtype
from benchmarks.records import Document, environment, write_text
from benchmarks.tables import describe_environment
from benchmarks.timing import Call, Setup, Timing, Turn, UnitTimer, spread_of, time_interleaved

__all__ = ["StepRow", "main", "measure"]

SCHEMA = 1


@dataclass(frozen=True)
class StepRow:
    """One model with one kind of step.

    Attributes:
        name: what tells it from the others.
        bpw: counted bits per weight of the packed layers; ``None`` if dense.
        fused: whether projections on one input are one call.
        step: see :data:`littlebit2.integrations.decoding.STEPS`.
        layers: decoder layers.
        samples: seconds of a token in each round.
        prefill: seconds of the prompt in each round.
        weight_bytes: of all weights and buffers.
        decode_bytes: the most that was allocated on the GPU while this model alone decoded, weights and cache
            included; ``None`` on the CPU.
        speedups: by name of a dense row, median and quartiles of the ratios within rounds.
    """

    name: str
    bpw: float | None
    fused: bool
    step: str
    layers: int
    samples: list[float]
    prefill: list[float]
    weight_bytes: int
    decode_bytes: int | None
    speedups: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return 1 / spread_of(self.samples).median


class _Run:
    """One candidate: a prompt and then tokens, as often as it is called."""

    def __init__(self, decoder: Any, prompt: torch.Tensor, tokens: int) -> None:
        self.decoder = decoder
        self.prefills: list[float] = []
        self._prompt = prompt
        self._tokens = tokens

    def __call__(self) -> float:
        start = self._now()
        token = self.decoder.prefill(self._prompt).argmax(-1)
        begun = self._now()
        for _ in range(self._tokens):
            token = self.decoder.step(token).argmax(-1)
        end = self._now()
        self.prefills.append(begun - start)
        return (end - begun) / self._tokens

    def _now(self) -> float:
        if self._prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class _StepTimer:
    """A :class:`benchmarks.timing.Timer` of :class:`_Run`, which times itself once it is warm."""

    def prepare(self, runs: Sequence[Call], *, seconds: float, cold: bool, setup: Setup | None) -> Turn:
        (run,) = runs
        assert isinstance(run, _Run)
        for _ in range(2):  # compiles, captures
            run()
        run.prefills.clear()
        return run


@dataclass(frozen=True)
class _Model:
    name: str
    bpw: float | None
    fused: bool
    model: Any
    bytes: int | None


def _models(
    options: argparse.Namespace, shape: LlamaShape, layers: int, device: torch.device
) -> list[_Model]:
    from littlebit2 import fuse_projections

    dtype = parse_dtype(options.dtype)
    models = []

    def add(name: str, bpw: float | None, fused: bool, build: Any) -> None:
        print(f"building {name}", file=sys.stderr, flush=True)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        model = build()
        grown = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else None
        models.append(_Model(name, bpw, fused, model, grown))

    for bpw in options.bpw:

        def packed(bpw: float = bpw) -> Any:
            return build_packed(shape, layers, bpw, dtype, paths=options.paths, device=device)

        def fused(bpw: float = bpw) -> Any:
            model = packed(bpw)
            fuse_projections(model, on_cpu=True)
            return model

        add(f"packed {bpw:g} bpw", bpw, True, fused)
        if options.unfused:
            add(f"packed {bpw:g} bpw, unfused", bpw, False, packed)
    if not options.no_dense:
        add(
            f"dense {dtype_name(dtype)}",
            None,
            False,
            lambda: build_dense(shape, layers, dtype, device=device),
        )
    return models


def measure(options: argparse.Namespace, device: torch.device) -> tuple[list[StepRow], dict[str, str]]:
    """Measure every model with every kind of step.

    Returns:
        Rows, and the reasons of those that could not be measured by their names.
    """
    from littlebit2.integrations.decoding import StaticDecoder

    shape = parse_llama_shape(options.shape)
    layers = options.layers or shape.layers
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(shape.vocabulary, (options.rows, options.prompt), generator=generator).to(device)
    runs: dict[str, tuple[_Model, str, _Run, int | None]] = {}
    unavailable: dict[str, str] = {}
    for model in _models(options, shape, layers, device):
        for step in dict.fromkeys(options.steps):
            name = f"{model.name}, {step}"
            try:
                decoder = StaticDecoder(
                    model.model, options.prompt + options.tokens, rows=options.rows, step=step
                )
                run = _Run(decoder, prompt, options.tokens)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    others = torch.cuda.memory_allocated(device) - (model.bytes or 0)
                run()
            except Exception as error:
                # Whatever stops a kind of step, a missing compiler for instance, the others can be measured.
                unavailable[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                continue
            peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else None
            runs[name] = (model, step, run, peak)
    if not runs:
        return [], unavailable
    timings = time_interleaved(
        {name: [run] for name, (_, _, run, _) in runs.items()},
        repetitions=options.repetitions,
        seconds=0.0,
        timer=UnitTimer() if options.unit_times else _StepTimer(),
    )
    rows = [
        StepRow(
            name,
            model.bpw,
            model.fused,
            step,
            layers,
            list(timings[name].samples),
            run.prefills,
            weight_bytes(model.model),
            peak,
        )
        for name, (model, step, run, peak) in runs.items()
    ]
    for row in rows:
        for peer in rows:
            if peer.bpw is None and row.bpw is not None:
                spread = Timing(tuple(row.samples)).speedup_spread(Timing(tuple(peer.samples)))
                row.speedups[peer.name] = [spread.median, spread.low, spread.high]
    return rows, unavailable


def table(rows: Sequence[StepRow]) -> str:
    """The rows as a markdown table."""
    peers = [row for row in rows if row.bpw is None]
    head = ["model", "step", "tokens/s", "ms/token", "prompt ms", "weights GB", "allocated GB"]
    head += [f"against {peer.name}" for peer in peers]
    lines = []
    for row in rows:
        step = spread_of(row.samples).median
        lines.append(
            [
                row.name.rpartition(", ")[0],
                row.step,
                f"{row.tokens_per_second:.1f}",
                f"{step * 1e3:.3f}",
                f"{spread_of(row.prefill).median * 1e3:.1f}" if row.prefill else "",
                f"{row.weight_bytes / 1e9:.3f}",
                "" if row.decode_bytes is None else f"{row.decode_bytes / 1e9:.3f}",
                *(f"{row.speedups[peer.name][0]:.2f}x" if row.speedups else "" for peer in peers),
            ]
        )
    return markdown(head, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.model_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="llama2-7b", choices=LLAMA_SHAPES, help="default llama2-7b")
    parser.add_argument("--layers", type=int, help="default: the shape's")
    parser.add_argument("--bpw", type=float, nargs="+", default=[0.1], help="default 0.1")
    parser.add_argument("--paths", type=int, default=2, help="of a packed layer (default 2)")
    parser.add_argument("--steps", nargs="+", default=["graph"], choices=("eager", "compile", "graph"))
    parser.add_argument("--dtype", default="float16", help="default float16")
    parser.add_argument("--rows", type=int, default=1, help="of the batch (default 1)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a round (default 64)")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--unfused", action="store_true", help="also without fused projections")
    parser.add_argument("--no-dense", action="store_true", help="packed models alone")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--unit-times", action="store_true", help="pretend times, to try the program")
    parser.add_argument("--json", type=Path, help="write the rows there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 if nothing could be measured."""
    options = _parser().parse_args(arguments)
    require_transformers()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: device 'cuda' cannot be used: torch finds no usable GPU", file=sys.stderr)
        return 1
    rows, unavailable = measure(options, device)
    threads = [0] if device.type == "cuda" else [torch.get_num_threads()]
    document = Document(environment(device, threads))
    print(describe_environment(document))
    print(f"\n{options.shape}, {options.rows} row(s), prompt of {options.prompt} tokens\n\n{table(rows)}")
    for name, reason in unavailable.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if options.json is not None:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        content = {
            "schema": SCHEMA,
            "environment": document.environment,
            "settings": settings,
            "rows": [asdict(row) for row in rows],
            "unavailable": unavailable,
        }
        write_text(options.json, json.dumps(content, indent=2) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
