"""``torch.compile`` sees through the operators: launches in one graph, no breaks, no copies.

Nothing runs: the tensors are on the meta device, and a stand-in driver names a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear, littlebit_linear
from littlebit2_kernels.testing import make_problem
from littlebit2_kernels.triton_backend import interpreting

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="compiled kernels only"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="on a GPU, test_compiled.py runs what is compiled here"
    ),
]


@pytest.fixture(autouse=True)
def _driver() -> Iterator[None]:
    from tests.triton.ahead import TARGETS, StandInDriver

    triton.runtime.driver.set_active(StandInDriver(TARGETS["sm_90"][0]))
    yield
    triton.runtime.driver._active = None


class Capture:
    """A backend that keeps the graphs after decomposition and runs none of them."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def backend(self) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(
            fw_compiler=self._compiler(self.forward), bw_compiler=self._compiler(self.backward)
        )

    def _compiler(self, graphs: list[torch.fx.GraphModule]) -> Any:
        from functorch.compile import make_boxed_func

        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
            metas = [None if output is None else output.meta["val"] for output in outputs]

            def run(*arguments: Any) -> list[Any]:
                return [None if meta is None else stand_in(meta) for meta in metas]

            return make_boxed_func(run)

        return compiler


def stand_in(meta: Any) -> Any:
    """Something of the dtype of an output; sizes that are symbols are not looked at any more."""
    if not isinstance(meta, torch.Tensor):
        return 1
    sizes = [size if isinstance(size, int) else 1 for size in meta.shape]
    return torch.empty(sizes, dtype=meta.dtype, device="meta")


def launches(graph: torch.fx.GraphModule) -> list[str]:
    """Names of the kernels that a graph launches, in order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return [
        kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__.removesuffix("_kernel")
        for node in graph.graph.nodes
        if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
    ]


def problem(rng: torch.Generator, **options: Any) -> PackedLinear:
    return make_problem(1, 256, 70, options.pop("ranks", [40, 24]), bias=True, generator=rng, **options)[
        1
    ].to("meta")


def test_one_graph_for_each_kernel_whatever_the_number_of_tokens(rng: torch.Generator) -> None:
    packed, capture = problem(rng), Capture()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: littlebit_linear(a * 2, packed, backend="triton") + 1,
        fullgraph=True,
        dynamic=True,
        backend=capture.backend(),
    )
    for tokens in (6, 9, 13, 2, 3, 4):
        compiled(torch.empty(tokens, 256, dtype=torch.float16, device="meta"))
    assert [launches(graph) for graph in capture.forward] == [["operand", "gemm"] * 2, ["gemv"] * 2]
    for graph in capture.forward:
        targets = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        assert not [name for name in targets if "littlebit2" in name]
        # Only what was asked for comes back: no input is taken to be written.
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        assert len(outputs) == 1


@pytest.mark.parametrize("mode", ["exact", "float16", "int8", "sign"])
def test_a_compiled_module_and_its_gradient(rng: torch.Generator, mode: str) -> None:
    capture = Capture()
    module = LittleBitLinear.from_packed(problem(rng), backend="triton", activation=mode)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=capture.backend())
    x = torch.empty(7, 256, device="meta", requires_grad=True)
    compiled(x).sum().backward()
    kernel = "xnor" if mode == "sign" else "gemm"
    assert [launches(graph) for graph in capture.forward] == [["operand", kernel] * 2]
    assert [launches(graph) for graph in capture.backward] == [["transposed"] * 2]


def test_shared_first_stages_stay_shared(rng: torch.Generator) -> None:
    capture = Capture()
    packed = problem(rng, ranks=[24, 24], share_v=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: littlebit_linear(a, packed, backend="triton"), fullgraph=True, backend=capture.backend()
    )
    compiled(torch.empty(1, 256, device="meta"))
    (graph,) = capture.forward
    widths = [
        node.meta["val"].shape[-1]
        for node in graph.graph.nodes
        if node.target is torch.ops.aten.new_empty.default and node.meta["val"].dim() == 3
    ]
    assert widths == [24]


def test_export(rng: torch.Generator) -> None:
    module = LittleBitLinear.from_packed(problem(rng), backend="triton", activation="float16")
    tokens = torch.export.Dim("tokens", min=17, max=32)
    x = torch.empty(20, 256, dtype=torch.float16, device="meta")
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    assert torch.ops.littlebit2.triton_linear.default in {node.target for node in program.graph.nodes}
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    assert output.args[0][0].meta["val"].shape[1] == 70


def test_fakes_tell_shapes_without_launching(rng: torch.Generator) -> None:
    packed = problem(rng)
    y = littlebit_linear(
        torch.empty(2, 3, 256, dtype=torch.bfloat16, device="meta"), packed, backend="triton"
    )
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 70), torch.bfloat16, True)


def test_torch_finds_the_kernels_of_the_operators() -> None:
    """Compiled graphs are cached under the sources of these."""
    from torch._library.triton import get_triton_kernels_for_op

    from littlebit2_kernels.triton import ops  # noqa: F401

    forward = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op("littlebit2::triton_linear")}
    assert forward == {"gemv_kernel", "gemm_kernel", "operand_kernel", "xnor_kernel"}
    backward = get_triton_kernels_for_op("littlebit2::triton_linear_backward_x")
    assert [kernel.fn.__name__ for kernel in backward] == ["transposed_kernel"]
