"""Shared by the subcommands: output, and the options that make a :class:`.QuantConfig`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from littlebit2._messages import SettingError, missing_package
from littlebit2.architecture.select import DEFAULT_EXCLUDE

if TYPE_CHECKING:
    from littlebit2.quantize import QuantConfig

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "METHODS",
    "WRONG_USAGE",
    "Commands",
    "Parser",
    "add_command",
    "add_load_options",
    "add_method_options",
    "add_pattern_options",
    "add_size_options",
    "add_spectral_options",
    "at_largest_rank",
    "emit",
    "emit_json",
    "excluded",
    "gigabytes",
    "is_wrong_usage",
    "load_options",
    "method_options",
    "name_options",
    "note",
    "note_left",
    "one_line",
    "option_names",
    "quant_config",
    "table",
]

_HELP_WIDTH = 100

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130

#: As in littlebit2.quantize, which would import torch.
METHODS = ("auto", "admm", "refine", "joint-itq", "dual-svid")
#: Defaults of steps of the methods.
_STEPS = {"refine_rounds": 12, "admm_iterations": 300}

Commands = Any  # argparse's class of subparsers is private


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong: the usage of some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        """Exit for wrong usage."""
        self.exit(WRONG_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def emit(text: str = "") -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(text + "\n")


def emit_json(value: Any) -> None:
    """Write a result as JSON to stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def note(text: str) -> None:
    """Write a remark or an error to stderr."""
    sys.stderr.write(text + "\n")


def note_left(left: Mapping[str, str]) -> None:
    """Say which files beside the weights were not copied, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        note(f"not copied ({reason}): {', '.join(names[:8])}{more}")


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    missing = missing_package(error)
    if missing is not None:
        return missing
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def name_options(text: str, options: Mapping[str, str]) -> str:
    """Put options in the place of the Python arguments that an error names.

    Args:
        text: the message.
        options: options, or metavars of positional arguments, by the name of the argument.
    """
    for name, option in options.items():
        # As messages name arguments: before what is said of them, before a colon at the start, with a value,
        # or in a list with other ones. A name of several words is no other word.
        said = r"(\[\d+\])? must | \[[\d, ]+\] would | or [\w-]+ must | cannot | needs? |="
        text = re.sub(
            rf"(?<![\w.-]){name}(?={said})|^{name}(?=: | \w+ (must|needs) )|(?<=needs ){name}\b", option, text
        )
        if "_" in name:
            text = re.sub(rf"(?<![\w.'\"-]){name}(?![\w('\"])", option, text)
        text = text.replace(f"{option}=True ({option})", option)
        text = text.replace(f"{option} must be None ", f"{option} must be left out ")
    return text


def is_wrong_usage(error: BaseException, text: str, options: Mapping[str, str]) -> bool:
    """Whether an error says that a value of the command line is wrong, and not that the work failed.

    Args:
        error: that a command raised. Errors of files, memory and libraries are never those of a value.
        text: of the error, from :func:`name_options`.
        options: as for :func:`name_options`.
    """
    if isinstance(error, SettingError):
        return True
    if type(error) is not ValueError:  # what is derived from it says more: of checkpoints, of JSON
        return False
    names = "|".join(sorted(map(re.escape, {*options.values()}), key=len, reverse=True))
    # Said of an option, or of options, at the start, perhaps for a layer.
    others = r"(,? (or|and) [\w-]+)*"
    said = r"(: | must | cannot | needs? | chooses | \[[\d, ]+\] would )"
    return bool(re.match(rf"(layer '[^']*': )?({names})(\[\d+\])?(=\S+)?{others}{said}", text))


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return for each argument of a command what its user calls it."""
    names = {}
    for action in parser._actions:
        option = max(action.option_strings, key=len, default=str(action.metavar or action.dest))
        names[action.dest] = option
    return {**{ours: names[dest] for ours, dest in _ARGUMENTS.items() if dest in names}, **names}


