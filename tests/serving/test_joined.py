"""``JoinedLinear``: the layers' results side by side, eager and compiled once for every number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from littlebit2_kernels import JoinedLinear, PackedLinear, littlebit_linear, prepack, warmup
from littlebit2_kernels.serving import operator
from littlebit2_kernels.testing import make_packed
from tests.problems import GROUPS

K = 100
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=GROUPS)
def layers(request: pytest.FixtureRequest, rng: torch.Generator) -> list[PackedLinear]:
    return [make_packed(K, generator=rng, **options) for options in GROUPS[request.param]]


def _alone(x: torch.Tensor, layers: list[PackedLinear], prepacks: bool, activation: str) -> torch.Tensor:
    kinds = [prepack(layer) if prepacks else layer for layer in layers]
    return torch.cat([littlebit_linear(x, layer, activation=activation) for layer in kinds], dim=-1)


@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_layers_one_by_one(
    layers: list[PackedLinear], dtype: torch.dtype, prepacks: bool, rng: torch.Generator
) -> None:
    module = JoinedLinear(layers, prepacks=prepacks)
    assert module.prepacked is prepacks
    for shape in ((0, K), (1, K), (40, K), (K,), (2, 3, K)):
        x = torch.randn(shape, generator=rng).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        assert torch.equal(y, _alone(x, layers, prepacks, "auto"))
    transposed = torch.randn(K, 5, generator=rng).to(dtype).t()
    assert torch.equal(module(transposed), _alone(transposed, layers, prepacks, "auto"))
    pitched = torch.randn(5, K + 7, generator=rng).to(dtype)[:, :K]
    assert torch.equal(module(pitched), _alone(pitched, layers, prepacks, "auto"))


@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_output_dtype(
    layers: list[PackedLinear], dtype: torch.dtype, prepacks: bool, rng: torch.Generator
) -> None:
    x = torch.randn(6, K, generator=rng).to(dtype)
    short = "int16" if prepacks else "exact"
    wide = JoinedLinear(layers, out_dtype=torch.float32, prepacks=prepacks)(x)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, _alone(x.float(), layers, prepacks, short))
    narrow = JoinedLinear(layers, out_dtype=dtype, prepacks=prepacks)(x.float())
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
def test_one_graph_for_every_number_of_tokens(
    layers: list[PackedLinear], prepacks: bool, rng: torch.Generator
) -> None:
    module = JoinedLinear(layers, prepacks=prepacks)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: module(x * 2) + 1, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (7, 1, 130, 2):
        x = torch.randn(tokens, K, generator=rng)
        assert torch.equal(compiled(x), module(x * 2) + 1)
    # A single token is a size of its own to torch.compile unless it is marked as dynamic.
    assert len(graphs) <= 2
    calls = [node for node in graphs[0].graph.nodes if "littlebit2" in str(node.target)]
    assert len(calls) == 1


def test_the_backend_is_chosen_inside(
    layers: list[PackedLinear], rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: the choice goes by the number of tokens of the call, not by those of the trace.
    module = JoinedLinear(layers, prepacks=False)
    seen = []
    choose = operator.choose_for_group

    def by_tokens(x: torch.Tensor, shapes: Any, backend: str, activation: str, prepacked: bool) -> Any:
        seen.append(len(x))
        assert list(shapes) == list(module.shapes)
        return choose(x, shapes, "reference" if len(x) > 16 else backend, activation, prepacked)

    monkeypatch.setattr(operator, "choose_for_group", by_tokens)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (4, 40, 5):
        x = torch.randn(tokens, K, generator=rng)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), module(x))
    assert seen == [4, 4, 40, 40, 5, 5]


def test_inductor(rng: torch.Generator) -> None:
    layers = [make_packed(K, generator=rng, **options) for options in GROUPS["qkv"]]
    for prepacks in (True, False):
        module = JoinedLinear(layers, prepacks=prepacks)
        model = torch.nn.Sequential(torch.nn.ReLU(), module, torch.nn.Hardtanh())
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for tokens in (3, 50):
            x = torch.randn(tokens, K, generator=rng)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
def test_gradient_of_x(layers: list[PackedLinear], prepacks: bool, rng: torch.Generator) -> None:
    module = JoinedLinear(layers, prepacks=prepacks, activation="exact")
    x = torch.randn(4, K, generator=rng).requires_grad_()
    weights = torch.randn(4, module.out_features, generator=rng)
    got, wanted = (
        torch.autograd.grad((y * weights).sum(), x)[0]
        for y in (module(x), _alone(x, layers, prepacks, "exact"))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("prepacks", [True, False], ids=["prepacked", "portable"])
def test_opcheck(layers: list[PackedLinear], prepacks: bool, rng: torch.Generator) -> None:
    module = JoinedLinear(layers, prepacks=prepacks)
    x = torch.randn(5, K, generator=rng).requires_grad_()
    if prepacks:
        arguments = (module._tensors(0), module._tensors(1), module._sizes)
        torch.library.opcheck(torch.ops.littlebit2.joined_linear_prepacked.default, (x, *arguments))
        return
    lists = [module._tensors(index) for index in range(6)]
    torch.library.opcheck(torch.ops.littlebit2.joined_linear.default, (x, *lists, module._paths))
    auto = (*lists, module._paths, module._shares, "auto", "auto")
    torch.library.opcheck(torch.ops.littlebit2.joined_linear_auto.default, (x, *auto))


@pytest.mark.parametrize("backend", ["blas", "reference"])
def test_other_backends(layers: list[PackedLinear], backend: str, rng: torch.Generator) -> None:
    module = JoinedLinear(layers, backend=backend)
    assert not module.prepacked
    x = torch.randn(3, K, generator=rng)
    torch.testing.assert_close(module(x), _alone(x, layers, False, "exact"), rtol=1e-5, atol=1e-4)


def test_holds_no_state_and_keeps_dtypes(layers: list[PackedLinear], rng: torch.Generator) -> None:
    x = torch.randn(3, K, generator=rng)
    for prepacks in (True, False):
        module = JoinedLinear(layers, prepacks=prepacks)
        before = module(x)
        assert not module.state_dict()
        assert not list(module.parameters())
        assert torch.equal(module.half()(x), before)
        if prepacks:
            with pytest.raises(ValueError, match="prepacked layers must stay on the CPU, got meta"):
                module.to("meta")


def test_shared_first_stages_are_held_once(rng: torch.Generator) -> None:
    packed = make_packed(K, 20, [24, 24], share_v=True, generator=rng)
    module = JoinedLinear([packed], prepacks=False)
    assert len(list(module.buffers())) == len(packed.unique_tensors())
    assert module.shapes[0].shares == (0, 0)


def test_warmup_runs_it(layers: list[PackedLinear]) -> None:
    module = JoinedLinear(layers)
    assert warmup(module, torch.float32, tokens=(1, 3)) == 2


def test_refuses(rng: torch.Generator) -> None:
    two, other = (make_packed(cols, 8, [8], generator=rng) for cols in (K, 64))
    single = make_packed(K, 8, None, generator=rng)
    for layers, error, message in (
        ([], ValueError, "at least one layer"),
        (two, TypeError, "layers must be a sequence of PackedLinear, got PackedLinear"),
        ([two, "x"], TypeError, r"layers\[1\] must be a PackedLinear, got str"),
        ([two, other], ValueError, r"same in_features, got \[100, 64\]"),
    ):
        with pytest.raises(error, match=message):
            JoinedLinear(layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all single-stage or all two-stage"):
        JoinedLinear([two, single], prepacks=False)
    assert JoinedLinear([two, single]).out_features == 16
    for options, error, message in (
        ({"out_dtype": torch.float64}, TypeError, "out_dtype must be float32, float16 or bfloat16"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"activation": "int4"}, ValueError, "activation must be one of"),
        ({"activation": "int8", "prepacks": False}, ValueError, "needs a prepacked layer"),
    ):
        with pytest.raises(error, match=message):
            JoinedLinear([two], **options)  # type: ignore[arg-type]
    module = JoinedLinear([two], out_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"x\.size\(-1\) must equal K=100, got shape \[2, 99\]"):
        module(torch.zeros(2, 99))
    with pytest.raises(ValueError, match=r"x must be torch\.float16 like out_dtype or float32"):
        module(torch.zeros(2, K, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="prepacked layers are the CPU's, got backend='cuda'"):
        module.call(torch.zeros(2, K), backend="cuda")
