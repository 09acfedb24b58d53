"""``littlebit2 write-text``: text of a dense model's own, to tune a quantized one on."""

from __future__ import annotations

import argparse

from .common import Commands, add_command, emit, note

_DESCRIPTION = """\
Let a dense language model write text for "littlebit2 quantize --data", where no other is at hand: free texts
and, where the tokenizer has a chat template, chats in its form. Killed at any moment, the same command
continues where it was and writes the same bytes; when it has finished, it leaves OUT as it is.
"""

_EXAMPLES = """\
  littlebit2 write-text MODEL_DIR own.jsonl
  littlebit2 write-text MODEL_DIR own.jsonl --tokens 1000000 --chats 0.8 --batch-size 64
  littlebit2 quantize MODEL_DIR OUT --bpw 1.0 --data own.jsonl
"""

#: Options, their types, and what they are, by the names of the function's arguments.
_OPTIONS = (
    ("tokens", int, "N", "tokens to write (default 262144)"),
    ("length", int, "T", "maximum tokens per text (default 256)"),
    (
        "chats",
        float,
        "SHARE",
        "share of the tokens in chats, 0 to 1 (default 0.5 with a chat template, else 0)",
    ),
    ("batch_size", int, "N", "texts at a time (default 32)"),
    ("temperature", float, "T", "sampling temperature (default 1)"),
    ("top_k", int, "K", "sample from the K likeliest tokens; 0: from all (default 50)"),
    ("seed", int, "N", "seed for sampling (default 0)"),
    ("device", str, "NAME", "device to run on (default cpu)"),
    ("dtype", str, "NAME", "dtype of the model: float32, bfloat16 (default: the faster one here)"),
)


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "write-text",
        _run,
        summary="text of a dense model's own, for quantize --data",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="directory of the dense checkpoint, with a tokenizer"
    )
    parser.add_argument("out", metavar="OUT", help="file of JSON lines to write, *.jsonl")
    for name, kind, metavar, text in _OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard what an earlier run has left or, with --overwrite, finished",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT at the end if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace) -> int:
    from littlebit2.own_text import write_text  # noqa: PLC0415  # imports torch

    given = {name: getattr(args, name) for name, *_ in _OPTIONS}
    done = write_text(
        args.model_dir,
        args.out,
        **{name: value for name, value in given.items() if value is not None},
        progress=not args.quiet,
        resume=not args.restart,
        overwrite=args.overwrite,
    )
    if done.was_there:
        note(f"{args.out} was finished before, with the same settings; --restart writes it again")
    emit(
        f"{args.out}: {done.texts} texts, {done.chats} of them chats, {done.tokens} tokens, "
        f"{done.seconds:.1f} s"
    )
    emit("next:")
    emit(f"  littlebit2 quantize {args.model_dir} OUT --bpw 1.0 --data {args.out}")
    return 0
