"""``littlebit2 completion``: a script with which a shell completes commands, options and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from littlebit2._messages import require

from .common import Commands, add_command, emit

_DESCRIPTION = """\
Print a script with which a shell completes the subcommands, options, choices and paths of littlebit2 when Tab
is pressed. It holds what this version knows: make it again after an update.
"""

_EXAMPLES = """\
  littlebit2 completion bash >~/.local/share/bash-completion/completions/littlebit2
  littlebit2 completion zsh >~/.zfunc/_littlebit2    in a folder of zsh's fpath
"""

_SHELLS = ("bash", "zsh")

#: What the metavar of an argument says of its values; a name such as that of a shipped model is typed.
_DIRECTORIES = {"CKPT", "DENSE", "FOLDER", "MODEL", "MODEL_DIR", "PACKED", "TEACHER"}
_FILES = {"CONFIG_OR_NAME", "FILE", "OUT", "PATH", "SRC"}


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "completion",
        _run,
        summary="a script for the completion of commands and options in a shell",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=f"one of {', '.join(_SHELLS)}")


def _run(args: argparse.Namespace) -> int:
    require("shtab")
    import shtab  # noqa: PLC0415  # optional

    for action in _actions(args.program):
        if action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # what shtab looks at
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    emit(shtab.complete(args.program, shell=args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
