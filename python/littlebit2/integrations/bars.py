"""The progress bars of transformers, kept out of logs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

__all__ = ["no_bars_in_logs"]


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Turn the library's progress bars off, where stderr is no terminal, for as long as this lasts."""
    off = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if off:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if off:
            logging.enable_progress_bar()