#: Arguments of functions that have another name than the option's.
_ARGUMENTS = {
    "accumulation": "accumulate",
    "budget_seconds": "time_budget",
    "path": "path",
    "source": "source",
    "token_ids": "token_ids",
}


def gigabytes(size: float) -> str:
    """Format a number of bytes in GB (1e9) or MB."""
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned table; the first column to the left, the others to the right."""
    cells = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    return "\n".join(line.rstrip() for line in lines)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
    after_interrupt: str = "",
) -> argparse.ArgumentParser:
    """Add a subcommand; ``after_interrupt`` completes the message after Ctrl-C."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(" ".join(description.split()), _HELP_WIDTH),
        epilog=f"examples:\n{examples.rstrip()}",
    )
    parser.set_defaults(run=run, after_interrupt=after_interrupt)
    return parser


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading and running a checkpoint."""
    parser.add_argument("--device", default="cpu", help="device to run on (default cpu)")
    parser.add_argument("--dtype", help="dtype of activations and dense tensors: float32, bfloat16, float16")
    parser.add_argument("--backend", default="auto", help="backend for packed layers (default auto)")
    parser.add_argument(
        "--activation", default="auto", help="activation mode of packed layers (default auto)"
    )


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_load_options` as arguments for ``littlebit2.load``."""
    options = {"device": args.device, "backend": args.backend, "activation": args.activation}
    return options if args.dtype is None else {**options, "dtype": args.dtype}


def add_size_options(parser: argparse.ArgumentParser, more_methods: Mapping[str, str] | None = None) -> Any:
    """Add the options for layer sizes and the method; return the mutually exclusive group of sizes.

    Args:
        parser: of the command.
        more_methods: methods of this command alone, with their part of the help.
    """
    others = more_methods or {}
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--bpw", type=float, help="counted bits per weight, summed over paths (default 1.0)")
    size.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        metavar="R",
        help="rank of each path, multiples of 8, instead of --bpw",
    )
    parser.add_argument(
        "--paths", type=int, help="number of paths, of equal rank (default 1; 2 for joint-itq and dual-svid)"
    )
    parser.add_argument(
        "--method",
        "--init",  # its name before methods did more than initialize
        choices=(*METHODS, *others),
        default=METHODS[0],
        metavar="METHOD",
        help="algorithm for signs and scales: dual-svid (LittleBit), joint-itq (LittleBit-2), refine "
        "(joint-itq, then refined), admm (binary factorization), or auto (default): the best that fits "
        "--time-budget" + "".join(f"; {name}: {text}" for name, text in others.items()),
    )
    parser.add_argument(
        "--kv-factor", type=float, default=1.0, help="multiply the rank of k_proj and v_proj (default 1)"
    )
    return size


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for how long the methods search."""
    parser.add_argument(
        "--time-budget",
        type=float,
        default=60.0,
        metavar="S",
        help="with --method auto, seconds per layer at 50e9 operations a second (default 60)",
    )
    parser.add_argument(
        "--itq-iterations",
        type=int,
        default=15,
        metavar="N",
        help="maximum Joint-ITQ iterations (default 15)",
    )
    parser.add_argument(
        "--refine-rounds",
        type=int,
        metavar="N",
        help=f"maximum refinement rounds (default {_STEPS['refine_rounds']})",
    )
    parser.add_argument(
        "--admm-iterations",
        type=int,
        metavar="N",
        help=f"ADMM iterations (default {_STEPS['admm_iterations']})",
    )


def method_options(args: argparse.Namespace, steps: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the options of :func:`add_method_options` as arguments for :func:`quant_config`.

    Args:
        args: of the command.
        steps: other defaults of ``refine_rounds`` and ``admm_iterations``.
    """
    asked = {name: getattr(args, name) for name in _STEPS}
    known = {**_STEPS, **(steps or {})}
    return {
        "budget_seconds": args.time_budget,
        "itq_iterations": args.itq_iterations,
        **{name: known[name] if value is None else value for name, value in asked.items()},
    }


