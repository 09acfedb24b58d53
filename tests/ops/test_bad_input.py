"""Every refusal names the argument, what was expected and what was got."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import BackendUnavailableError, explain, littlebit_linear
from littlebit2_kernels.testing import make_packed, make_problem


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (
            torch.ones(2, 40, dtype=torch.float64),
            TypeError,
            "x must be float32, float16 or bfloat16, got torch.float64",
        ),
        (
            torch.ones(2, 40, dtype=torch.int32),
            TypeError,
            "x must be float32, float16 or bfloat16, got torch.int32",
        ),
        (torch.ones(2, 39), ValueError, r"x.size\(-1\) must equal K=40, got shape \[2, 39\]"),
        (torch.tensor(1.0), ValueError, r"x.size\(-1\) must equal K=40, got shape \[\]"),
        (torch.ones(2, 40, device="meta"), ValueError, "x must be on cpu like the packed layer, got meta"),
    ],
    ids=["list", "float64", "int32", "K", "0-d", "device"],
)
def test_bad_x(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        littlebit_linear(x, make_packed(40, 30, [8]))


def test_bad_layer_and_backend() -> None:
    x, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(TypeError, match="packed must be a PackedLinear or a PrepackedLinear, got Tensor"):
        littlebit_linear(x, x)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="backend must be one of auto, cpu, cuda, triton, blas, reference, got 'tpu'"
    ):
        littlebit_linear(x, packed, backend="tpu")
    with pytest.raises(
        BackendUnavailableError,
        match=r"backend='triton' cannot run: (it runs on tensors of a GPU .*not on cpu|triton is not)",
    ):
        littlebit_linear(x, packed, backend="triton")
    with pytest.raises(
        BackendUnavailableError, match="backend='cuda' cannot run: it runs on CUDA tensors, not on cpu"
    ):
        littlebit_linear(x, packed, backend="cuda")


def spoil(name: str, index: int, value: Any) -> list[Any]:
    names = ("x", "v", "u", "in_scale", "latent_scale", "out_scale", "bias")
    x, packed = make_problem(2, 40, 30, [8, 16], bias=True)
    arguments: list[Any] = [x, *[list(o) for o in packed.operands], packed.bias]
    position = names.index(name)
    if isinstance(arguments[position], list) and index >= 0:
        arguments[position][index] = value
    else:
        arguments[position] = value
    return arguments


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        (
            "x",
            0,
            torch.ones(2, 40, dtype=torch.float64),
            "x must be float32, float16 or bfloat16, got Double",
        ),
        ("x", 0, torch.ones(2, 41), r"x.size\(-1\) must equal 40, got shape \[2, 41\]"),
        ("x", 0, torch.tensor(1.0), r"x.size\(-1\) must equal 40, got shape \[\]"),
        ("v", -1, [], "v must hold between 1 and 16 tensors, got 0"),
        ("v", 1, torch.zeros(16, 2), r"v\[1\] must be int32 words, got Float"),
        ("v", 1, torch.zeros(16, 3, dtype=torch.int32), r"v\[1\] must have shape \[16, 2\] .* got \[16, 3\]"),
        ("v", 0, torch.zeros(2, 8, dtype=torch.int32).T, r"v\[0\] must have contiguous rows"),
        ("v", 0, torch.zeros(16, dtype=torch.int32), r"v\[0\] must be two-dimensional, got \[16\]"),
        ("u", 1, torch.zeros(29, 1, dtype=torch.int32), r"u\[1\] must have shape \[30, 1\] .* got \[29, 1\]"),
        ("u", -1, [torch.zeros(30, 1, dtype=torch.int32)], r"u must hold one tensor per path \(2\), got 1"),
        ("u", -1, None, "latent_scale must be given exactly when u is"),
        ("in_scale", 1, torch.ones(39), r"in_scale\[1\] must have shape \[40\] or \[1, 40\], got \[39\]"),
        ("in_scale", 0, torch.ones(40, dtype=torch.float16), r"in_scale\[0\] must be float32, got Half"),
        ("in_scale", 0, torch.ones(2, 20), r"in_scale\[0\] must have shape \[K\] or \[1, K\], got \[2, 20\]"),
        ("in_scale", 0, torch.ones(0), r"in_scale\[0\] must not be empty"),
        (
            "latent_scale",
            0,
            torch.ones(16),
            r"latent_scale\[0\] must have shape \[8\] or \[1, 8\], got \[16\]",
        ),
        ("out_scale", 0, torch.ones(60)[::2], r"out_scale\[0\] must be contiguous"),
        ("out_scale", 1, torch.ones(31), r"out_scale\[1\] must have shape \[30\] or \[1, 30\], got \[31\]"),
        ("bias", 0, torch.ones(30, dtype=torch.bfloat16), "bias must be float32, got BFloat16"),
        ("bias", 0, torch.ones(1), r"bias must have shape \[30\] or \[1, 30\], got \[1\]"),
    ],
)
def test_operator_refuses(name: str, index: int, value: Any, message: str) -> None:
    littlebit2_kernels.load()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.linear(*spoil(name, index, value))


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (
            2,
            r"must be 0 \(auto\) or 1 \(exact\) for packed words on the CPU, got 2, which needs a prepacked",
        ),
        (4, r"must be .* for packed words on the CPU, got 4, which needs a prepacked layer"),
        (5, r"must be .* for packed words on the CPU, got 5, which CUDA alone serves"),
        (6, "must be between 0 and 5, got 6"),
        (-1, "must be between 0 and 5, got -1"),
        (2**32, "must be between 0 and 5, got 4294967296"),
    ],
)
def test_operator_refuses_activation(activation: int, message: str) -> None:
    littlebit2_kernels.load()
    x, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(RuntimeError, match=f"activation {message}"):
        torch.ops.littlebit2.linear(x, *packed.operands, packed.bias, activation)


def test_backward_operator_refuses() -> None:
    littlebit2_kernels.load()
    _, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(RuntimeError, match=r"grad.size\(-1\) must equal 30, got shape \[2, 40\]"):
        torch.ops.littlebit2.linear_backward_x(torch.ones(2, 40), *packed.operands)


def test_rank_that_is_no_multiple_of_eight() -> None:
    words, scales = torch.zeros(12, 2, dtype=torch.int32), torch.ones(12)
    u = torch.zeros(30, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"paths\[0\].rank must be a multiple of 8, got 12"):
        torch.ops.littlebit2.linear(
            torch.ones(1, 40), [words], [u], [torch.ones(40)], [scales], [torch.ones(30)]
        )


def test_rank_zero() -> None:
    words, u = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(30, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"paths\[0\].rank must be between 1 and 2147483647, got 0"):
        torch.ops.littlebit2.linear(
            torch.ones(1, 40), [words], [u], [torch.ones(40)], [torch.ones(0)], [torch.ones(30)]
        )


def test_too_many_paths() -> None:
    x, packed = make_problem(1, 40, 30, [8])
    operands = [operand * 17 for operand in packed.operands]
    with pytest.raises(RuntimeError, match="v must hold between 1 and 16 tensors, got 17"):
        torch.ops.littlebit2.linear(x, *operands)


def test_too_many_tokens() -> None:
    _, packed = make_problem(1, 1, 30, [8])
    with pytest.raises(RuntimeError, match="m must be between 0 and 2147483647, got 2147483648"):
        littlebit_linear(torch.ones(1, 1).expand(2**31, 1), packed)


def test_fakes_refuse_a_wrong_last_dimension() -> None:
    _, packed = make_problem(2, 40, 30, [8])
    littlebit2_kernels.load()
    with pytest.raises(RuntimeError, match=r"x.size\(-1\) must equal 40"):
        torch.ops.littlebit2.linear(torch.ones(2, 41, device="meta"), *packed.to("meta").operands)


def test_explain_refuses_what_the_call_refuses() -> None:
    packed = make_packed(40, 30, [8])
    with pytest.raises(ValueError, match=r"x.size\(-1\) must equal K=40, got shape \[2, 41\]"):
        explain((2, 41), packed)
    with pytest.raises(ValueError, match="backend must be one of"):
        explain((2, 40), packed, backend="tpu")
    with pytest.raises(BackendUnavailableError, match="it runs on CUDA tensors, not on cpu"):
        explain((2, 40), packed, backend="cuda")
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16, got"):
        explain(torch.ones(2, 40).long(), packed)
    for shape in ((-3, 40), (2**70, 40)):
        with pytest.raises(ValueError, match="x must have between 0 and 2147483647 tokens, got shape"):
            explain(shape, packed, backend="reference")


def test_explain_says_what_will_happen() -> None:
    packed = make_packed(40, 30, [16, 16], share_v=True)
    plan = explain(torch.ones(3, 2, 40), packed)
    assert (plan.backend, plan.tokens, plan.first_stages) == ("cpu", 6, 1)
    assert plan.macs == 6 * (16 * 40 + 2 * 16 * 30)
    assert plan.packed_bytes == packed.nbytes
    assert plan.isa in ("scalar", "avx2", "avx512", "avx512vnni", "neon", "amx")
    assert "token_block" in str(plan)
    reference = explain((6, 40), packed, backend="reference")
    assert (reference.backend, reference.isa) == ("reference", None)
