"""Every test leaves the process as it found it: a pytest plugin that compares, and names what differs.

A test that changes a thread count, a default dtype or an environment variable for good changes the results of
whichever test follows it in the process, and then the suite passes in one order only. The plugin takes a
snapshot before the set-up of a test and one after its teardown; a difference is an error of that test, and is
undone where that is possible. Python's warning filters are not compared: pytest restores them itself.

What cannot be compared is renewed instead: the global random generators are seeded by the test's id, and what
Dynamo compiled is dropped, because it recompiles a function only a limited number of times in a process.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import types
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

#: Packages whose functions and classes a test may replace only through ``monkeypatch``.
WATCHED_PACKAGES = ("benchmarks", "littlebit2", "littlebit2_kernels")

#: Variables and folders that pytest and libraries set for themselves, on first use and for good.
OWN_VARIABLES = (
    "PYTEST_CURRENT_TEST",
    "KINETO_LOG_LEVEL",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "TRITON_CACHE_DIR",
)
OWN_FOLDERS = ("torchinductor_", "_vendor")


@dataclass(frozen=True)
class Setting:
    """One process-wide setting: how it is read, and how it is set."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _attribute(holder: Any, name: str) -> Setting:
    return Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value))


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _autocast() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_cache_enabled(),
    )


def _set_autocast(value: tuple[Any, ...]) -> None:
    torch.set_autocast_enabled("cpu", value[0])
    torch.set_autocast_enabled("cuda", value[1])
    torch.set_autocast_cache_enabled(value[2])


def _flushes_denormals() -> bool:
    return bool(torch.tensor(1e-40, device="cpu") * 1.0 == 0)


def _import_folders() -> tuple[str, ...]:
    return tuple(folder for folder in sys.path if not Path(folder).name.startswith(OWN_FOLDERS))


def _grad_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _precision(backend: str, operation: str) -> Setting:
    return Setting(
        lambda: torch._C._get_fp32_precision_getter(backend, operation),
        lambda value: torch._C._set_fp32_precision_setter(backend, operation, value),
    )


