"""``python -m benchmarks``: measures our backends beside their peers, on one machine, in one run.

run          backends x shapes x bits per weight x tokens x dtypes, as a table, JSON and CSV
goals        the goals of the CPU kernels beside what is measured
floors       what the machine can do: reading memory, copying it, multiplying matrices
whole-model  decode of a synthetic Llama through generate, beside dense, with a profile
predict      what decode calls should cost on a GPU: counts of bytes and instructions, and times from them
table        the markdown table of a JSON written by run or goals
plot         the PNG plots of such a JSON

Pin threads when measuring on a CPU: OMP_PROC_BIND=true OMP_PLACES=threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import PROCESSORS, commands
from benchmarks.estimates import predict
from benchmarks.layers.goals import BPWS
from benchmarks.models import whole_model
from benchmarks.models.llama import LLAMA_SHAPES
from benchmarks.models.llama_options import OPTIONS
from benchmarks.problems import LARGE_SHAPES, SHAPES

__all__ = ["main"]


def _positive(kind: type[Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    run = subparsers.add_parser("run", help="measure backends x shapes x bpw x tokens x dtypes")
    run.add_argument(
        "--candidates",
        nargs="+",
        default=["littlebit2:cpu:auto", "littlebit2:portable", "dense", "low-rank", "gemlite"],
        help="littlebit2:BACKEND:ACTIVATION, littlebit2:portable, dense, low-rank, unpack, gemlite",
    )
    run.add_argument(
        "--shapes",
        nargs="+",
        default=["llama2-7b-up"],
        help=f"K,N or of {', '.join(SHAPES)}; or 'large', 'all'",
    )
    run.add_argument("--bpw", nargs="+", type=_positive(float), default=[0.1, 0.55, 1.0])
    run.add_argument("--tokens", nargs="+", type=_positive(int), default=[1, 8], metavar="M")
    run.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16, float16")
    run.add_argument("--modes", nargs="+", choices=("hot", "cold"), default=["cold", "hot"])
    run.add_argument("--threads", nargs="+", type=_positive(int), default=[1], help="interleaved too")
    run.add_argument("--paths", type=_positive(int), default=2, help="paths that share the bits of a layer")
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    run.add_argument("--no-graphs", action="store_true", help="launch calls one by one on a GPU")
    run.add_argument("--refcheck", action="store_true", help="compare with float64; exit 1 past a bound")
    run.add_argument(
        "--unit-times", action="store_true", help="a dry run: run each call once and let it take 1 us"
    )
    run.add_argument("--no-floors", action="store_true", help="do not measure the machine's floors")
    _add_measuring(run, repetitions=11)
    _add_outputs(run)
    run.set_defaults(function=commands.run)

    goals = subparsers.add_parser("goals", help="the CPU goals beside what is measured")
    goals.add_argument("--shapes", nargs="+", default=list(LARGE_SHAPES))
    goals.add_argument("--bpw", nargs="+", type=_positive(float), default=list(BPWS))
    goals.add_argument("--exact", default="littlebit2:cpu:exact", help="candidate of the exact goals")
    goals.add_argument("--int16", default="littlebit2:cpu:int16", help="candidate of the int16 goals")
    goals.add_argument("--quick", action="store_true", help="3 repetitions")
    goals.add_argument(
        "--from", dest="source", type=Path, help="a JSON of an earlier goals run; measures nothing"
    )
    goals.add_argument("--no-floors", action="store_true", help="do not measure the machine's floors")
    _add_measuring(goals, repetitions=9)
    _add_outputs(goals)
    goals.set_defaults(function=commands.goals)

    floors = subparsers.add_parser("floors", help="what the machine can do")
    floors.add_argument("--threads", nargs="+", type=_positive(int), help="default: 1 and all")
    floors.add_argument("--dtypes", nargs="+", default=["float32"])
    floors.add_argument("--device", default="cpu")
    floors.add_argument(
        "--mib",
        type=_positive(float),
        help="size of the stream; default: 8 times the last cache, 512 or more",
    )
    floors.add_argument("--size", type=_positive(int), default=2048, help="rows of the square matrices")
    floors.set_defaults(function=commands.floors)

    _add_whole_model(subparsers)

    _add_predict(subparsers)

    table = subparsers.add_parser("table", help="markdown table of a JSON")
    table.add_argument("json", type=Path)
    table.set_defaults(function=commands.table)

    plot = subparsers.add_parser("plot", help="PNG plots of a JSON")
    plot.add_argument("json", type=Path)
    plot.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder")
    plot.set_defaults(function=commands.plot)
    return parser


def _add_whole_model(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    options = "; ".join(f"{name}: {option.help}" for name, option in OPTIONS.items())
    whole = subparsers.add_parser("whole-model", help="decode of a synthetic Llama through generate")
    whole.add_argument("--shape", default="llama2-7b", help=", ".join(LLAMA_SHAPES))
    whole.add_argument("--layers", type=_positive(int), help="default: those of the shape")
    whole.add_argument("--bpw", nargs="*", type=_positive(float), default=[0.1, 0.55], help="packed models")
    whole.add_argument("--paths", type=_positive(int), default=2, help="paths that share the bits of a layer")
    whole.add_argument("--dtype", default="bfloat16", help="of packed models: bfloat16, float16, float32")
    whole.add_argument("--dense", nargs="*", default=["bfloat16"], metavar="DTYPE", help="dense models")
    whole.add_argument(
        "--dense-layers",
        type=_positive(int),
        default=4,
        help="of the larger one of two dense models, the other has half; all layers: measured whole",
    )
    whole.add_argument(
        "--options", nargs="+", default=[], help=f"packed models with changes, several joined by +. {options}"
    )
    whole.add_argument("--dense-options", nargs="+", default=[], help="the same for dense models")
    whole.add_argument("--prompt", type=_positive(int), default=16, help="tokens of the prompt")
    whole.add_argument("--tokens", type=_positive(int), default=32, help="new tokens of a round")
    whole.add_argument("--rounds", type=_positive(int), default=5, help="every model decodes once in each")
    whole.add_argument("--threads", type=_positive(int), default=min(2, len(PROCESSORS)))
    whole.add_argument("--profile", action="store_true", help="where the time of a step goes")
    whole.add_argument("--memory-gib", type=_positive(float), default=12, help="most for all linear layers")
    whole.add_argument("--json", type=Path, help="write everything measured here")
    whole.set_defaults(function=whole_model.run)


def _add_predict(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prediction = subparsers.add_parser("predict", help="counts and predicted times of decode calls on a GPU")
    prediction.add_argument("--gpu", nargs="+", choices=predict.RATES, default=["H200", "A100", "4090"])
    prediction.add_argument("--shapes", nargs="+", default=["llama2-7b-qo", "llama2-7b-up", "llama2-70b-up"])
    prediction.add_argument("--bpw", nargs="+", type=_positive(float), default=[0.1, 0.3, 0.55, 1.0])
    prediction.add_argument("--activation", default="auto", help="auto, exact, float16, int16, int8 or sign")
    prediction.add_argument(
        "--tokens",
        nargs="+",
        type=_positive(int),
        help="prompts of more than 16 tokens, in place of one token",
    )
    prediction.set_defaults(function=predict.run)


def _add_measuring(parser: argparse.ArgumentParser, *, repetitions: int) -> None:
    parser.add_argument("--repetitions", type=_positive(int), default=repetitions)
    parser.add_argument("--seconds", type=_positive(float), default=0.02, help="least duration of a turn")
    parser.add_argument("--cold-mib", type=_positive(float), help="copies of a cold layer together take this")
    parser.add_argument("--memory-gib", type=_positive(float), default=12, help="most for all weights")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--csv", type=Path, help="write the rows here")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error past its bound, 2 for a bad request."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.function(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
