"""The operators under torch's own machinery: opcheck, compile, export, AOTInductor, autograd, meta."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import LittleBitLinear, PackedLinear, littlebit_linear
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_problem, relative_error

LAYERS = {
    "one-path": {"ranks": [40]},
    "two-paths": {"ranks": [40, 16], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    options = dict(LAYERS[request.param])
    return make_problem(5, 100, 70, options.pop("ranks"), generator=rng, **options)


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16],
    ids=str,
)
def test_opcheck(problem: tuple[torch.Tensor, PackedLinear], dtype: torch.dtype) -> None:
    x, packed = problem
    x = x.to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.littlebit2.linear.default, (x, *packed.operands, packed.bias))
    torch.library.opcheck(
        torch.ops.littlebit2.linear.default, (x.detach().reshape(5, 1, 100), *packed.operands)
    )
    for bias in (packed.bias, None):
        torch.library.opcheck(torch.ops.littlebit2.linear.default, (x, *packed.operands, bias, 1))
    grad = torch.randn(5, 70).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.littlebit2.linear_backward_x.default, (grad, *packed.operands))


def test_compile_fullgraph_dynamic(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: littlebit_linear(a * 2, packed) + 1, fullgraph=True, dynamic=True)
    for tokens in (5, 3, 2, 5):
        assert torch.equal(compiled(x[:tokens]), littlebit_linear(x[:tokens] * 2, packed) + 1)


def test_compiled_module_and_its_gradient(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    torch._dynamo.reset()
    module = LittleBitLinear.from_packed(packed)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    gradients = []
    for call in (module, compiled):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_export_round_trip(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    module = LittleBitLinear.from_packed(packed)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    # What was traced before the first eager call holds the portable tensors.
    assert torch.equal(loaded(x[:3]), littlebit_linear(x[:3], packed))


@pytest.mark.parametrize("name", ["two-paths", pytest.param("single-stage", marks=pytest.mark.slow)])
def test_aot_inductor_round_trip(name: str, rng: torch.Generator, tmp_path: Path) -> None:
    options = dict(LAYERS[name])
    x, packed = make_problem(5, 100, 70, options.pop("ranks"), generator=rng, **options)
    module = LittleBitLinear.from_packed(packed)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    # What was traced before the first eager call holds the portable tensors.
    assert torch.equal(loaded(x[:3]), littlebit_linear(x[:3], packed))


def test_gradient_of_x_and_bias(problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator) -> None:
    x, packed = problem
    x.requires_grad_()
    weight = torch.randn(5, 70, generator=rng)
    bias = packed.bias.clone().requires_grad_() if packed.bias is not None else None
    y = torch.ops.littlebit2.linear(x, *packed.operands, bias)
    y.backward(weight)
    assert relative_error(x.grad, weight.double() @ dense_weight(packed)) <= 2e-6
    if bias is not None:
        assert torch.allclose(bias.grad, weight.sum(0))


@pytest.mark.parametrize("given", [("bias",), ("bias", "activation"), ("activation",), ()], ids=str)
def test_gradients_whatever_is_left_at_its_default(given: tuple[str, ...], rng: torch.Generator) -> None:
    """The dispatcher drops arguments that equal their defaults before autograd counts them."""
    x, packed = make_problem(5, 100, 70, [24, 8], bias=True, generator=rng)
    x.requires_grad_()
    bias = packed.bias.clone().requires_grad_() if "bias" in given else None
    arguments = (bias, 1) if "activation" in given else (bias,) if given else ()
    torch.ops.littlebit2.linear(x, *packed.operands, *arguments).sum().backward()
    assert relative_error(x.grad, torch.ones(5, 70).double() @ dense_weight(packed)) <= 2e-6
    if bias is not None:
        assert torch.equal(bias.grad, torch.full((70,), 5.0))


def test_second_derivative(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    x.requires_grad_()
    (first,) = torch.autograd.grad(littlebit_linear(x, packed).square().sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    dense = dense_weight(packed)
    expected = torch.ones(5, 100, dtype=torch.float64) @ dense.T @ dense
    scale = float(dense.norm() * dense.sum(1).norm())
    assert relative_error(second, expected, scale) <= 4e-6


def test_gradients_of_scales_are_refused(rng: torch.Generator) -> None:
    x, packed = make_problem(2, 40, 30, [8], generator=rng)
    packed.paths[0].out_scale.requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"out_scale\[0\] requires a gradient, but packed layers are frozen"
    ):
        littlebit_linear(x.requires_grad_(), packed)


def test_no_gradient_is_tracked_where_none_is_wanted(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    assert not littlebit_linear(x, packed).requires_grad
    with torch.no_grad():
        assert not littlebit_linear(x.requires_grad_(), packed).requires_grad
    with torch.inference_mode():
        assert littlebit_linear(x.detach(), packed).is_inference()
    assert littlebit_linear(x, packed).requires_grad


def test_meta_tensors(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    y = littlebit_linear(x.reshape(1, 5, 100).to("meta"), packed.to("meta"))
    assert y.is_meta
    assert y.shape == (1, 5, 70)


def test_one_operand_on_the_meta_device_is_refused(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    v, u, in_scale, latent_scale, out_scale = packed.operands
    strayed = [out_scale[0].to("meta"), *out_scale[1:]]
    with pytest.raises(RuntimeError, match="x and the layer must be on one device, got cpu and meta"):
        torch.ops.littlebit2.linear(x, v, u, in_scale, latent_scale, strayed)
    with pytest.raises(RuntimeError, match="grad and the layer must be on one device, got meta and cpu"):
        torch.ops.littlebit2.linear_backward_x(torch.ones(2, 70, device="meta"), *packed.operands)


def test_vector_and_empty_inputs(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    assert torch.equal(littlebit_linear(x[0], packed), littlebit_linear(x, packed)[0])
    assert littlebit_linear(x[:0], packed).shape == (0, 70)
    assert littlebit_linear(x.new_empty(2, 0, 3, 100), packed).shape == (2, 0, 3, 70)


def test_reference_backend_is_the_reference(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    y = littlebit_linear(x, packed, backend="reference")
    assert torch.equal(y, linear_reference(x, packed, torch.float32))


def test_calls_from_many_threads(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    expected = littlebit_linear(x, packed)
    wrong: list[int] = []

    def work(index: int) -> None:
        if not all(torch.equal(littlebit_linear(x, packed), expected) for _ in range(200)):
            wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_first_calls_from_many_threads() -> None:
    script = """
import sys, threading, warnings, torch
sys.setswitchinterval(1e-6)
from littlebit2_kernels import littlebit_linear
from littlebit2_kernels.testing import make_problem
warnings.simplefilter("error")
x, packed = make_problem(3, 40, 30, [8])
barrier, failures = threading.Barrier(8), []
def work():
    barrier.wait()
    try:
        littlebit_linear(x, packed)
    except Exception as error:
        failures.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_compile_in_a_process_that_has_loaded_nothing() -> None:
    script = """
import torch
from littlebit2_kernels import littlebit_linear
from littlebit2_kernels.testing import make_problem
x, packed = make_problem(3, 40, 30, [8])
y = torch.compile(lambda a: littlebit_linear(a, packed), fullgraph=True, backend="aot_eager")(x)
assert torch.equal(y, littlebit_linear(x, packed))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
