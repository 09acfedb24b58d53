"""Options that several commands have, and what their values mean. Imports torch only when a value is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import PROCESSORS

if TYPE_CHECKING:
    import torch

__all__ = ["add_json", "cpu_threads", "note", "positive", "usable_device"]


def positive(kind: type[Any]) -> Callable[[str], Any]:
    """An argparse type: a number of ``kind`` above 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return parse


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")


def cpu_threads(threads: Sequence[int]) -> list[int]:
    """The distinct thread counts.

    Raises:
        ValueError: a count exceeds the processors of this process.
    """
    most = len(PROCESSORS)
    if max(threads) > most:
        raise ValueError(f"threads must be at most the {most} processors of this process, got {max(threads)}")
    return list(dict.fromkeys(threads))


def usable_device(text: str) -> torch.device:
    """The device, made the current one if it is a GPU.

    Raises:
        RuntimeError: it is a GPU and torch finds none.
    """
    import torch

    device = torch.device(text)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RuntimeError(f"device {text!r} cannot be used: torch finds no usable GPU")
    device = torch.device("cuda", device.index or 0)
    # Streams, events and graphs belong to the current device.
    torch.cuda.set_device(device)
    return device


def note(text: str) -> None:
    """Report progress on stderr; a run can take many minutes."""
    print(text, file=sys.stderr, flush=True)
