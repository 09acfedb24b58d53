"""The command line: ``littlebit2 quantize | calibrate | finetune | evaluate | convert | inspect | ...``.

Torch and transformers are imported by the subcommand that needs them, not for ``--help``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from . import (
    calibrate,
    completion,
    convert,
    doctor,
    evaluate,
    finetune,
    generate,
    inspect,
    plan,
    quantize,
    synthesize,
    write_text,
)
from .common import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    Parser,
    is_wrong_usage,
    name_options,
    note,
    one_line,
    option_names,
)

__all__ = ["main"]

_COMMANDS = (
    quantize,
    calibrate,
    write_text,
    finetune,
    evaluate,
    convert,
    inspect,
    plan,
    generate,
    synthesize,
    doctor,
    completion,
)

_EPILOG = """\
examples:
  littlebit2 plan llama-2-13b --bpw 0.1          what it would weigh
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55   dense model to packed checkpoint
  littlebit2 finetune MODEL_DIR OUT --data corpus/ --bpw 0.55      the same, then trained on text
  littlebit2 inspect OUT                         layers, ranks, bits, sizes, problems
  littlebit2 generate OUT "Once upon a time"
  littlebit2 doctor                              what runs on this machine

exit codes: 0 done, 1 failed, 2 wrong usage or a wrong value, 130 interrupted.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = Parser(
        prog="littlebit2",
        description="Quantize language models to packed sub-1-bit layers (LittleBit, LittleBit-2); run them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in _COMMANDS:
        module.add_parser(commands)
    for command in commands.choices.values():
        command.set_defaults(option_names=option_names(command), parser=command, program=parser)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments, by default those of the process.

    Returns:
        Exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _forget_output()
        return FAILED


def _main(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(argv)
        if rest:
            _take_rest(args, rest, parser)
        if args.version:
            sys.stdout.write(f"littlebit2 {_version()}\n")
            return 0
        if args.command is None:
            parser.error("COMMAND is required")
        return _run(args)
    except SystemExit as stop:  # argparse exits after --help and wrong usage
        return stop.code if isinstance(stop.code, int) else FAILED


def _version() -> str:
    """The version, read from its file: importing the package that it lies in would import torch."""
    package = importlib.util.find_spec("littlebit2_kernels")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the package littlebit2_kernels, which belongs to this one, is not installed"
        )
    version: str = runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"]
    return version


def _take_rest(args: argparse.Namespace, rest: list[str], parser: argparse.ArgumentParser) -> None:
    """Give a command what its parser left: values for an argument of any number, after options; or refuse it.

    Left to argparse, the program's own usage would be shown, and not the command's.
    """
    command: argparse.ArgumentParser = getattr(args, "parser", parser)
    many = getattr(args, "takes_more", None)
    if many is None or any(value.startswith("-") and value != "-" for value in rest):
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    setattr(args, many, [*getattr(args, many), *rest])


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        note(f"littlebit2 {args.command}: interrupted{args.after_interrupt}")
        _leave_threads_behind()
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            raise
        text = name_options(one_line(error), args.option_names)
        note(f"littlebit2 {args.command}: error: {text}")
        return WRONG_USAGE if is_wrong_usage(error, text, args.option_names) else FAILED


def _forget_output() -> None:
    """Keep the interpreter from failing again when it flushes: whoever read our output has gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave_threads_behind() -> None:
    """Exit at once if layers are being worked on: the interpreter would wait for them, or crash in them."""
    if any(thread.daemon and thread.name.startswith("littlebit2") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
