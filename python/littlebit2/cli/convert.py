"""``littlebit2 convert``: between checkpoint layouts."""

from __future__ import annotations

import argparse

from .common import Commands, add_command, add_rows_options, emit, note, note_left

_LAYOUTS = ("littlebit2", "littlebit")


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        _run,
        summary="between our layout and the LittleBit authors'",
        description="Convert a checkpoint to our layout (littlebit2) or to that of the LittleBit "
        "authors' code (littlebit).",
        examples="  littlebit2 convert AUTHORS_CHECKPOINT OUT --to littlebit2\n"
        "  littlebit2 convert OUR_CHECKPOINT OUT --to littlebit",
    )
    parser.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument("--to", choices=_LAYOUTS, required=True, help="layout to write")
    add_rows_options(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT at the end if it holds a checkpoint"
    )


def _run(args: argparse.Namespace) -> int:
    from littlebit2.offline import convert_checkpoint  # noqa: PLC0415  # imports torch

    side, notes = convert_checkpoint(
        args.source,
        args.out,
        args.to,
        head=args.head,
        embedding=args.embedding,
        overwrite=args.overwrite,
    )
    for remark in notes:
        note(remark)
    emit(f"{args.out}: written in the layout {args.to}")
    note_left(side.left)
    return 0
