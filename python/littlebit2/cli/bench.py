"""``littlebit2 bench``: the benchmarks of the repository."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from .common import FAILED, Commands, add_command, note


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "bench",
        _run,
        summary="run the repository's benchmarks (python -m benchmarks)",
        description="Hand all arguments to `python -m benchmarks`. Benchmarks are part of the repository, "
        "not of the installed package: run this from a checkout.",
        examples="  littlebit2 bench -- --help",
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmarks"
    )


def _run(args: argparse.Namespace) -> int:
    sys.path.insert(0, "")  # a console script does not look into the current directory, python -m does
    try:
        found = importlib.util.find_spec("benchmarks.__main__")
    except ModuleNotFoundError:
        found = None
    finally:
        sys.path.remove("")
    if found is None:
        note(
            "littlebit2 bench: error: the benchmarks package is not importable here; "
            "run this in the root of a checkout of the repository"
        )
        return FAILED
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], check=False).returncode
