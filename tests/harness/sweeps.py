"""Sweeps over random problems: a sample by default, the rest as slow tests."""

from __future__ import annotations

import pytest


def cases(number: int, sample: int) -> pytest.MarkDecorator:
    """Run a test with each ``case`` of range(number), all but the first ``sample`` as slow tests."""
    marked = [pytest.param(case, marks=() if case < sample else pytest.mark.slow) for case in range(number)]
    return pytest.mark.parametrize("case", marked)
