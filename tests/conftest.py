"""Fixtures and settings that all tests share."""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Generator

import hypothesis
import pytest
import torch

from tests.harness import cpu_seconds, process_state

# Shared machines stall for long moments: a time limit per example would only make tests flaky.
hypothesis.settings.register_profile("littlebit2", deadline=None, print_blob=True)
hypothesis.settings.load_profile("littlebit2")

#: The files that take longest come first, so that no process is left alone with one of them.
_LONGEST = (
    "tests/kernels/test_cuda_build.py",
    "tests/triton/test_interpreter.py",
    "tests/project/test_readme.py",
    "tests/train/test_processes.py",
    "tests/triton/test_ahead.py",
    "tests/ops/test_operators.py",
    "tests/offline/test_kill.py",
    "tests/offline/test_memory.py",
    "tests/cli/test_cli.py",
    "tests/train/test_kill.py",
    "tests/kernels/test_prepacked_sweep.py",
    "tests/kernels/test_prepacked_guarantees.py",
)

_SEED_VARIABLE = "LB2_TEST_SEED"
_SEED = pytest.StashKey[int]()

#: Where Inductor keeps what it compiled. The one that a user's processes share may hold code for other
#: vectors: its keys do not contain ATEN_CPU_CAPABILITY, and such code computes garbage.
_INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_CACHE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugins of the suite."""
    pluginmanager.register(process_state, "process-state")
    pluginmanager.register(cpu_seconds, "cpu-seconds")


def pytest_configure(config: pytest.Config) -> None:
    """Fix the session's base seed: 0, the value of LB2_TEST_SEED, or a fresh one for ``random``."""
    text = os.environ.get(_SEED_VARIABLE, "0")
    if text != "random" and not text.isdecimal():
        raise pytest.UsageError(f"{_SEED_VARIABLE} must be a non-negative integer or 'random', got {text!r}")
    config.stash[_SEED] = secrets.randbits(32) if text == "random" else int(text)
    if _INDUCTOR_CACHE not in os.environ:
        # One for all processes of the session, which inherit it.
        config.stash[_CACHE] = os.environ[_INDUCTOR_CACHE] = tempfile.mkdtemp(prefix="littlebit2-inductor-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's cache of compiled graphs."""
    cache = config.stash.get(_CACHE, None)
    if cache is not None:
        os.environ.pop(_INDUCTOR_CACHE, None)
        shutil.rmtree(cache, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by :data:`_LONGEST`, and leave the others as they are."""
    order = {path: index for index, path in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the imports made: it would look through all of it in every test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say in a failure's report how to get the same random inputs again."""
    report = yield
    if report.failed and "rng" in getattr(item, "fixturenames", ()):
        report.sections.append(("random inputs", f"repeat with {_SEED_VARIABLE}={item.config.stash[_SEED]}"))
    return report


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator seeded by the test's own id, so tests neither share nor disturb each other's inputs."""
    seed = f"{request.config.stash[_SEED]}:{request.node.nodeid}"
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))


@pytest.fixture
def requires_cuda() -> torch.device:
    """The CUDA device, or a visible skip where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a CUDA build of torch")
    return torch.device("cuda", torch.cuda.current_device())
