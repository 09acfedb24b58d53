"""Gradients through the Triton operators, and what torch checks of registered operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from littlebit2_kernels import PackedLinear, littlebit_linear
from littlebit2_kernels.reference import dense_weight
from littlebit2_kernels.testing import TOLERANCE, make_problem, relative_error, typical_norm
from littlebit2_kernels.triton.backend import interpreting
from tests.problems import scaled_down, with_word_layout

DTYPES = tuple(TOLERANCE)
LAYERS: dict[str, dict[str, Any]] = {
    "two-paths": {"ranks": [40, 16], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    options = dict(LAYERS[request.param])
    return make_problem(5, 50, 40, options.pop("ranks"), generator=rng, **options)


def operators() -> Any:
    from littlebit2_kernels.triton import ops

    return ops


def lists(packed: PackedLinear) -> tuple[list[torch.Tensor], ...]:
    return tuple(tensors or [] for tensors in packed.operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_x(
    device: torch.device, problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator, dtype: torch.dtype
) -> None:
    x, packed = problem
    packed = scaled_down(with_word_layout(packed, "pitched"))
    for mode in ("exact", "sign"):  # gradients are those of exact sums in every mode
        leaf = x.detach().clone().to(device, dtype).requires_grad_()
        weight = torch.randn(5, 40, generator=rng).to(dtype)
        y = littlebit_linear(leaf, packed.to(device), backend="triton", activation=mode)
        y.backward(weight.to(device))
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        error = relative_error(
            leaf.grad.cpu(),
            weight.double() @ dense_weight(packed),
            typical_norm(weight, packed, backward=True),
        )
        assert error <= TOLERANCE[dtype] + (2e-5 if dtype != torch.float32 else 0.0)


@pytest.mark.parametrize("shape", [(1, 31, 1, 8), (33, 65, 33, 72), (34, 130, 7, 136)], ids=str)
def test_gradient_at_odd_shapes(
    device: torch.device, rng: torch.Generator, shape: tuple[int, int, int, int]
) -> None:
    tokens, k, n, rank = shape
    _, packed = make_problem(1, k, n, [rank, 16, 8, 8, 8], generator=rng)
    grad = torch.randn(n, tokens, generator=rng).T  # not contiguous
    got = operators().triton_linear_backward_x(grad.to(device), *lists(packed.to(device)))
    truth = grad.double() @ dense_weight(packed)
    assert relative_error(got.cpu(), truth, typical_norm(grad, packed, backward=True)) <= 2e-6
    blocks_of_tokens_are_independent = operators().triton_linear_backward_x(
        grad[-1:].to(device), *lists(packed.to(device))
    )
    assert torch.equal(blocks_of_tokens_are_independent[0], got[-1])
    empty = operators().triton_linear_backward_x(grad[:0].to(device), *lists(packed.to(device)))
    assert empty.shape == (0, k)


def test_gradient_of_bias(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(3, 40, 30, [8], generator=rng)
    packed = packed.to(device)
    bias = torch.zeros(30, device=device, requires_grad=True)
    operators().linear(x.half().to(device), lists(packed), bias, "float16").sum().backward()
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))


def test_second_and_forward_derivatives(
    device: torch.device, problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator
) -> None:
    x, packed = problem
    on_device, dense = packed.to(device), dense_weight(packed)
    leaf = x.to(device).requires_grad_()
    y = littlebit_linear(leaf, on_device, backend="triton")
    (first,) = torch.autograd.grad(y.square().sum() / 2, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    expected = torch.ones(5, 50, dtype=torch.float64) @ dense.T @ dense
    assert relative_error(second.cpu(), expected, float(dense.norm() * dense.sum(1).norm())) <= 4e-6
    tangent = torch.randn(5, 50, generator=rng)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.to(device), tangent.to(device))
        result = forward_ad.unpack_dual(littlebit_linear(dual, on_device, backend="triton")).tangent
    assert result is not None
    assert relative_error(result.cpu(), tangent.double() @ dense.T) <= 4e-6


def test_gradients_of_scales_are_refused(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], generator=rng)
    packed = packed.to(device)
    packed.paths[0].out_scale.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"out_scale\[0\] requires a gradient, but packed layers are frozen"
    ):
        littlebit_linear(x.to(device).requires_grad_(), packed, backend="triton")


def test_no_gradient_is_tracked_where_none_is_wanted(
    device: torch.device, problem: tuple[torch.Tensor, PackedLinear]
) -> None:
    x, packed = problem[0].to(device), problem[1].to(device)
    assert not littlebit_linear(x, packed, backend="triton").requires_grad
    with torch.inference_mode():
        assert littlebit_linear(x, packed, backend="triton").is_inference()
    assert littlebit_linear(x.requires_grad_(), packed, backend="triton").requires_grad


def test_operators_launch_on_the_device_of_their_tensors(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch calls them on whichever device is the current one, which may be another."""
    ops = operators()
    entered = []
    on_device = ops.on_device
    monkeypatch.setattr(ops, "on_device", lambda device: entered.append(device) or on_device(device))
    x, packed = make_problem(2, 40, 30, [8], generator=rng)
    x, packed = x.to(device), packed.to(device)
    for count, tokens in ((1, x), (3, x.clone().requires_grad_())):
        y = littlebit_linear(tokens, packed, backend="triton")
        if tokens.requires_grad:
            y.sum().backward()
        assert entered == [device] * count


def test_opcheck(device: torch.device, problem: tuple[torch.Tensor, PackedLinear]) -> None:
    ops, dtype = operators(), torch.bfloat16
    x, packed = problem[0].to(device, dtype).requires_grad_(), problem[1].to(device)
    # Tracing wants compiled kernels, which the interpreter's are not.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreting():
        tests.append("test_aot_dispatch_dynamic")
    arguments = (x, *lists(packed), packed.bias, "int8")
    torch.library.opcheck(ops.triton_linear, arguments, test_utils=tests)
    arguments = (x.detach()[:4].reshape(2, 2, 50), *lists(packed), None, "auto")
    torch.library.opcheck(ops.triton_linear, arguments, test_utils=tests)
    grad = torch.ones(5, 40, device=device, dtype=dtype).requires_grad_()
    torch.library.opcheck(ops.triton_linear_backward_x, (grad, *lists(packed)), test_utils=tests)
