"""Forcing instruction sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from littlebit2_kernels._native import core

AVAILABLE_ISAS = core().cpu_isas()


@pytest.fixture(params=("scalar", "avx2", "avx512", "avx512vnni", "neon", "amx"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each instruction set; a visible skip where this machine lacks one."""
    if request.param not in AVAILABLE_ISAS:
        pytest.skip(f"this CPU cannot run {request.param}")
    core().set_cpu_isa(request.param)
    yield request.param
    core().set_cpu_isa("auto")


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The available instruction sets, for tests that switch between them; reset afterwards."""
    yield AVAILABLE_ISAS
    core().set_cpu_isa("auto")
