"""Kernels compile for every kind of GPU, to the instructions that they are written for, and spill nothing.

What the kernels compute is shown by test_interpreter.py. One GPU of each maker is compiled for by default;
the others are slow tests. Triton keeps what it compiled under build/, so later runs compile what has changed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

if util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

#: Instructions that multiply, by target, for float16 and int8 operands and for bfloat16 gradients. Hopper's
#: take a register operand; Blackwell's have their sums in tensor memory, those for int8 from Triton 3.9 on.
DOT = {
    "sm_80": {"float16": "HMMA", "int8": "IMMA", "transposed": "HMMA"},
    "sm_90": {"float16": "HGMMA", "int8": "IGMMA", "transposed": "HMMA"},
    "sm_100": {"float16": "UTCHMMA", "int8": "(UTC)?IMMA", "transposed": "HMMA"},
    "gfx90a": {"float16": "v_mfma_f32", "int8": "v_mfma_i32", "transposed": "v_mfma_f32"},
    "gfx942": {"float16": "v_mfma_f32", "int8": "v_mfma_i32", "transposed": "v_mfma_f32"},
}

#: What ahead.py compiles: two stages by GEMV and GEMM, single stages in the other modes, with a gradient, and
#: small ranks, a pair of which takes one launch.
KERNELS = {
    "fused exact 1 rank 32",
    "gemv first exact 1 rank 32",
    "gemv last exact 1 rank 32",
    "gemv first exact 1 rank 80",
    "gemv last exact 1 rank 80",
    "gemv first exact 1",
    "gemv last exact 1",
    "operand float16 512",
    "gemm first float16 512",
    "gemm last float16 512",
    "operand xnor 1",
    "xnor last xnor 1",
    "operand int8 512",
    "gemm last int8 512",
    "transposed last 512",
}


#: Triton 3.9 holds the fused kernel to 128 registers on sm_90, and parks a value or two there (on gfx90a, of
#: the GEMV).
MOST_SPILLED = 4 if tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9) else 0

#: One of each maker.
COMMON = {"sm_90", "gfx942"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(target, marks=[] if target in COMMON else [pytest.mark.slow]) for target in DOT],
)
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    """A target, and what is known of each kernel that was compiled for it."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.ahead", request.param],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def count(kernel: dict[str, Any], name: str) -> int:
    return sum(number for found, number in kernel["counts"].items() if re.match(name, found))


def test_every_kernel_compiles_and_none_spills(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    assert {kernel["label"] for kernel in kernels} == KERNELS
    for kernel in kernels:
        assert sum(kernel["counts"].values()) > 50, f"{kernel['label']} on {target} is an empty kernel"
        assert kernel["spilled"] <= MOST_SPILLED, f"{kernel['label']} on {target} uses local memory"


def test_threads_and_registers(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    """The GEMV is planned in threads, the others in warps, which have 64 lanes on AMD's data-center GPUs."""
    target, kernels = compiled
    amd = target.startswith("gfx")
    for kernel in kernels:
        assert 16 <= kernel["registers"] <= (512 if amd else 255), kernel["label"]
        if kernel["label"].startswith("gemv"):
            assert kernel["threads"] == 128, f"{kernel['label']} on {target}"
        elif not kernel["label"].startswith("fused"):
            assert kernel["threads"] == (256 if amd else 128), f"{kernel['label']} on {target}"


def test_products_use_the_matrix_units(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    for kernel in kernels:
        if kernel["label"].startswith("gemm"):
            kind = kernel["label"].split()[2]
            assert count(kernel, DOT[target][kind]) > 0, f"{kernel['label']} on {target}"
        if kernel["label"].startswith("transposed"):
            assert count(kernel, DOT[target]["transposed"]) > 0, kernel["label"]


def test_counts_of_bits_are_single_instructions(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    for kernel in kernels:
        if kernel["label"].startswith("xnor"):
            assert count(kernel, "v_bcnt_u32" if target.startswith("gfx") else "POPC") > 0, kernel["label"]


def test_signs_are_loaded_by_16_bytes(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    for kernel in kernels:
        # The GEMM takes its signs 4 or 8 bytes at a time on AMD's GPUs, and so does a small tile anywhere.
        amd = target.startswith("gfx")
        names = ("gemv", "fused", "xnor") if amd else ("gemv", "fused", "xnor", "gemm", "transposed")
        if kernel["label"].startswith(names) and not kernel["label"].startswith("gemv last exact 1 rank"):
            assert kernel["wide_loads"], f"{kernel['label']} on {target}"


def test_bits_of_the_gemv_stay_within_a_thread(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    """Whatever the ranks are: Triton puts the bits of a word across lanes where threads outnumber words."""
    target, kernels = compiled
    looked_at = [kernel for kernel in kernels if kernel["label"].startswith(("gemv", "fused"))]
    assert len(looked_at) == 7
    for kernel in looked_at:
        sums = [text for text in kernel["sums"] if text.startswith("axis 2 of 32")]
        assert sums
        for text in sums:
            assert text.endswith("threadsPerWarp 1, warpsPerCTA 1"), f"{kernel['label']} on {target}: {text}"
        assert count(kernel, "SHFL") <= 16, f"{kernel['label']} on {target}"


def test_one_launch_adds_in_the_order_of_two(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    sums = {kernel["label"]: kernel["sums"] for kernel in kernels}
    first, last = (sums[f"gemv {stage} exact 1 rank 32"] for stage in ("first", "last"))
    assert len(first) == 2
    assert len(set(last)) == 2

    def without_warps(texts: list[str]) -> list[str]:
        # Rows go to more warps, not the words of a row.
        return list(dict.fromkeys(re.sub(r", warpsPerCTA 1$", "", text) for text in texts))

    assert without_warps(sums["fused exact 1 rank 32"]) == without_warps([*first, *last]), target


def test_a_sign_accumulate_of_the_gemv_takes_three_instructions(
    compiled: tuple[str, list[dict[str, Any]]],
) -> None:
    target, kernels = compiled
    if target.startswith("gfx"):
        pytest.skip("counted in NVIDIA's machine code")
    (kernel,) = [kernel for kernel in kernels if kernel["label"] == "gemv last exact 1"]
    # 64 rows of 16 words by 128 threads: 256 signs each, and overhead. Blackwell adds two at a time.
    for names in ("FADD", "LOP3", "SHF|IMAD"):
        least = 128 if (target, names) == ("sm_100", "FADD") else 256
        assert least <= count(kernel, names) <= 360, names
    assert count(kernel, "SHFL") <= 16, "bits lie across lanes: the compiler chose another layout"


def test_expanding_signs_takes_three_instructions_for_two(compiled: tuple[str, list[dict[str, Any]]]) -> None:
    target, kernels = compiled
    if target != "sm_90":
        pytest.skip("counted in Hopper's machine code")
    (kernel,) = [kernel for kernel in kernels if kernel["label"] == "gemm first float16 512"]
    # 64 rows and 256 columns by 128 threads: 64 pairs of signs each, a shift and two LOP3, or from Triton 3.9
    # on one that takes the mask from a register.
    assert 60 <= kernel["expanding"] <= 136
    assert count(kernel, "SHF|IMAD") >= 60
    assert count(kernel, "HGMMA") == 16
