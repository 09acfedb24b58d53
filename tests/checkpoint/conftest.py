"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def nprng(rng: torch.Generator) -> np.random.Generator:
    """A numpy generator with the test's own seed."""
    return np.random.default_rng(rng.initial_seed())
