"""Smoke test of a built operator library under whatever torch runs this file; see torch_abi.sh."""

from __future__ import annotations

import torch

import littlebit2_kernels
from littlebit2_kernels import LittleBitLinear, littlebit_linear
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_problem, relative_error

littlebit2_kernels.load()
for ranks, options in (
    ([40], {}),
    ([40, 16], {"bias": True}),
    ([24, 24], {"share_v": True}),
    (None, {"bias": True}),
):
    for dtype, tolerance in TOLERANCE.items():
        x, packed = make_problem(5, 100, 70, ranks, dtype=dtype, **options)
        assert relative_error(littlebit_linear(x, packed), linear_reference(x, packed)) <= tolerance
    x = x.float().requires_grad_()
    littlebit_linear(x, packed).sum().backward()
    assert relative_error(x.grad, torch.ones(5, 70, dtype=torch.float64) @ dense_weight(packed)) <= 2e-6
    x = x.detach()
    torch.library.opcheck(
        torch.ops.littlebit2.linear.default, (x.clone().requires_grad_(), *packed.operands, packed.bias)
    )
    module = LittleBitLinear.from_packed(packed)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    assert torch.equal(compiled(x[:3]), module(x[:3]))
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=1, max=64)},))
    assert torch.equal(exported.module()(x[:2]), module(x[:2]))
refusal = ""
try:
    littlebit_linear(torch.ones(2, 99), packed)
except ValueError as error:
    refusal = str(error)
assert "x.size(-1) must equal K=100" in refusal
print(f"torch {torch.__version__}: the operator library works")
