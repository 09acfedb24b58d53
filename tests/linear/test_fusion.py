"""``fuse_linears``: layers that go together are computed together, and never with other results."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from littlebit2_kernels import (
    LinearGroup,
    LittleBitLinear,
    fuse_linears,
    littlebit_linear,
    unfuse_linears,
)
from littlebit2_kernels.ops import calls as operator_calls
from littlebit2_kernels.testing import make_packed

K = 100


class Projections(torch.nn.Module):
    def __init__(self, rng: torch.Generator, single_stage: bool = False) -> None:
        super().__init__()
        for name, size, ranks in (("q", 70, [40]), ("k", 33, [16, 24]), ("v", 10, [8])):
            packed = make_packed(K, size, None if single_stage else ranks, bias=name != "k", generator=rng)
            setattr(self, name, LittleBitLinear.from_packed(packed))

    @property
    def layers(self) -> list[LittleBitLinear]:
        return [self.q, self.k, self.v]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.fixture(params=[False, True], ids=["two-stage", "single-stage"])
def model(request: pytest.FixtureRequest, rng: torch.Generator) -> Projections:
    return Projections(rng, request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers of the grouped calls."""
    seen: list[int] = []
    for name in ("grouped_linear_prepacked", "grouped_linear"):
        inner: Callable[..., Any] = getattr(operator_calls, name)

        def record(x: Any, layers: Any, *rest: Any, inner: Callable[..., Any] = inner) -> Any:
            seen.append(len(layers))
            return inner(x, layers, *rest)

        monkeypatch.setattr(operator_calls, name, record)
    return seen


def _alone(model: Projections, x: torch.Tensor) -> list[torch.Tensor]:
    """What the layers give on their own."""
    return [
        LittleBitLinear.from_packed(layer.packed, activation=layer.activation)(x) for layer in model.layers
    ]


def _same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_one_call_with_the_same_results(
    model: Projections, rng: torch.Generator, calls: list[int], dtype: torch.dtype, inference: bool
) -> None:
    group = fuse_linears(model.layers, on_cpu=True)
    with torch.inference_mode(inference):
        model(torch.zeros(1, K))  # prepacks
        calls.clear()
        for tokens in (0, 1, 6):
            x = torch.randn(tokens, K, generator=rng).to(dtype)
            assert _same(model(x), _alone(model, x))
    assert calls == [3, 3, 3]
    assert group.together


