"""The dtype of products in tuning is that which is measured to be faster, where the hardware has both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from littlebit2.blockwise.tuning import precision
from littlebit2.blockwise.tuning.precision import resolve_precision

CPU = torch.device("cpu")
BOTH = {"avx512_bf16": True, "amx_bf16": False}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[torch.dtype, float]]:
    """A clock by which a product takes the seconds of its dtype."""
    seconds = {torch.float32: 1.0, torch.bfloat16: 1.0}
    now = 0.0
    ones = torch.ones

    def made(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        nonlocal now
        now += seconds[dtype] / 2  # two factors to a product, made before its clock starts
        return ones(shape, dtype=dtype)

    class Timed(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal now
            if function is torch.Tensor.matmul or function is torch.Tensor.__matmul__:
                now += seconds[args[0].dtype]
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch, "ones", made)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    precision._is_bfloat16_faster.cache_clear()
    with Timed():
        yield seconds
    precision._is_bfloat16_faster.cache_clear()


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.5, "bfloat16"), (0.9, "float32"), (2.0, "float32")])
def test_the_faster_one_is_taken(
    bfloat16: float, expected: str, clock: dict[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BOTH)
    clock[torch.bfloat16] = bfloat16
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("wish", ["float32", "bfloat16"])
def test_a_wish_is_not_measured(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_is_bfloat16_faster", None)
    assert resolve_precision(wish, CPU) == wish  # type: ignore[arg-type]


def test_a_cpu_that_emulates_bfloat16_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(precision, "_is_bfloat16_faster", None)
    assert resolve_precision("auto", CPU) == "float32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_is_asked(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_other_threads_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BOTH)
    asked = []
    monkeypatch.setattr(precision, "_is_bfloat16_faster", lambda threads: asked.append(threads) or True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    resolve_precision("auto", CPU)
    assert asked == [3]
