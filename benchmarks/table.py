"""Print a JSON of `sweep` or `goals` as markdown tables."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("json", type=Path)


def run(options: Namespace) -> int:
    """Print the tables."""
    from benchmarks.layers.rows import floors_table, load_document, rows_table
    from benchmarks.records import describe_environment

    document = load_document(options.json)
    print(describe_environment(document.environment))
    if document.floors:
        print(f"\n{floors_table(document.floors)}")
    print(f"\n{rows_table(document.rows)}")
    return 0
