"""The plugin that compares the process before and after a test sees each kind of change, and undoes it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from littlebit2_kernels import testing
from littlebit2_kernels._native import core
from tests.harness import process_state

CHANGES: dict[str, Callable[[], object]] = {
    "torch.get_num_threads()": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch.get_default_dtype()": lambda: torch.set_default_dtype(torch.float64),
    "torch.get_default_device()": lambda: torch.set_default_device("meta"),
    "gradient and inference mode": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "torch.is_anomaly_enabled()": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "flushing of denormals": lambda: torch.set_flush_denormal(True),
    "fp32 precision of cuda, matmul": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32 precision of mkldnn, matmul": lambda: setattr(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": lambda: setattr(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False
    ),
    "torch.backends.cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch.backends.mkldnn.enabled": lambda: torch._C._set_mkldnn_enabled(False),
    "scaled_dot_product_attention kernels": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "current directory": lambda: os.chdir(Path.cwd().parent),
    "sys.path": lambda: sys.path.append("elsewhere"),
    "sys.argv": lambda: sys.argv.append("--more"),
    "sys.excepthook": lambda: setattr(sys, "excepthook", print),
    "garbage collection": gc.disable,
    "logging.disable()": lambda: logging.disable(logging.ERROR),
    "handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "instruction set of the CPU kernels": lambda: core().set_cpu_isa(
        "scalar" if core().cpu_isa() != "scalar" else core().cpu_isas()[-1]
    ),
    "environment variable LB2_NEW": lambda: os.environ.setdefault("LB2_NEW", "1"),
    "environment variable PATH": lambda: os.environ.pop("PATH"),
    "logger root": lambda: logging.getLogger().setLevel(logging.CRITICAL),
    "logger littlebit2": lambda: logging.getLogger("littlebit2").setLevel(logging.DEBUG),
    "sys.modules['littlebit2_kernels.testing']": lambda: sys.modules.pop("littlebit2_kernels.testing"),
    "littlebit2_kernels.testing.relative_error": lambda: setattr(testing, "relative_error", print),
}


@pytest.mark.parametrize("named", CHANGES)
def test_a_change_is_named_and_undone(named: str) -> None:
    logging.getLogger("littlebit2")
    core()
    before = process_state.take()
    try:
        CHANGES[named]()
    finally:
        found = process_state.undo(before, process_state.take())
    assert found
    assert found[0].startswith(named)
    assert process_state.undo(before, process_state.take()) == []


def test_every_setting_has_a_change() -> None:
    """Settings that differ in their value only are tried once each kind."""
    settings = {
        name for name in process_state.SETTINGS if not name.startswith(("fp32 precision", "torch.backends"))
    }
    assert settings - set(CHANGES) == {"handler of SIGINT"}


def test_registrations_in_transformers_are_seen() -> None:
    auto = pytest.importorskip("transformers.quantizers.auto")
    before = process_state.take()
    auto.AUTO_QUANTIZER_MAPPING["lb2-test"] = object
    assert "AUTO_QUANTIZER_MAPPING" in "".join(process_state.undo(before, process_state.take()))
    assert "lb2-test" not in auto.AUTO_QUANTIZER_MAPPING


def test_threads_and_processes_that_still_run_are_seen() -> None:
    before = process_state.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-over", daemon=False)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    thread.start()
    process.start()
    found = process_state.undo(before, process_state.take())
    stop.set()
    process.kill()
    thread.join()
    process.join()
    assert found == ["thread 'left-over' still runs", f"process {process.pid} still runs"]
    assert process_state.undo(before, process_state.take()) == []


def test_nothing_is_found_where_nothing_changed() -> None:
    before = process_state.take()
    assert sys.modules["littlebit2_kernels.testing"] is testing
    assert process_state.undo(before, process_state.take()) == []


def test_random_numbers_do_not_depend_on_earlier_tests() -> None:
    drawn = []
    for _ in range(2):
        process_state.renew(5)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


def test_compiled_functions_do_not_count_for_later_tests() -> None:
    """A function that is compiled once for each test never reaches Dynamo's limit of recompilations."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    for size in range(torch._dynamo.config.recompile_limit + 2):
        process_state.renew(0)
        compiled = torch.compile(double, fullgraph=True, dynamic=False, backend="eager")
        assert torch.equal(compiled(torch.ones(size)), 2 * torch.ones(size))


def test_a_test_that_leaves_a_change_fails(request: pytest.FixtureRequest) -> None:
    item = types.SimpleNamespace(
        config=types.SimpleNamespace(stash=pytest.Stash()), nodeid=request.node.nodeid
    )
    list(process_state.pytest_runtest_setup(item))
    list(process_state.pytest_runtest_teardown(item))
    list(process_state.pytest_runtest_setup(item))
    os.environ["LB2_LEFT"] = "behind"
    with pytest.raises(pytest.fail.Exception, match="environment variable LB2_LEFT: None became 'behind'"):
        list(process_state.pytest_runtest_teardown(item))
    assert "LB2_LEFT" not in os.environ
