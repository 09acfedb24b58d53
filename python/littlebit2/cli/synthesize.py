"""``littlebit2 synthesize``: random checkpoints for speed tests."""

from __future__ import annotations

import argparse

from .common import (
    Commands,
    add_command,
    add_rows_options,
    emit,
    emit_json,
    excluded,
    note,
    rows_options,
)


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "synthesize",
        _run,
        summary="a checkpoint of random signs in the shapes of any model, for speed tests",
        description="Write a packed checkpoint of random signs in the shapes of a model. It runs as fast and "
        "takes as much memory as a real one, and says nothing sensible.",
        examples="  littlebit2 synthesize llama-2-7b OUT --bpw 0.1\n"
        "  littlebit2 generate OUT --token-ids 1 2 3 --ignore-eos",
    )
    parser.add_argument(
        "config", metavar="CONFIG_OR_NAME", help="a config.json, a directory with one, or a shipped name"
    )
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument("--bpw", type=float, required=True, help="counted bits per weight")
    parser.add_argument("--paths", type=int, default=2, help="paths of equal rank (default 2)")
    parser.add_argument(
        "--kv-factor", type=float, default=1.0, help="multiply the rank of k_proj and v_proj (default 1)"
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of module names that stay dense, besides heads",
    )
    add_rows_options(parser, packed=True)
    parser.add_argument("--seed", type=int, default=0, help="seed for all random values (default 0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT at the end if it holds a checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print the names of the layers as JSON")
    parser.add_argument("--quiet", action="store_true", help="do not name each layer on stderr")


def _run(args: argparse.Namespace) -> int:
    from littlebit2 import synthesize  # noqa: PLC0415  # imports transformers

    rows = rows_options(args)
    layers = synthesize(
        args.config,
        args.out,
        args.bpw,
        paths=args.paths,
        kv_factor=args.kv_factor,
        exclude=excluded(args),
        head=rows["head"],
        embedding=rows["embedding"],
        seed=args.seed,
        overwrite=args.overwrite,
        progress=None if args.quiet else note,
    )
    if args.json:
        emit_json({"out": args.out, "layers": layers})
    else:
        emit(f"{args.out}: {len(layers)} random layers at {args.bpw} bpw")
    return 0
