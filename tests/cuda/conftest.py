"""What the tests on a GPU run on."""

from __future__ import annotations

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels.dispatch import unavailable_reason


@pytest.fixture
def device(requires_cuda: torch.device) -> torch.device:
    """A GPU that the kernels run on. Where the package has none for it, that is a failure, not a skip."""
    assert unavailable_reason("cuda", "cuda") is None
    littlebit2_kernels.load("cuda")
    return requires_cuda
