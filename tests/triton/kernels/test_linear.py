"""The Triton kernels against float64: every mode, and what the backend promises of their bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, PackedLinear, littlebit_linear, warmup
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.testing import TOLERANCE, make_problem, relative_error
from tests import problems
from tests.problems import scaled_down, with_input_layout, with_word_layout
from tests.triton import modes
from tests.triton.modes import MODES, run

DTYPES = tuple(TOLERANCE)
LAYERS: dict[str, dict[str, Any]] = {
    "two-paths": {"ranks": [40, 16], "bias": True},
    "shared-v": {"ranks": [24, 24], "share_v": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=LAYERS, ids=str)
def problem(request: pytest.FixtureRequest, rng: torch.Generator) -> tuple[torch.Tensor, PackedLinear]:
    options = dict(LAYERS[request.param])
    return make_problem(5, 100, 40, options.pop("ranks"), generator=rng, **options)


# --- results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_random_problems(device: torch.device, rng: torch.Generator, batch: int) -> None:
    for _ in range(6 if device.type == "cpu" else 60):
        x, packed = problems.random_problem(rng, problems.TRITON)
        mode = problems.pick(rng, MODES)
        y = run(x, packed, device, mode)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], packed.out_features), x.dtype)
        error = modes.error_of(y, x, packed, mode)
        assert error <= modes.allowed(x, packed, mode), f"{mode}, {problems.describe(x, packed)}"


@pytest.mark.parametrize("batch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_launch_and_two_give_the_same_bits(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    for _ in range(5 if device.type == "cpu" else 60):
        x, packed = problems.random_problem(rng, problems.TRITON_DECODE)
        results = []
        for count in (1, 2):
            set_launches(monkeypatch, count)
            results.append(run(x, packed, device, "exact"))
        note = problems.describe(x, packed)
        assert modes.error_of(results[0], x, packed, "exact") <= modes.allowed(x, packed, "exact"), note
        assert torch.equal(*results), note


def test_one_launch_follows_what_is_tuned_for_two(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from littlebit2_kernels.triton import plan

    x, packed = make_problem(2, 1100, 70, [296, 40], bias=True, generator=rng)
    tuned = {
        False: plan.GemvConfig(16, 16, 2, 4),
        True: plan.GemvConfig(32, 8, 1, 4),
    }
    monkeypatch.setattr(plan, "gemv_config", lambda shape, *_: tuned[shape.last])
    results = []
    for count in (1, 2):
        set_launches(monkeypatch, count)
        results.append(run(x, packed, device, "exact"))
    assert modes.error_of(results[0], x, packed, "exact") <= modes.allowed(x, packed, "exact")
    assert torch.equal(*results)


def set_launches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the GEMV take ``count`` launches for two stages."""
    from littlebit2_kernels.triton import plan

    monkeypatch.setattr(plan, "decode_config", lambda *_: plan.DecodeConfig(count))


