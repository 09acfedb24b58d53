"""``torch.compile`` sees through the operators: launches in one graph, no breaks, no copies.

Nothing runs: the tensors are on the meta device, and a stand-in driver names a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear, littlebit_linear
from littlebit2_kernels.gpu import GPUS
from littlebit2_kernels.testing import make_packed, make_problem
from littlebit2_kernels.triton.backend import interpreting

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


@pytest.fixture
def two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers by one kernel for each stage, as large ones."""
    from littlebit2_kernels.triton import plan

    monkeypatch.setattr(plan, "decode_config", lambda *_: plan.DecodeConfig(2))


@pytest.mark.usefixtures("two_launches")
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


@pytest.mark.usefixtures("two_launches")
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
    assert widths == [32]  # 24, and room to a multiple of 16


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


def test_small_layers_are_one_launch_in_a_graph(rng: torch.Generator) -> None:
    capture = Capture()
    packed = problem(rng, ranks=[8])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: littlebit_linear(a, packed, backend="triton"), fullgraph=True, backend=capture.backend()
    )
    compiled(torch.empty(1, 256, device="meta"))
    assert [launches(graph) for graph in capture.forward] == [["fused"]]


def test_tuned_configurations_leave_the_number_of_tokens_a_symbol(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from littlebit2_kernels.triton import configs, forward, plan

    entry = {"kernel": "gemm float16", "rows": 40, "cols": 256, "last": False}
    table = [
        {**entry, "tokens": tokens, "config": asdict(plan.GemmConfig(64, block, 1, 4, 2, 16))}
        for tokens, block in ((16, 16), (64, 32), (512, 64))
    ]
    lookup = configs.Tuned(table)
    monkeypatch.setattr(forward, "for_device", lambda device: (plan.DEFAULT_GPU, lookup))
    packed, capture = problem(rng), Capture()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: littlebit_linear(a, packed, backend="triton"),
        fullgraph=True,
        dynamic=True,
        backend=capture.backend(),
    )
    for tokens in (17, 20, 21, 22, 25, 27, 29, 30, 31):
        compiled(torch.empty(tokens, 256, dtype=torch.float16, device="meta"))
    assert len(capture.forward) == 1


def test_models_of_many_ranks_compile_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would compile one for each pattern of multiples of 16 among the sizes of a call."""
    from triton.runtime.jit import JITFunction

    from littlebit2_kernels.triton import forward as calls
    from littlebit2_kernels.triton import gemm, gemv, operand, plan, xnor

    kernels = (gemv.gemv_kernel, gemm.gemm_kernel, operand.operand_kernel, xnor.xnor_kernel)
    compiled: Counter[str] = Counter()

    def count(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> None:
        self.device_caches[device][0][key] = self
        compiled[self.fn.__name__] += 1

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=(1,), **options)

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    for module, kernel in zip((gemv, gemm, operand, xnor), kernels, strict=True):
        monkeypatch.setattr(module, "wrap_triton", Launcher)
        caches = type(kernel.device_caches)(kernel.device_caches.default_factory)
        monkeypatch.setattr(kernel, "device_caches", caches)
    # Of one configuration, the sizes that differ are multiples of 8 and 16, ones, and in between.
    monkeypatch.setattr(calls, "for_device", lambda device: (GPUS["H200"], None))
    for ranks in ((136, 144), (144, 136), (160, 168), (152, 184), (192, 136), (176, 160)):
        packed = make_packed(4096, 4096, ranks).to("meta")
        layer = calls.Layer(*(tensors or [] for tensors in packed.operands))
        for tokens, activation in ((1, "exact"), (3, "exact"), (16, "float16"), (9, "float16"), (1, "sign")):
            x = torch.empty(tokens, 4096, dtype=torch.float16, device="meta")
            method = plan.choose_method(tokens, activation, float32=False)
            calls.forward(x, layer, None, x.new_empty(tokens, 4096), method)
    # First and last stage, and of activations that are staged, both kinds; the GEMM also knows whether the
    # largest of its matrices has a multiple of 16 rows.
    assert compiled == {"gemv_kernel": 2, "gemm_kernel": 3, "operand_kernel": 4, "xnor_kernel": 2}


def test_grids_of_any_number_of_tokens_are_within_what_gpus_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from littlebit2_kernels.triton import forward as calls
    from littlebit2_kernels.triton import fused, gemm, gemv, operand, plan, transposed, xnor

    grids: dict[str, tuple[int, ...]] = {}

    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.fn.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids[self.name] = grid
            return lambda *_, **__: None

    for module in (fused, gemm, gemv, operand, transposed, xnor):
        monkeypatch.setattr(module, "wrap_triton", Launcher)
    packed = make_packed(256, 512, [32]).to("meta")
    layer = calls.Layer(*(tensors or [] for tensors in packed.operands))
    many = torch.empty(5_000_000, 256, dtype=torch.float16, device="meta")
    for tokens, activation in ((4, "exact"), (8, "sign"), (len(many), "int8")):
        out = many.new_empty(tokens, 512)
        calls.forward(many[:tokens], layer, None, out, plan.choose_method(tokens, activation, float32=False))
    calls.backward_x(many.new_empty(len(many), 512), layer, many)
    assert set(grids) == {"fused_kernel", "xnor_kernel", "operand_kernel", "gemm_kernel", "transposed_kernel"}
    for name, (first, *others) in grids.items():
        assert 1 <= first < 2**31, name
        assert all(1 <= other <= 65535 for other in others), name


def test_torch_finds_the_kernels_of_the_operators() -> None:
    """Compiled graphs are cached under the sources of these."""
    from torch._library.triton import get_triton_kernels_for_op

    from littlebit2_kernels.triton import ops  # noqa: F401

    forward = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op("littlebit2::triton_linear")}
    assert forward == {"fused_kernel", "gemv_kernel", "gemm_kernel", "operand_kernel", "xnor_kernel"}
    backward = get_triton_kernels_for_op("littlebit2::triton_linear_backward_x")
    assert [kernel.fn.__name__ for kernel in backward] == ["transposed_kernel"]
