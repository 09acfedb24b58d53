"""``python -m benchmarks COMMAND``: see :mod:`benchmarks.commands`."""

from __future__ import annotations

import sys

from benchmarks.commands import COMMANDS, command_parser, overview_parser

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 if the command found something wrong, 2 for a request that cannot be met.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        overview_parser().parse_args(arguments)
    options = command_parser(arguments[0]).parse_args(arguments[1:])
    options.arguments = list(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