def test_small_layers_take_one_launch_and_keep_their_latents_on_chip(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from littlebit2_kernels.triton import forward, fused

    x, packed = make_problem(4, 200, 40, [16, 8], bias=True, generator=rng)
    x, packed = x.to(device), packed.to(device)
    allocated: list[tuple[int, ...]] = []
    new_empty = torch.Tensor.new_empty

    def recorded(tensor: torch.Tensor, size: Any, **options: Any) -> torch.Tensor:
        if isinstance(size, tuple):  # the interpreter makes some of its own
            allocated.append(size)
        return new_empty(tensor, size, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    monkeypatch.setattr(forward, "gemv", None)  # nothing else is launched
    launched = []
    wrapped = fused.wrap_triton
    monkeypatch.setattr(fused, "wrap_triton", lambda kernel: launched.append(kernel) or wrapped(kernel))
    littlebit_linear(x, packed, backend="triton", activation="exact")
    assert allocated == [(4, 40)]
    assert launched == [fused.fused_kernel]
    assert warmup(packed, tokens=(1, 2), backend="triton") == 2
    assert launched == [fused.fused_kernel] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_as_good_as_torch(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    for tokens in (1, 5):
        x, packed = make_problem(tokens, 600, 33, [72, 40], dtype=dtype, outliers=3, bias=True, generator=rng)
        packed = scaled_down(packed)
        y = run(x, packed, device)
        assert modes.error_of(y, x, packed, "auto") <= modes.allowed(x, packed, "auto")


def test_expanded_tokens_and_inputs_of_other_strides(device: torch.device, rng: torch.Generator) -> None:
    x, packed = make_problem(1, 104, 9, [40], dtype=torch.float16, generator=rng)
    x, packed = x.to(device), packed.to(device)
    for mode, tokens in (("exact", 3), ("exact", 6), ("sign", 3), ("int8", 20)):
        one = littlebit_linear(x.repeat(tokens, 1), packed, backend="triton", activation=mode)
        y = littlebit_linear(x.expand(tokens, 104), packed, backend="triton", activation=mode)
        assert torch.equal(y, one)
        constant = x[:, :1].expand(tokens, 104)
        y = littlebit_linear(constant, packed, backend="triton", activation=mode)
        assert torch.equal(y, littlebit_linear(constant.clone(), packed, backend="triton", activation=mode))
    _, narrow = make_problem(1, 1, 9, [8], generator=rng)
    column = x[:, 3::7].T  # [15, 1], of strides 7 and 104
    y = littlebit_linear(column, narrow.to(device), backend="triton")
    assert torch.equal(y, littlebit_linear(column.clone(), narrow.to(device), backend="triton"))


@pytest.mark.parametrize(("tokens", "mode"), [(1, "exact"), (5, "exact"), (5, "int8"), (1, "sign")])
def test_more_paths_than_a_launch_takes(
    device: torch.device, rng: torch.Generator, tokens: int, mode: str
) -> None:
    x, packed = make_problem(tokens, 100, 9, [8, 16, 24, 8, 40, 8], bias=True, generator=rng)
    y = run(x, packed, device, mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(x, packed, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["aligned", "pitched", "misaligned"])
def test_layouts_of_words(device: torch.device, rng: torch.Generator, layout: str, mode: str) -> None:
    for tokens, k in ((1, 33), (5, 128)):
        x, packed = make_problem(tokens, k, 9, [40], generator=rng)
        moved = with_word_layout(packed.to(device), layout)
        y = littlebit_linear(x.to(device), moved, backend="triton", activation=mode)
        assert torch.equal(y.cpu(), run(x, packed, device, mode))


@pytest.mark.parametrize("layout", ["pitched", "transposed", "offset", "batched"])
def test_layouts_of_x(device: torch.device, rng: torch.Generator, layout: str) -> None:
    for tokens, mode in ((1, "exact"), (1, "sign"), (6, "float16")):
        x, packed = make_problem(tokens, 101, 9, [40], dtype=torch.bfloat16, generator=rng)
        x, packed = x.to(device), packed.to(device)
        whole = littlebit_linear(x, packed, backend="triton", activation=mode)
        y = littlebit_linear(with_input_layout(x, layout), packed, backend="triton", activation=mode)
        assert torch.equal(y.reshape(tokens, 9), whole)


def test_vectors_and_no_tokens(device: torch.device, problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    for mode in MODES:
        assert torch.equal(run(x[0], packed, device, mode), run(x[:1], packed, device, mode)[0])
        assert run(x[:0], packed, device, mode).shape == (0, 40)
        assert run(x.new_empty(2, 0, 3, 100), packed, device, mode).shape == (2, 0, 3, 40)


# --- numbers at the edges ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 3e35])
def test_extreme_scales(device: torch.device, rng: torch.Generator, scale: float, mode: str) -> None:
    for tokens in (1, 9):
        x, packed = make_problem(tokens, 520, 20, [72], outliers=3, scale_spread=0, generator=rng)
        # 1 / scale on the other end keeps sums in range.
        packed = scaled(packed, min(1e25, 1 / scale) if scale < 1 else 1 / scale)
        y = run(x * scale, packed, device, mode)
        error = modes.error_of(y, x * scale, packed, mode)
        assert error <= modes.allowed(x, packed, mode)


def scaled(packed: PackedLinear, factor: float) -> PackedLinear:
    """The layer with its ``latent_scale`` times ``factor``."""
    paths = [replace(path, latent_scale=path.latent_scale * factor) for path in packed.paths]
    return PackedLinear(tuple(paths), packed.bias)


@pytest.mark.parametrize("mode", MODES)
def test_outliers_in_their_own_chunk(device: torch.device, rng: torch.Generator, mode: str) -> None:
    x, packed = make_problem(5, 1100, 9, [520], dtype=torch.bfloat16, generator=rng)
    x[:, 700] *= 1000
    y = run(x, packed, device, mode)
    assert modes.error_of(y, x, packed, mode) <= modes.allowed(x, packed, mode)


@pytest.mark.parametrize("mode", MODES)
def test_zeros(device: torch.device, rng: torch.Generator, mode: str) -> None:
    for tokens in (1, 9):
        x, packed = make_problem(tokens, 300, 9, [40], bias=True, generator=rng)
        assert torch.equal(run(torch.zeros_like(x), packed, device, mode), packed.bias.expand(tokens, 9))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(
    device: torch.device, rng: torch.Generator, bad: float, mode: str
) -> None:
    for tokens in (3, 10):
        x, packed = make_problem(tokens, 310, 9, [40], dtype=torch.float16, generator=rng)
        packed = scaled_down(packed)
        clean = run(x, packed, device, mode)
        spoiled = x.clone()
        spoiled[1, 300] = bad
        y = run(spoiled, packed, device, mode)
        others = torch.arange(tokens) != 1
        assert not y[1].isfinite().any()
        assert torch.equal(y[others], clean[others])


# --- the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_a_token_is_the_same_in_every_batch_of_its_kernel(
    device: torch.device, rng: torch.Generator, mode: str
) -> None:
    x, packed = make_problem(17, 530, 20, [40, 24], dtype=torch.float16, bias=True, generator=rng)
    packed = scaled_down(packed)
    whole = run(x, packed, device, mode)
    # float16 and int8 have one kernel, sign two of the same bits; exact and auto switch above 4 tokens.
    switches = mode in ("exact", "auto")
    for start, end in [(0, 5), (5, 11)] if switches else [(0, 1), (1, 4), (8, 17)]:
        assert torch.equal(run(x[start:end], packed, device, mode), whole[start:end])
    if switches:
        assert torch.equal(run(x[:3], packed, device, mode)[1:], run(x[1:3], packed, device, mode))
    order = torch.randperm(17, generator=rng)
    assert torch.equal(run(x[order], packed, device, mode), whole[order])


@pytest.mark.parametrize("mode", ["float16", "exact", "int8", "sign"])
def test_blocks_and_splits_of_the_gemm_change_no_bit(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from littlebit2_kernels.triton import forward, plan

    x, packed = make_problem(10, 1030, 20, [40, 24], dtype=torch.float16, generator=rng)
    packed = scaled_down(packed)
    results = []
    for splits, rows, block in ((1, 64, 16), (2, 64, 32), (4, 128, 16)):

        def config(*_: Any, splits: int = splits, rows: int = rows, block: int = block) -> plan.GemmConfig:
            return plan.GemmConfig(rows, block, splits, 4, 2, 8 // splits)

        monkeypatch.setattr(forward, "stage_config", of_last_stage(config))
        results.append(run(x, packed, device, mode))
    assert modes.error_of(results[0], x, packed, mode) <= modes.allowed(x, packed, mode)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("splits", [1, 3])
def test_xnor_and_int8_products_of_signs_are_the_same_bits(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, splits: int
) -> None:
    from littlebit2_kernels.triton import forward, ops, plan

    x, packed = make_problem(3, 1600, 20, [40, 24], bias=True, generator=rng)
    by_xnor, by_gemm = {}, {}
    for kernel, results, config in (
        ("xnor", by_xnor, plan.XnorConfig(32, splits, 4)),
        ("gemm", by_gemm, plan.GemmConfig(64, 16, splits, 4, 2, 8)),
    ):
        monkeypatch.setattr(ops, "choose_method", lambda *_, kernel=kernel: plan.Method(kernel, "sign"))
        monkeypatch.setattr(forward, "stage_config", of_last_stage(lambda *_, config=config: config))
        results["y"] = run(x, packed, device, "sign")
    assert torch.equal(by_xnor["y"], by_gemm["y"])
    assert modes.error_of(by_xnor["y"], x, packed, "sign") <= modes.allowed(x, packed, "sign")


def of_last_stage(config: Callable[..., Any]) -> Callable[..., Any]:
    """``config``, without splits in a last stage: those have none."""

    def chosen(method: Any, shape: Any, *rest: Any) -> Any:
        found = config(method, shape, *rest)
        return replace(found, splits=1) if shape.last else found

    return chosen


@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_same_run_to_run(
    device: torch.device, problem: tuple[torch.Tensor, PackedLinear], mode: str
) -> None:
    x, packed = problem
    for tokens in (1, 5):
        first = run(x[:tokens], packed, device, mode)
        for _ in range(2 if device.type == "cpu" else 50):
            assert torch.equal(run(x[:tokens], packed, device, mode), first)


# --- modules and refusals ----------------------------------------------------------------------------


def test_module(device: torch.device, problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    module = LittleBitLinear.from_packed(packed.to(device), backend="triton")
    for name in (*MODES, "auto"):
        module.activation = name
        assert torch.equal(module(x.to(device)).cpu(), run(x, packed, device, name))
    assert "prepacked" not in dict(module.named_buffers())
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(module(x.to(device)).cpu(), run(x.bfloat16(), packed, device))


def test_warmup(device: torch.device, problem: tuple[torch.Tensor, PackedLinear]) -> None:
    _, packed = problem
    layers = [LittleBitLinear.from_packed(packed.to(device), backend="triton") for _ in range(2)]
    assert warmup(torch.nn.Sequential(*layers), tokens=(1, 5)) == 2  # the same shape twice
    assert warmup(packed.to(device), torch.float32, (0, 3, 9), backend="triton", activation="sign") == 3


def test_refusals(device: torch.device, rng: torch.Generator) -> None:
    from littlebit2_kernels.triton.ops import triton_linear

    x, packed = make_problem(2, 40, 30, [16], generator=rng)
    x, packed = x.to(device), packed.to(device)
    with pytest.raises(ValueError, match="activation='int16' is not served by backend='triton'"):
        littlebit_linear(x, packed, backend="triton", activation="int16")
    v, u, in_scale, latent_scale, out_scale = packed.operands
    for arguments, message in (
        (
            (x.double(), v, u, in_scale, latent_scale, out_scale),
            "x must be float32, float16 or bfloat16, got torch.float64",
        ),
        (
            (x[:, :39], v, u, in_scale, latent_scale, out_scale),
            r"x.size\(-1\) must equal 40, got shape \[2, 39\]",
        ),
        (
            (x, v, u, in_scale * 2, latent_scale, out_scale),
            r"in_scale must hold one tensor per path \(1\), got 2",
        ),
        ((x, v, [], in_scale, latent_scale, out_scale), r"u must hold one tensor per path \(1\), got 0"),
        (
            (x, [v[0][:12]], u, in_scale, latent_scale, out_scale),
            r"v\[0\].size\(0\) must be a multiple of 8, got 12",
        ),
        (
            (x, v, [u[0][:7]], in_scale, latent_scale, out_scale),
            r"u\[0\] must be torch.int32 \[30, 1\], got torch.int32 \[7, 1\]",
        ),
        (
            (x, v, u, [in_scale[0].half()], latent_scale, out_scale),
            r"in_scale\[0\] must be torch.float32 \[40\], got torch.float16",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            triton_linear(*arguments, None, "exact")
    with pytest.raises(
        ValueError, match="activation must be one of auto, exact, float16, int8, sign, got 'int16'"
    ):
        triton_linear(x, *packed.operands, None, "int16")
    with pytest.raises(RuntimeError, match=r"bias must be torch.float32 \[30\]"):
        triton_linear(x, *packed.operands, torch.zeros(29, device=device), "exact")


def test_reference_agrees(device: torch.device, problem: tuple[torch.Tensor, PackedLinear]) -> None:
    x, packed = problem
    assert relative_error(run(x, packed, device, "exact"), linear_reference(x, packed)) <= 2e-6