#: What every process has.
SETTINGS: dict[str, Setting] = {
    "torch.get_num_threads()": Setting(torch.get_num_threads, torch.set_num_threads),
    "torch.get_default_dtype()": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch.get_default_device()": Setting(
        torch.get_default_device,
        lambda value: torch.set_default_device(None if value.type == "cpu" else value),
    ),
    "gradient and inference mode": Setting(_grad_mode, lambda value: torch.set_grad_enabled(value[0])),
    "autocast": Setting(_autocast, _set_autocast),
    "torch.is_anomaly_enabled()": Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "deterministic algorithms": Setting(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    "flushing of denormals": Setting(_flushes_denormals, torch.set_flush_denormal),
    # What torch.set_float32_matmul_precision sets; its own getter refuses values that one backend was given.
    **{
        f"fp32 precision of {backend}, {operation}": _precision(backend, operation)
        for backend in ("generic", "cuda", "mkldnn")
        for operation in (("all",) if backend == "generic" else ("all", "matmul", "conv", "rnn"))
    },
    **{
        f"torch.backends.cuda.matmul.{name}": _attribute(torch.backends.cuda.matmul, name)
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    },
    **{
        f"torch.backends.cudnn.{name}": _attribute(torch.backends.cudnn, name)
        for name in ("enabled", "benchmark", "deterministic")
    },
    "torch.backends.mkldnn.enabled": Setting(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "scaled_dot_product_attention kernels": Setting(
        lambda: (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        lambda value: (
            torch.backends.cuda.enable_flash_sdp(value[0]),
            torch.backends.cuda.enable_mem_efficient_sdp(value[1]),
            torch.backends.cuda.enable_math_sdp(value[2]),
        ),
    ),
    "current directory": Setting(os.getcwd, os.chdir),
    "sys.path": Setting(_import_folders, lambda value: sys.path.__setitem__(slice(None), value)),
    "sys.argv": Setting(lambda: tuple(sys.argv), lambda value: sys.argv.__setitem__(slice(None), value)),
    "sys.excepthook": _attribute(sys, "excepthook"),
    "garbage collection": Setting(gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "logging.disable()": Setting(lambda: logging.root.manager.disable, logging.disable),
    **{
        f"handler of {name}": Setting(
            lambda number=number: signal.getsignal(number),
            lambda value, number=number: signal.signal(number, value),
        )
        for name, number in (("SIGINT", signal.SIGINT), ("SIGTERM", signal.SIGTERM))
    },
}


def _loaded_settings() -> Iterator[tuple[str, Setting]]:
    """Settings of modules that only some tests load."""
    core = sys.modules.get("littlebit2_kernels._native.abi")
    if core is not None:
        yield "instruction set of the CPU kernels", Setting(core.cpu_isa, core.set_cpu_isa)
    auto = sys.modules.get("transformers.quantizers.auto")
    if auto is not None:
        for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            yield f"transformers' {name}", _mapping(getattr(auto, name))
    transformers_logging = sys.modules.get("transformers.utils.logging")
    if transformers_logging is not None:
        yield (
            "transformers' progress bars",
            Setting(
                transformers_logging.is_progress_bar_enabled,
                lambda value: (
                    transformers_logging.enable_progress_bar()
                    if value
                    else transformers_logging.disable_progress_bar()
                ),
            ),
        )
    if torch.distributed.is_available():
        yield (
            "torch.distributed's process group",
            Setting(
                torch.distributed.is_initialized,
                lambda value: None if value else torch.distributed.destroy_process_group(),
            ),
        )


def _mapping(held: dict[Any, Any]) -> Setting:
    """What transformers has registered, without our own entry: whatever loads a packed model adds it."""

    def refill(wanted: dict[Any, Any]) -> None:
        for name in [name for name in held if name != "littlebit2"]:
            del held[name]
        held.update(wanted)

    return Setting(lambda: {name: value for name, value in held.items() if name != "littlebit2"}, refill)


_LOGGERS = {*WATCHED_PACKAGES, "accelerate", "transformers"}


def _loggers() -> dict[str, tuple[Any, ...]]:
    """Level, propagation and handlers of the loggers that tests have reason to change."""
    found = {}
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _LOGGERS]
    for name in ("", *names):
        logger = logging.getLogger(name)
        # pytest's own handlers come and go with the phases of a test.
        handlers = [h for h in logger.handlers if not type(h).__module__.startswith("_pytest")]
        found[name or "root"] = (logger.level, logger.propagate, logger.disabled, tuple(handlers))
    return found


_DEFINITIONS = (types.FunctionType, types.ModuleType, type)


def _definitions() -> dict[str, tuple[types.ModuleType, dict[str, Any]]]:
    """What each module of ours holds: functions, classes and modules are compared, the rest is not."""
    return {
        name: (module, vars(module).copy())
        for name, module in list(sys.modules.items())
        if module is not None and name.partition(".")[0] in WATCHED_PACKAGES
    }


def _threads() -> Iterator[threading.Thread]:
    """Threads that keep a process from ending, without those of Inductor's pool."""
    pooled = "ThreadPoolExecutor" if "torch._inductor" in sys.modules else ()
    return (t for t in threading.enumerate() if not t.daemon and not t.name.startswith(pooled))


@dataclass(frozen=True)
class Snapshot:
    """The state of the process at one moment."""

    settings: dict[str, tuple[Setting, Any]]
    environment: dict[str, str]
    loggers: dict[str, tuple[Any, ...]]
    modules: dict[str, types.ModuleType]
    definitions: dict[str, tuple[types.ModuleType, dict[str, Any]]]
    threads: frozenset[threading.Thread]
    processes: frozenset[int | None]


def take() -> Snapshot:
    """Take a snapshot of this process."""
    settings = {**SETTINGS, **dict(_loaded_settings())}
    return Snapshot(
        settings={name: (setting, setting.get()) for name, setting in settings.items()},
        environment={name: text for name, text in os.environ.items() if not name.startswith(OWN_VARIABLES)},
        loggers=_loggers(),
        modules=dict(sys.modules),
        definitions=_definitions(),
        threads=frozenset(_threads()),
        processes=frozenset(process.pid for process in multiprocessing.active_children()),
    )


def undo(before: Snapshot, after: Snapshot) -> list[str]:
    """Say what ``after`` has changed from ``before``, and change it back where that is possible."""
    return [
        *_undo_settings(before, after),
        *_undo_environment(before, after),
        *_undo_loggers(before, after),
        *_undo_modules(before, after),
        *(f"thread {thread.name!r} still runs" for thread in after.threads - before.threads),
        *(f"process {number} still runs" for number in after.processes - before.processes),
    ]


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, tuple | dict) or len(old) == len(new):
        return f"{old!r} became {new!r}"
    gained, lost = [part for part in new if part not in old], [part for part in old if part not in new]
    return f"gained {gained}, lost {lost}"


def _undo_settings(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name, (setting, old) in before.settings.items():
        new = after.settings[name][1]
        if new != old:
            yield f"{name}: {_difference(old, new)}"
            setting.set(old)


def _undo_environment(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name in sorted({*before.environment, *after.environment}):
        old, new = (snapshot.environment.get(name) for snapshot in (before, after))
        if new != old:
            yield f"environment variable {name}: {old!r} became {new!r}"
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def _undo_loggers(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name, old in before.loggers.items():
        new = after.loggers[name]
        if new != old:
            yield f"logger {name}: (level, propagate, disabled, handlers) {old} became {new}"
            logger = logging.getLogger("" if name == "root" else name)
            logger.level, logger.propagate, logger.disabled = old[:3]


#: transformers executes itself again when it first documents a class, and the new module stays.
_REPLACES_ITSELF = ("transformers",)


def _undo_modules(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for name, module in before.modules.items():
        if name in _REPLACES_ITSELF and name in after.modules:
            continue
        if after.modules.get(name) is not module:
            yield f"sys.modules[{name!r}] was {'replaced' if name in after.modules else 'removed'}"
            sys.modules[name] = module
    for name, (module, definitions) in before.definitions.items():
        now = vars(module)
        for key, old in definitions.items():
            new = now.get(key, "(deleted)")
            # Dynamo keeps what it compiled under names of two underscores.
            if new is not old and isinstance(old, _DEFINITIONS) and key[:2] != "__":
                yield f"{name}.{key}: {old!r} became {new!r}"
                setattr(module, key, old)


def renew(seed: int) -> None:
    """Seed the global random generators, and drop what Dynamo has compiled."""
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 (the global generator is what is meant)
    torch.manual_seed(seed)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


_LATEST = pytest.StashKey[Snapshot]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Remember the state before fixtures are set up, those of a module or session included."""
    # What the test before left is compared already, and nothing runs in between.
    if _LATEST not in item.config.stash:
        item.config.stash[_LATEST] = take()
    renew(zlib.crc32(item.nodeid.encode()))
    yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fail the test if the process is not as it was."""
    yield
    before, after = item.config.stash[_LATEST], take()
    found = undo(before, after)
    if found:
        del item.config.stash[_LATEST]
        pytest.fail("the test left process-wide state changed:\n  " + "\n  ".join(found), pytrace=False)
    item.config.stash[_LATEST] = after