def add_spectral_options(parser: argparse.ArgumentParser, size: Any, *, text: bool = False) -> None:
    """Add the options for ranks that depend on weights.

    Args:
        parser: of the command.
        size: from :func:`add_size_options`.
        text: whether ranks can also depend on the model's output on text.
    """
    size.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="choose ranks that keep this share of each layer's squared singular values, such as 0.95",
    )
    parser.add_argument(
        "--budget",
        choices=("uniform", "spectral", *(["kl"] if text else [])),
        default="uniform",
        help="distribute the bits of --bpw evenly (default) or by the layers' spectra"
        + ("; kl: by what the model's output loses, with --data" if text else ""),
    )
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="weight errors by activation statistics from littlebit2 calibrate",
    )


def add_pattern_options(parser: argparse.ArgumentParser, *, int8: bool = False) -> None:
    """Add the options that select layers.

    Args:
        parser: of a command.
        int8: whether heads and embeddings can be rounded to int8.
    """
    parser.add_argument(
        "--include",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="shell-style patterns of module names to quantize (default: every linear layer)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of module names that stay dense, besides heads (lm_head, score, classifier, ...)",
    )
    add_rows_options(parser, int8=int8, packed=True)


def add_rows_options(parser: argparse.ArgumentParser, *, int8: bool = True, packed: bool = False) -> None:
    """Add the options that say what becomes of heads and of the embedding of tokens.

    Args:
        parser: of a command.
        int8: whether they can be rounded to int8.
        packed: whether heads can be packed.
    """
    parser.add_argument(
        "--head",
        choices=("keep", *(["int8"] if int8 else []), *(["packed"] if packed else [])),
        default="keep",
        help="what becomes of heads: dense as they are (default)"
        + (", int8 rows with a scale each" if int8 else "")
        + (", or packed like other layers, except those that --exclude names" if packed else ""),
    )
    if int8:
        parser.add_argument(
            "--embedding",
            choices=("keep", "int8"),
            default="keep",
            help="what becomes of the embedding of tokens: dense as it is (default), or int8 rows with a "
            "scale each; a head that is tied to it becomes the same rows",
        )


def rows_options(args: argparse.Namespace) -> dict[str, str]:
    """Return what --head and --embedding say of a head that is not packed, for the Python API."""
    return {"head": "int8" if args.head == "int8" else "keep", "embedding": args.embedding}


def at_largest_rank(names: Sequence[str], args: argparse.Namespace) -> str | None:
    """Return a line that says which layers cannot use more bits; ``None`` if none, or if ranks are given."""
    if not names or args.ranks is not None:
        return None
    many = f"{len(names)} layers are" if len(names) > 1 else "1 layer is"
    return (
        f"{many} at the largest useful rank, min(K, N), and cannot use more bits: {', '.join(_first(names))}"
    )


def _first(names: Sequence[str], most: int = 3) -> list[str]:
    return [*names[:most], *(["..."] if len(names) > most else [])]


def excluded(args: argparse.Namespace) -> list[str]:
    """Return the patterns of layers that stay dense: the default of the Python API, and --exclude."""
    return [*([] if args.head == "packed" else DEFAULT_EXCLUDE), *args.exclude]


def quant_config(args: argparse.Namespace, **others: Any) -> QuantConfig:
    """Make the configuration that the options describe."""
    from littlebit2.quantize import QuantConfig  # noqa: PLC0415  # imports torch

    ranks = None if args.ranks is None else tuple(args.ranks)
    described = {
        "bpw": args.bpw,
        "ranks": ranks,
        "paths": args.paths,
        "method": args.method,
        "kv_factor": args.kv_factor,
    }
    return QuantConfig(**{**described, **others})
