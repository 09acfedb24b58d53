"""The prepacked operators under torch's own machinery: opcheck, compile, export, autograd, meta."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

import littlebit2_kernels
from littlebit2_kernels import PackedLinear, PrepackedLinear, littlebit_linear, prepack
from littlebit2_kernels.dispatch import ACTIVATIONS
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_problem, relative_error

LAYERS = {
    "one-path": {"ranks": [40]},
    "two-paths": {"ranks": [40, 16], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}
MODES = ("exact", "int16", "int8", "sign")

Problem = tuple[torch.Tensor, PackedLinear, PrepackedLinear]


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> Problem:
    options = dict(LAYERS[request.param])
    x, packed = make_problem(5, 100, 70, options.pop("ranks"), generator=rng, **options)
    return x, packed, prepack(packed)


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck(problem: Problem, dtype: torch.dtype) -> None:
    x, packed, prepacked = problem
    x = x.to(dtype).requires_grad_()
    linear = torch.ops.littlebit2.linear_prepacked.default
    bias = None if packed.bias is None else packed.bias.clone().requires_grad_()
    torch.library.opcheck(linear, (x, prepacked.layer, bias, 70, 0))
    torch.library.opcheck(linear, (x.detach().reshape(5, 1, 100), prepacked.layer, None, 70))
    grad = torch.randn(5, 70).to(dtype).requires_grad_()
    backward = torch.ops.littlebit2.linear_prepacked_backward_x.default
    torch.library.opcheck(backward, (grad, prepacked.layer, 100))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_every_mode(mode: str, rng: torch.Generator) -> None:
    x, packed = make_problem(5, 100, 70, [40], bias=True, generator=rng)
    arguments = (x.requires_grad_(), prepack(packed).layer, packed.bias, 70, ACTIVATIONS[mode])
    torch.library.opcheck(torch.ops.littlebit2.linear_prepacked.default, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_exact_sums(problem: Problem, mode: str, rng: torch.Generator) -> None:
    x, packed, prepacked = problem
    weight = torch.randn(5, 70, generator=rng)
    gradients = []
    for layer, activation in ((packed, "exact"), (prepacked, mode)):
        leaf = x.clone().requires_grad_()
        littlebit_linear(leaf, layer, activation=activation).backward(weight)
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert relative_error(gradients[1], weight.double() @ dense_weight(packed)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_keep_the_dtype(problem: Problem, dtype: torch.dtype) -> None:
    x, packed, prepacked = problem
    gradients = []
    for layer in (packed, prepacked):
        leaf = x.to(dtype).requires_grad_()
        y = littlebit_linear(leaf, layer)
        y.backward(torch.ones_like(y))
        gradients.append(leaf.grad)
    assert gradients[1].dtype == dtype
    assert torch.equal(gradients[0], gradients[1])


def test_gradient_of_the_bias(rng: torch.Generator) -> None:
    x, packed = make_problem(6, 100, 70, [40], generator=rng)
    layer, weight = prepack(packed).layer, torch.randn(2, 3, 70, generator=rng)
    for bias in (torch.ones(70), torch.ones(1, 70)):
        bias.requires_grad_()
        # x needs none: only the bias is differentiated.
        y = torch.ops.littlebit2.linear_prepacked(x.reshape(2, 3, 100), layer, bias, 70, 1)
        y.backward(weight)
        assert bias.grad is not None
        assert bias.grad.shape == bias.shape
        assert torch.allclose(bias.grad.flatten(), weight.sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_second_derivative(problem: Problem, mode: str) -> None:
    x, packed, prepacked = problem
    leaf = x.clone().requires_grad_()
    weight = torch.ones(5, 70, requires_grad=True)
    y = littlebit_linear(leaf, prepacked, activation=mode)
    (first,) = torch.autograd.grad(y, leaf, weight, create_graph=True)
    # first is linear in weight: its gradient is the layer without bias, with exact sums.
    direction = x.flip(0)
    (second,) = torch.autograd.grad(first, weight, direction)
    bare = PackedLinear(packed.paths)
    assert relative_error(second, linear_reference(direction, bare)) <= 2e-6


def test_no_gradient_is_tracked_where_none_is_wanted(problem: Problem) -> None:
    x, _, prepacked = problem
    assert not littlebit_linear(x, prepacked).requires_grad
    with torch.no_grad():
        assert not littlebit_linear(x.requires_grad_(), prepacked).requires_grad
    with torch.inference_mode():
        assert littlebit_linear(x.detach(), prepacked).is_inference()
    assert littlebit_linear(x, prepacked).requires_grad


def test_a_layer_made_in_inference_mode(problem: Problem) -> None:
    x, packed, prepacked = problem
    with torch.inference_mode():
        inside = prepack(packed)
    assert torch.equal(littlebit_linear(x, inside), littlebit_linear(x, prepacked))
    assert torch.equal(inside.unpack().paths[0].v, packed.paths[0].v)


@pytest.mark.parametrize("mode", MODES)
def test_forward_mode_derivative_is_that_of_exact_sums(problem: Problem, mode: str) -> None:
    x, packed, prepacked = problem
    direction = x.flip(0)
    with forward_ad.dual_level():
        dual = littlebit_linear(forward_ad.make_dual(x, direction), prepacked, activation=mode)
        primal, tangent = forward_ad.unpack_dual(dual)
        primal, tangent = primal.clone(), tangent.clone()
    assert torch.equal(primal, littlebit_linear(x, prepacked, activation=mode))
    assert relative_error(tangent, linear_reference(direction, PackedLinear(packed.paths))) <= 2e-6


def test_meta_and_fake_tensors(problem: Problem) -> None:
    x, _, prepacked = problem
    linear = torch.ops.littlebit2.linear_prepacked
    layer = prepacked.layer.to("meta")
    y = linear(x.reshape(1, 5, 100).to("meta").half(), layer, None, 70)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (1, 5, 70), torch.float16)
    back = torch.ops.littlebit2.linear_prepacked_backward_x(y, layer, 100)
    assert (back.device.type, back.shape, back.dtype) == ("meta", (1, 5, 100), torch.float16)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = littlebit_linear(mode.from_tensor(x), prepacked)
        assert (fake.shape, fake.dtype) == ((5, 70), torch.float32)


def test_vector_and_empty_inputs(problem: Problem) -> None:
    x, _, prepacked = problem
    for mode in MODES:
        rows = littlebit_linear(x, prepacked, activation=mode)
        assert torch.equal(littlebit_linear(x[0], prepacked, activation=mode), rows[0])
        assert littlebit_linear(x[:0], prepacked, activation=mode).shape == (0, 70)
        assert littlebit_linear(x.new_empty(2, 0, 3, 100), prepacked, activation=mode).shape == (2, 0, 3, 70)
    leaf = x.new_empty(0, 100).requires_grad_()
    littlebit_linear(leaf, prepacked).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 100)


def test_reference_backend_is_the_reference(problem: Problem) -> None:
    x, packed, prepacked = problem
    for activation in ("auto", "exact"):
        y = littlebit_linear(x, prepacked, backend="reference", activation=activation)
        assert torch.equal(y, linear_reference(x, packed, torch.float32))


def test_compile_fullgraph_dynamic(problem: Problem) -> None:
    x, _, prepacked = problem
    torch._dynamo.reset()
    for mode in ("auto", "int8"):
        compiled = torch.compile(
            lambda a, mode=mode: littlebit_linear(a * 2, prepacked, activation=mode) + 1,
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for tokens in (5, 3, 2, 5):
            expected = littlebit_linear(x[:tokens] * 2, prepacked, activation=mode) + 1
            assert torch.equal(compiled(x[:tokens]), expected)


def test_inductor_and_its_gradient(rng: torch.Generator) -> None:
    x, packed = make_problem(5, 100, 70, [40, 16], bias=True, generator=rng)
    prepacked = prepack(packed)
    torch._dynamo.reset()

    def loss(a: torch.Tensor) -> torch.Tensor:
        return littlebit_linear(a, prepacked).square().sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, dynamic=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


class Holder(torch.nn.Module):
    def __init__(self, prepacked: PrepackedLinear) -> None:
        super().__init__()
        self.register_buffer("layer", prepacked.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.littlebit2.linear_prepacked(x, self.layer, None, 70, 2)


def test_export_round_trip(problem: Problem) -> None:
    x, _, prepacked = problem
    module = Holder(prepacked)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x[:3]), module(x[:3]))


def test_calls_from_many_threads(problem: Problem) -> None:
    """Calls of different sizes and modes, each thread with scratch memory of its own."""
    x, _, prepacked = problem
    many = x.repeat(30, 1)
    wrong: list[int] = []

    def work(index: int) -> None:
        mode = MODES[index % len(MODES)]
        for tokens in (1, 5, 150, 2) * 20:
            y = littlebit_linear(many[:tokens], prepacked, activation=mode)
            if not torch.equal(y, expected[mode][:tokens]):
                wrong.append(index)

    expected = {mode: littlebit_linear(many, prepacked, activation=mode) for mode in MODES}
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layout", ["packed", "prepacked"])
def test_forward_mode_derivative_of_the_bias(rng: torch.Generator, layout: str) -> None:
    x, packed = make_problem(3, 64, 24, [16], bias=True, generator=rng)
    direction, of_bias = torch.randn(3, 64, generator=rng), torch.randn(24, generator=rng)
    with forward_ad.dual_level():
        assert packed.bias is not None
        layer = PackedLinear(packed.paths, forward_ad.make_dual(packed.bias, of_bias))
        whole = layer if layout == "packed" else replace(prepack(packed), bias=layer.bias)
        for moved in (False, True):
            given = forward_ad.make_dual(x, direction) if moved else x
            tangent = forward_ad.unpack_dual(littlebit_linear(given, whole)).tangent.clone()
            expected = of_bias.expand(3, 24).double()
            if moved:
                expected = expected + linear_reference(direction, PackedLinear(packed.paths))
            assert relative_error(tangent, expected) <= 2e-6
