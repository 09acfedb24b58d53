"""The CUDA kernels through torch, on a GPU: every mode against float64, and what the operator promises."""

from __future__ import annotations

import itertools

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    dispatch,
    explain,
    littlebit_linear,
    prepack,
    warmup,
)
from littlebit2_kernels.dispatch import ACTIVATIONS, CUDA_ACTIVATIONS
from littlebit2_kernels.gpu import gpu_properties
from littlebit2_kernels.ops import calls
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_problem, relative_error
from tests import problems
from tests.cuda import modes
from tests.cuda.modes import MODES

DTYPES = tuple(TOLERANCE)
LAYERS = {
    "one-path": {"ranks": [40]},
    "two-paths": {"ranks": [520, 16], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=LAYERS, ids=str)
def problem(
    request: pytest.FixtureRequest, device: torch.device, rng: torch.Generator
) -> tuple[torch.Tensor, PackedLinear]:
    options = dict(LAYERS[request.param])
    x, packed = make_problem(5, 600, 70, options.pop("ranks"), generator=rng, **options)
    return x.to(device), packed.to(device)


# --- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", range(12))
def test_random_problems(device: torch.device, rng: torch.Generator, batch: int) -> None:
    for _ in range(40):
        x, packed = problems.random_problem(rng, problems.CUDA)
        mode = problems.pick(rng, MODES)
        y = littlebit_linear(x.to(device), packed.to(device), activation=mode)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], packed.out_features), x.dtype)
        error = modes.error_of(y, x, packed, mode)
        assert error <= modes.allowed(x.dtype, mode, y.numel()), f"{mode}, {problems.describe(x, packed)}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, mode: str
) -> None:
    x, packed = make_problem(40, 1100, 333, [136, 72], dtype=dtype, bias=True, generator=rng)
    packed = problems.scaled_down(packed)
    on_device, layer = x.to(device), packed.to(device)
    whole = littlebit_linear(on_device, layer, activation=mode)
    assert modes.error_of(whole, x, packed, mode) <= modes.allowed(dtype, mode, whole.numel())
    few = littlebit_linear(on_device[: modes.SWITCH], layer, activation=mode)
    for tokens in range(41):
        y = littlebit_linear(on_device[:tokens], layer, activation=mode)
        same = few if tokens <= modes.SWITCH else whole
        assert torch.equal(y, same[:tokens]), f"{tokens} tokens differ from the first {tokens} of more"
    if mode not in modes.GEMM_MODES:
        assert torch.equal(few, whole[: modes.SWITCH])