def test_the_order_of_calls_is_free(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    calls.clear()
    x = torch.randn(2, K, generator=rng)
    assert _same([model.v(x), model.q(x), model.k(x)], [_alone(model, x)[i] for i in (2, 0, 1)])
    assert calls == [3]


def test_not_on_the_cpu_unless_asked_for(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    fuse_linears(model.layers)
    x = torch.randn(2, K, generator=rng)
    for _ in range(2):
        assert _same(model(x), _alone(model, x))
    assert calls == []


def test_different_inputs_are_noticed(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    """As in cross-attention: at most one call is in vain, then layers go alone until they go together."""
    group = fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    calls.clear()
    for _ in range(3):
        a, b = torch.randn(2, K, generator=rng), torch.randn(2, K, generator=rng)
        alone = _alone(model, a)[:1] + _alone(model, b)[1:]
        assert _same([model.q(a), model.k(b), model.v(b)], alone)
    assert calls == [3]
    assert not group.together
    for _ in range(3):
        x = torch.randn(2, K, generator=rng)
        assert _same(model(x), _alone(model, x))
    assert calls == [3, 3, 3]
    assert group.together


def test_the_same_layer_twice(model: Projections, rng: torch.Generator) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    x = torch.randn(2, K, generator=rng)
    q = _alone(model, x)[0]
    assert all(torch.equal(model.q(x), q) for _ in range(4))
    assert _same(model(x), _alone(model, x))


def test_input_changed_in_place(model: Projections, rng: torch.Generator) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    x = torch.randn(2, K, generator=rng)
    for _ in range(2):
        before = _alone(model, x)
        q = model.q(x)
        x.mul_(3)
        assert _same([q, model.k(x), model.v(x)], before[:1] + _alone(model, x)[1:])


def test_gradients_and_autocast_are_the_layers_own(
    model: Projections, rng: torch.Generator, calls: list[int]
) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    calls.clear()
    x = torch.randn(2, K, generator=rng).requires_grad_()
    gradient = torch.autograd.grad(sum(y.sum() for y in model(x)), x)[0]
    alone = torch.autograd.grad(sum(y.sum() for y in _alone(model, x)), x)[0]
    torch.testing.assert_close(gradient, alone)
    with torch.autocast("cpu", torch.bfloat16):
        assert [y.dtype for y in model(x.detach())] == [torch.bfloat16] * 3
    assert calls == []
    with torch.no_grad():
        assert _same(model(x), _alone(model, x))
    assert calls == [3]


def test_layers_of_several_kinds_go_alone(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    group = fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    calls.clear()
    x = torch.randn(2, K, generator=rng)
    model.k.activation = "int8"
    assert _same(model(x), _alone(model, x))
    model.k.activation = "auto"
    model.v.unpack_()
    model.v.auto_prepack = False
    assert _same(model(x), [*_alone(model, x)[:2], littlebit_linear(x, model.v.packed)])
    assert calls == []
    assert group.together
    model.v.prepack_()
    assert _same(model(x), _alone(model, x))
    assert calls == [3]


def test_new_weights_are_used(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    fuse_linears(model.layers, on_cpu=True)
    x = torch.randn(2, K, generator=rng)
    model(x)
    other = Projections(rng, model.q.shape.single_stage)
    model.load_state_dict(other.state_dict())
    model(x)
    calls.clear()
    assert _same(model(x), _alone(other, x))
    assert calls == [3]


def test_bad_input_is_the_layers_to_refuse(model: Projections, rng: torch.Generator) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    for bad, error in (
        (torch.zeros(2, K + 1), ValueError),
        (torch.zeros(2, K).double(), TypeError),
        (3, TypeError),
    ):
        with pytest.raises(error, match="x"):
            model.q(bad)
    model.q.activation = model.k.activation = model.v.activation = "int7"
    with pytest.raises(ValueError, match="activation must be one of"):
        model.q(torch.zeros(2, K))


def test_state_dict_copies_and_pickles(model: Projections, rng: torch.Generator) -> None:
    x = torch.randn(2, K, generator=rng)
    names = list(model.state_dict())
    fuse_linears(model.layers, on_cpu=True)
    expected = model(x)
    assert list(model.state_dict()) == names
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(layer._group is None for layer in other.layers)
        assert _same(other(x), expected)
    # One layer does not bring the others along.
    size = io.BytesIO()
    torch.save(model.v, size)
    assert size.tell() < file.getbuffer().nbytes / 2
    assert all(layer._group is not None for layer in model.layers)


def test_compile_makes_one_call_and_few_graphs(model: Projections, rng: torch.Generator) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: model(x * 2), backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (6, 3, 2, 5):
            x = torch.randn(tokens, K, generator=rng)
            assert _same(compiled(x), _alone(model, x * 2))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes if "littlebit2" in str(node.target)]
    assert targets == ["littlebit2.grouped_linear_prepacked"]


def test_compile_with_different_inputs_settles(model: Projections, rng: torch.Generator) -> None:
    group = fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda a, b: [model.q(a), model.k(b), model.v(b)], backend=counter, fullgraph=True
    )
    with torch.no_grad():
        for _ in range(6):
            a, b = torch.randn(2, K, generator=rng), torch.randn(2, K, generator=rng)
            assert _same(compiled(a, b), _alone(model, a)[:1] + _alone(model, b)[1:])
    assert counter.frame_count <= 2
    assert not group.together


def test_threads_get_their_own_results(model: Projections, rng: torch.Generator) -> None:
    fuse_linears(model.layers, on_cpu=True)
    model(torch.zeros(1, K))
    inputs = [torch.randn(2, K, generator=rng) for _ in range(4)]
    expected = [_alone(model, x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        wrong.extend(index for _ in range(200) if not _same(model(inputs[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_kept_once_all_have_been_called(model: Projections) -> None:
    group = fuse_linears(model.layers, on_cpu=True)
    for _ in range(2):
        model(torch.zeros(1, K))
        assert group._pending is None
        assert group._seen is None


def test_fusing_again_and_unfusing(model: Projections, rng: torch.Generator, calls: list[int]) -> None:
    first = fuse_linears(model.layers, on_cpu=True)
    second = fuse_linears(model.layers[:2], on_cpu=True)
    assert model.v._group is None
    assert model.q._group is second
    assert first is not second
    x = torch.randn(2, K, generator=rng)
    model(x)
    calls.clear()
    assert _same(model(x), _alone(model, x))
    assert calls == [2]
    unfuse_linears([model.q])
    assert model.k._group is None
    assert _same(model(x), _alone(model, x))
    assert calls == [2]


def test_bad_modules(rng: torch.Generator) -> None:
    layer, other = (LittleBitLinear.from_packed(make_packed(K, 8, [8], generator=rng)) for _ in range(2))
    wide = LittleBitLinear.from_packed(make_packed(K + 1, 8, [8], generator=rng))
    single = LittleBitLinear.from_packed(make_packed(K, 8, None, generator=rng))
    with pytest.raises(TypeError, match="modules must be LittleBitLinear, got Linear"):
        fuse_linears([layer, torch.nn.Linear(K, 8)])
    with pytest.raises(ValueError, match="two or more different layers, got 1"):
        fuse_linears([layer])
    with pytest.raises(ValueError, match="two or more different layers"):
        fuse_linears([layer, other, layer])
    with pytest.raises(ValueError, match=r"same in_features, got \[100, 101\]"):
        fuse_linears([layer, wide])
    with pytest.raises(ValueError, match=r"same number of stages, got \[2, 1\]"):
        fuse_linears([layer, single])
    assert isinstance(fuse_linears([layer, other]), LinearGroup)


def test_results_are_not_kept_for_another_gradient_mode(rng: torch.Generator) -> None:
    model = Projections(rng)
    for layer in model.layers:
        layer.prepack_()
    fuse_linears(model.layers, on_cpu=True)
    bias = model.v.bias
    assert bias is not None
    bias.requires_grad_(True)
    x = torch.randn(2, K, generator=rng)
    with torch.no_grad():
        model.q(x)
    assert model.v(x).requires_grad
    with torch.inference_mode():
        model.q(x)
    assert not model.k(x).is_inference()


def test_a_replica_is_no_member_of_the_group(rng: torch.Generator) -> None:
    model = Projections(rng)
    fuse_linears(model.layers, on_cpu=True)
    x = torch.randn(2, K, generator=rng)
    expected = model.q(x)
    replica = model.q._replicate_for_data_parallel()
    assert torch.equal(replica(x), expected)


def test_fused_layers_take_meta_tensors(rng: torch.Generator) -> None:
    model = Projections(rng).to("meta")
    fuse_linears(model.layers)
    shapes = [y.shape for y in model(torch.empty(2, K, device="meta"))]
    assert shapes == [(2, 70), (2, 33), (2, 10)]