@pytest.mark.parametrize("mode", modes.GEMM_MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts(device: torch.device, rng: torch.Generator, dtype: torch.dtype, mode: str) -> None:
    """Enough tokens and rows for every tile, with both ends ragged."""
    x, packed = make_problem(531, 2100, 1033, [264, 72], dtype=dtype, bias=True, generator=rng)
    packed = problems.scaled_down(packed)
    on_device, layer = x.to(device), packed.to(device)
    y = littlebit_linear(on_device, layer, activation=mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(dtype, mode, y.numel())
    # Other numbers of tokens have other tiles and splits, and the same bits.
    for tokens in (17, 33, 64, 100, 128, 129, 300):
        assert torch.equal(littlebit_linear(on_device[:tokens], layer, activation=mode), y[:tokens])


@pytest.mark.parametrize("mode", modes.GEMM_MODES)
@pytest.mark.parametrize("ranks", [[80, 72], [264], [624, 40]], ids=str)
def test_both_stages_in_one_kernel(
    device: torch.device, rng: torch.Generator, ranks: list[int], mode: str
) -> None:
    """Where the planner takes it, the bits are those of the GEMM, which few tokens take."""
    x, packed = make_problem(4099, 4140, 2050, ranks, dtype=torch.bfloat16, bias=True, generator=rng)
    packed = problems.scaled_down(packed)
    on_device, layer = x.to(device), packed.to(device)
    y = littlebit_linear(on_device, layer, activation=mode)
    kernels, clusters = set(), set()
    for tokens in (17, 40, 130, 300, 515, 1030, 4099):
        plan = explain((tokens, 4140), packed, activation=mode, dtype=x.dtype, gpu=gpu_properties(device))
        kernels.add(plan.kernels)
        clusters.add(plan.launches[0].grid[1] if plan.kernels == "fused" else 1)
        assert torch.equal(littlebit_linear(on_device[:tokens], layer, activation=mode), y[:tokens]), plan
    assert "gemm" in kernels
    if mode == "float16" and ranks[0] < 100:
        assert "fused" in kernels
        # What a cluster and its shared memory do cannot be seen elsewhere.
        assert max(clusters) > 1 or gpu_properties(device).capability < 90
    error = modes.error_of(y[-70:], x[-70:], packed, mode)
    assert error <= modes.allowed(x.dtype, mode, 70 * 2050)


@pytest.mark.parametrize("mode", MODES)
def test_more_tokens_than_one_round_serves(device: torch.device, rng: torch.Generator, mode: str) -> None:
    # Latents that no shared memory has room for: one kernel for both stages takes any number of tokens.
    x, packed = make_problem(1, 256, 100, [1400], dtype=torch.float16, generator=rng)
    many = explain((10**5, 256), packed, activation=mode, dtype=x.dtype, gpu="H200")
    block = many.token_block
    assert block is not None
    x = torch.randn(2 * block + 3, 256, generator=rng).half()
    packed = problems.scaled_down(packed)
    y = littlebit_linear(x.to(device), packed.to(device), activation=mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(x.dtype, mode, y.numel())
    count = modes.SWITCH + 1 if mode in modes.GEMM_MODES else 1
    for token in (0, block - 1, block, 2 * block + 3 - count):
        own = littlebit_linear(x[token : token + count].to(device), packed.to(device), activation=mode)
        assert torch.equal(own, y[token : token + count])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "n", "rank"), [(4096, 11008, 512), (11008, 4096, 1024), (8192, 28672, 4096)])
def test_shapes_of_models(
    device: torch.device, rng: torch.Generator, k: int, n: int, rank: int, mode: str
) -> None:
    x, packed = make_problem(3, k, n, [rank], dtype=torch.bfloat16, outliers=4, generator=rng)
    y = littlebit_linear(x.to(device), packed.to(device), activation=mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(x.dtype, mode, y.numel())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_the_mode_that_explain_names(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype
) -> None:
    x, packed = make_problem(3, 600, 70, [40], dtype=dtype, generator=rng)
    x, packed = x.to(device), packed.to(device)
    plan = explain(x, packed)
    assert plan.backend == "cuda"
    assert plan.activation is not None
    named = littlebit_linear(x, packed, "cuda", plan.activation)
    assert torch.equal(littlebit_linear(x, packed), named)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["aligned", "pitched", "misaligned"])
def test_layouts_of_words(device: torch.device, rng: torch.Generator, layout: str, mode: str) -> None:
    for tokens, k in itertools.product((3, 20), (33, 512, 1100)):
        x, packed = make_problem(tokens, k, 70, [136, 40], generator=rng)
        x, packed = x.to(device), packed.to(device)
        moved = problems.with_word_layout(packed, layout)
        expected = littlebit_linear(x, packed, activation=mode)
        assert torch.equal(littlebit_linear(x, moved, activation=mode), expected)


@pytest.mark.parametrize("layout", ["pitched", "transposed", "offset", "batched"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_of_x(device: torch.device, rng: torch.Generator, dtype: torch.dtype, layout: str) -> None:
    x, packed = make_problem(6, 601, 70, [40], dtype=dtype, generator=rng)
    x, packed = x.to(device), packed.to(device)
    for mode in MODES:
        expected = littlebit_linear(x, packed, activation=mode)
        y = littlebit_linear(problems.with_input_layout(x, layout), packed, activation=mode)
        assert torch.equal(y.reshape(6, 70), expected)
    one = littlebit_linear(x[:1].expand(4, 601), packed)
    assert torch.equal(one, littlebit_linear(x[:1], packed).expand(4, 70))


def test_vectors_and_no_tokens(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    for mode in MODES:
        rows = littlebit_linear(x, packed, activation=mode)
        assert torch.equal(littlebit_linear(x[0], packed, activation=mode), rows[0])
        assert littlebit_linear(x[:0], packed, activation=mode).shape == (0, 70)
        assert littlebit_linear(x.new_empty(2, 0, 3, 600), packed, activation=mode).shape == (2, 0, 3, 70)


# --- numbers at the edges ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e25])
def test_extreme_scales(device: torch.device, rng: torch.Generator, scale: float, mode: str) -> None:
    """Scales of activations far outside the range of float16 cost no accuracy."""
    x, packed = make_problem(3, 1100, 70, [136], outliers=5, generator=rng)
    y = littlebit_linear((x * scale).to(device), packed.to(device), activation=mode)
    error = modes.error_of(y, x * scale, packed, mode)
    assert error <= modes.allowed(torch.float32, mode, y.numel())


@pytest.mark.parametrize("mode", MODES)
def test_outliers_in_their_own_slice(device: torch.device, rng: torch.Generator, mode: str) -> None:
    x, packed = make_problem(3, 1536, 70, [520], dtype=torch.bfloat16, generator=rng)
    x[:, 700] *= 1000
    y = littlebit_linear(x.to(device), packed.to(device), activation=mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(x.dtype, mode, y.numel())


@pytest.mark.parametrize("mode", MODES)
def test_zeros(device: torch.device, rng: torch.Generator, mode: str) -> None:
    x, packed = make_problem(3, 600, 70, [40], bias=True, generator=rng)
    y = littlebit_linear(torch.zeros_like(x).to(device), packed.to(device), activation=mode)
    assert torch.equal(y.cpu(), packed.bias.expand(3, 70))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_with_its_token(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, bad: float, mode: str
) -> None:
    x, packed = make_problem(19, 1100, 70, [136], dtype=dtype, generator=rng)
    x, packed = x.to(device), problems.scaled_down(packed).to(device)
    clean = littlebit_linear(x, packed, activation=mode)
    for token in (0, 7, 18):
        spoiled = x.clone()
        spoiled[token, 600] = bad
        y = littlebit_linear(spoiled, packed, activation=mode)
        assert not y[token].isfinite().any()
        others = torch.arange(19, device=device) != token
        assert torch.equal(y[others], clean[others])


# --- the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_batch(
    problem: tuple[torch.Tensor, PackedLinear], rng: torch.Generator, mode: str
) -> None:
    _, packed = problem
    x = torch.randn(37, 600, generator=rng).half().to(packed.device)
    whole = littlebit_linear(x, packed, activation=mode)
    order = torch.randperm(37, generator=rng).to(packed.device)
    assert torch.equal(littlebit_linear(x[order], packed, activation=mode), whole[order])
    if mode in modes.GEMM_MODES:
        for first in range(37 - modes.SWITCH):
            part = slice(first, first + modes.SWITCH + 1)
            assert torch.equal(littlebit_linear(x[part], packed, activation=mode), whole[part])
        whole = littlebit_linear(x[: modes.SWITCH], packed, activation=mode)
    for token in range(whole.shape[0]):
        assert torch.equal(littlebit_linear(x[token], packed, activation=mode), whole[token])


@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_same_run_to_run(device: torch.device, rng: torch.Generator, mode: str) -> None:
    x, packed = make_problem(4, 4096, 4096, [512, 512], dtype=torch.float16, generator=rng)
    x, packed = x.to(device), packed.to(device)
    first = littlebit_linear(x, packed, activation=mode)
    for _ in range(50):
        assert torch.equal(littlebit_linear(x, packed, activation=mode), first)


# --- under torch's machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(problem: tuple[torch.Tensor, PackedLinear], dtype: torch.dtype) -> None:
    x, packed = problem
    op = torch.ops.littlebit2.linear.default
    for activation in (ACTIVATIONS[name] for name in CUDA_ACTIVATIONS):
        torch.library.opcheck(
            op,
            (x.to(dtype), *packed.operands, packed.bias, activation),
            test_utils=("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(op, (x.to(dtype).reshape(5, 1, 600), *packed.operands))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(problem: tuple[torch.Tensor, PackedLinear], backend: str) -> None:
    x, packed = problem
    if backend == "inductor":
        pytest.importorskip("triton")
    for mode in ("auto", "int8"):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda a, mode=mode: littlebit_linear(a * 2, packed, activation=mode) + 1,
            fullgraph=True,
            dynamic=True,
            backend=backend,
        )
        for tokens in (5, 3, 2, 5):
            expected = littlebit_linear(x[:tokens] * 2, packed, activation=mode) + 1
            assert torch.equal(compiled(x[:tokens]), expected)


def test_compiled_module(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    torch._dynamo.reset()
    module = LittleBitLinear.from_packed(packed, activation="int8")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_graph_capture_and_replay(device: torch.device, rng: torch.Generator, tokens: int, mode: str) -> None:
    x, packed = make_problem(tokens, 4096, 1000, [512, 512], dtype=torch.float16, generator=rng)
    packed = problems.scaled_down(packed).to(device)
    static = x.to(device)
    littlebit_linear(static, packed, activation=mode)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = littlebit_linear(static, packed, activation=mode)
        # Reads what the calls before it wrote: their order is part of the graph.
        z = littlebit_linear(static + y[:, :1], packed, activation=mode)
    for _ in range(3):
        fresh = torch.randn(tokens, 4096, generator=rng).half().to(device)
        static.copy_(fresh)
        graph.replay()
        expected = littlebit_linear(fresh, packed, activation=mode)
        assert torch.equal(y, expected)
        assert torch.equal(z, littlebit_linear(fresh + expected[:, :1], packed, activation=mode))


def test_side_streams(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(4, 4096, 4096, [512], dtype=torch.float16, generator=rng)
    x, packed = x.to(device), problems.scaled_down(packed).to(device)
    expected = littlebit_linear(x + 1, packed)
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    results = []
    for _, stream in itertools.product(range(10), streams):
        with torch.cuda.stream(stream):
            late = x.clone()
            torch.cuda._sleep(1_000_000)
            late += 1  # only a kernel on the same stream sees this
            results.append(littlebit_linear(late, packed))
    torch.cuda.synchronize(device)
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mode", ["int16", "float16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 300])
def test_chained_calls_wait_for_one_another(
    device: torch.device, rng: torch.Generator, tokens: int, mode: str, captured: bool
) -> None:
    """Calls with nothing in between, each reading the last one's output and reusing its workspace."""
    x, packed = make_problem(tokens, 1024, 1024, [256, 136], generator=rng)
    # So that 50 calls in a row neither overflow nor fade away.
    gain = linear_reference(x, packed).norm() / x.double().norm()
    paths = [
        PackedPath(p.v, p.in_scale, p.out_scale / gain.float(), p.u, p.latent_scale) for p in packed.paths
    ]
    x, packed = x.to(device), PackedLinear(tuple(paths)).to(device)

    def chain(wait: bool) -> torch.Tensor:
        y = x
        for _ in range(50):
            y = littlebit_linear(y, packed, activation=mode)
            if wait:
                torch.cuda.synchronize(device)
        return y

    expected = chain(wait=True)
    assert 0 < expected.abs().amax() < float("inf")
    if not captured:
        assert all(torch.equal(chain(wait=False), expected) for _ in range(5))
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [2, 16])
def test_capture_of_a_fork_and_a_join(device: torch.device, rng: torch.Generator, tokens: int) -> None:
    """The first launch of a call then depends on two kernels."""
    x, packed = make_problem(tokens, 1024, 1024, [256], dtype=torch.float16, generator=rng)
    x, packed = x.to(device), problems.scaled_down(packed).to(device)
    expected = littlebit_linear(littlebit_linear(x, packed) + littlebit_linear(2 * x, packed), packed)
    side = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            right = littlebit_linear(2 * x, packed)
        left = littlebit_linear(x, packed)
        torch.cuda.current_stream().wait_stream(side)
        y = littlebit_linear(left + right, packed)
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, expected)


def test_another_device(device: torch.device, rng: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    x, packed = make_problem(3, 600, 70, [40], bias=True, generator=rng)
    y = littlebit_linear(x.to(other), packed.to(other))
    assert y.device == other
    assert torch.cuda.current_device() == device.index
    assert modes.error_of(y, x, packed, "exact") <= modes.allowed(x.dtype, "exact", y.numel())
    with pytest.raises(RuntimeError, match=rf"in_scale\[0\] must be on {device} like x, got {other}"):
        torch.ops.littlebit2.linear(x.to(device), *packed.to(other).operands)


# --- gradients, modules, refusals --------------------------------------------------------------------


def test_gradients(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    bias = torch.zeros(70, device=x.device, requires_grad=True)
    torch.ops.littlebit2.linear(x, *packed.operands, bias, 2).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 5.0))
    expected = torch.ones(5, 70, dtype=torch.float64) @ dense_weight(packed.to("cpu"))
    for backend in ("cuda", "blas", "reference"):
        leaf = x.clone().requires_grad_()
        littlebit_linear(leaf, packed, backend=backend).sum().backward()
        assert leaf.grad is not None
        assert relative_error(leaf.grad.cpu(), expected) <= 1e-5, backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacked(problem: tuple[torch.Tensor, PackedLinear], dtype: torch.dtype) -> None:
    """The bits of the CPU's kernel, from words that lie in any way."""
    _, packed = problem
    expected = calls.unpack(packed.to("cpu").operands, dtype)
    for layout in ("dense", "aligned", "misaligned"):
        layer = problems.with_word_layout(packed, layout)
        for actual, factor in zip(calls.unpack(layer.operands, dtype), expected, strict=True):
            assert actual.is_cuda
            assert torch.equal(actual.cpu(), factor)


@pytest.mark.parametrize("tokens", [0, 1, 17, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blas(device: torch.device, rng: torch.Generator, dtype: torch.dtype, tokens: int) -> None:
    x, packed = make_problem(tokens, 1100, 333, [136, 72], dtype=dtype, bias=True, generator=rng)
    packed = problems.scaled_down(packed)
    y = littlebit_linear(x.to(device), packed.to(device), backend="blas")
    # Three roundings of bfloat16 beside that of the output.
    allowed = 3e-6 if dtype == torch.float32 else 2.5 * TOLERANCE[dtype]
    assert modes.error_of(y, x, packed, "exact") <= allowed


def test_auto_unpacks(device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = make_problem(200, 1024, 512, [80, 80], dtype=torch.bfloat16, generator=rng)
    on_device, layer = x.to(device), packed.to(device)
    monkeypatch.setattr(dispatch, "prefill_backend", lambda *_: "blas")
    expected = littlebit_linear(on_device, layer, backend="blas")
    assert torch.equal(littlebit_linear(on_device, layer), expected)
    assert torch.equal(LittleBitLinear.from_packed(layer)(on_device), expected)
    # Not of few tokens, and not where a mode is named.
    few = on_device[:16]
    assert torch.equal(littlebit_linear(few, layer), littlebit_linear(few, layer, backend="cuda"))
    named = littlebit_linear(on_device, layer, activation="float16")
    assert torch.equal(named, littlebit_linear(on_device, layer, backend="cuda", activation="float16"))


def test_blas_is_captured(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(200, 1024, 512, [80], dtype=torch.bfloat16, generator=rng)
    static, layer = x.to(device), packed.to(device)
    warmup(layer, torch.bfloat16, [200])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = littlebit_linear(static, layer, backend="blas")
    static.mul_(2)
    graph.replay()
    assert torch.equal(y, littlebit_linear(static, layer, backend="blas"))


def test_modules_move(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    module = LittleBitLinear.from_packed(packed.to("cpu"))
    on_cpu = module(x.cpu())
    assert "prepacked" in dict(module.named_buffers())
    module.to(x.device)
    assert "prepacked" not in dict(module.named_buffers())
    y = module(x)
    assert torch.equal(y, littlebit_linear(x, packed))
    assert relative_error(y.cpu(), on_cpu) <= 4e-6
    for name in CUDA_ACTIVATIONS:
        module.activation = name
        assert torch.equal(module(x), littlebit_linear(x, packed, activation=name))
    module.activation = "auto"
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(module(x), littlebit_linear(x.bfloat16(), packed))
    for name, tensor in module.state_dict().items():
        assert tensor.device == x.device, name
    assert torch.equal(module.to("cpu")(x.cpu()), on_cpu)


def test_reference_backend(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    y = littlebit_linear(x, packed, backend="reference")
    assert torch.equal(y, linear_reference(x, packed, torch.float32))


def test_refusals(problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    op = torch.ops.littlebit2.linear
    with pytest.raises(ValueError, match=r"x must be on cuda:\d+ like the packed layer, got cpu"):
        littlebit_linear(x.cpu(), packed)
    with pytest.raises(ValueError, match=r"x must be on cpu like the packed layer, got cuda:\d+"):
        littlebit_linear(x, prepack(packed.to("cpu")))
    with pytest.raises(littlebit2_kernels.BackendUnavailableError, match="not on cuda"):
        littlebit_linear(x, packed, backend="cpu")
    with pytest.raises(RuntimeError, match="x must be on the GPU that holds the layer"):
        op(x.cpu(), *packed.operands)
    with pytest.raises(RuntimeError, match=r"in_scale\[0\] must be on cuda:\d+ like x, got the CPU"):
        op(x, *packed.to("cpu").operands)
    with pytest.raises(RuntimeError, match=r"bias must be on cuda:\d+ like x, got the CPU"):
        op(x, *packed.operands, torch.zeros(70))
    with pytest.raises(RuntimeError, match="activation must be between 0 and 5, got 6"):
        op(x, *packed.operands, None, 6)
    with pytest.raises(RuntimeError, match=r"x.size\(-1\) must equal 600, got shape \[5, 601\]"):
        op(torch.ones(5, 601, device=x.device), *packed.operands)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got Double"):
        op(x.double(), *packed.operands)


def test_diagnostics(device: torch.device) -> None:
    from littlebit2_kernels import diagnostics

    report = diagnostics.collect()
    assert report["backends"]["cuda"] == "available"
    assert report["native"]["cuda_kernels"] != "not built"
    assert all(text.endswith(": usable") for text in report["gpu"]["devices"])
