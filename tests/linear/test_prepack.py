"""``LittleBitLinear`` in the CPU's own layout: when it gets there, and what nobody may notice of it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from littlebit2_kernels import LittleBitLinear, PackedLinear, littlebit_linear, prepack
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_packed, make_problem, relative_error

LAYERS: dict[str, dict[str, Any]] = {
    "one-path": {"ranks": [40]},
    "two-paths": {"ranks": [40, 16], "bias": True},
    "three-paths": {"ranks": [8, 72, 24]},
    "shared-v": {"ranks": [24, 24], "share_v": True, "bias": True},
    "single-stage": {"ranks": None, "bias": True},
}

Layer = tuple[torch.Tensor, PackedLinear, LittleBitLinear]


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest, rng: torch.Generator) -> Layer:
    options = dict(LAYERS[request.param])
    x, packed = make_problem(5, 100, 70, options.pop("ranks"), generator=rng, **options)
    return x, packed, LittleBitLinear.from_packed(packed)


def is_prepacked(module: LittleBitLinear) -> bool:
    names = {name for name, _ in module.named_buffers()}
    if "prepacked" in names:
        assert names <= {"prepacked", "bias"}, "no portable copy may be held"
        return True
    assert "u1" in names
    return False


def copy_of_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor, expected[name]), name


def test_the_first_call_prepacks(layer: Layer) -> None:
    x, packed, module = layer
    assert not is_prepacked(module)
    portable = module.nbytes
    y = module(x)
    assert is_prepacked(module)
    assert torch.equal(y, littlebit_linear(x, prepack(packed)))
    assert torch.equal(module(x), y)
    assert relative_error(y, linear_reference(x, packed)) <= 2e-6
    assert module.nbytes == prepack(packed).nbytes
    assert module.nbytes == sum(b.numel() * b.element_size() for b in module.buffers())
    assert module.nbytes <= portable + 3000, "padding of a small layer, and nothing twice"
    assert not list(module.parameters())


def test_calls_that_compute_nothing_here_do_not_prepack(layer: Layer) -> None:
    x, _, module = layer
    with pytest.raises(ValueError, match="must equal K=100"):
        module(x[:, 1:])
    module.state_dict()
    repr(module)
    module.dequantize()
    assert not is_prepacked(module)
    module.backend = "reference"
    module(x)
    assert not is_prepacked(module)


def test_auto_prepack_can_be_turned_off(layer: Layer) -> None:
    x, packed, _ = layer
    module = LittleBitLinear.from_packed(packed, auto_prepack=False)
    assert torch.equal(module(x), littlebit_linear(x, packed))
    assert not is_prepacked(module)
    module.prepack_()
    assert torch.equal(module(x), littlebit_linear(x, prepack(packed)))
    module.unpack_().auto_prepack = True
    module(x)
    assert is_prepacked(module)


def test_prepack_and_unpack_undo_each_other(layer: Layer) -> None:
    x, packed, module = layer
    before = copy_of_state(module)
    names = [name for name, _ in module.named_buffers()]
    assert module.unpack_() is module
    assert module.prepack_() is module
    buffer = dict(module.named_buffers())["prepacked"]
    assert module.prepack_()._buffers["prepacked"] is buffer
    assert_same_state(module.state_dict(), before)
    assert not is_prepacked(module.unpack_())
    assert sorted(name for name, _ in module.named_buffers()) == sorted(names)
    assert_same_state(module.state_dict(), before)
    assert relative_error(module(x), linear_reference(x, packed)) <= 2e-6


def test_state_dict_is_the_portable_one(layer: Layer) -> None:
    x, _, module = layer
    before = copy_of_state(module)
    model = nn.ModuleDict({"proj": module})
    module(x)
    after = model.state_dict(prefix="model.")
    assert_same_state(module.state_dict(), before)
    assert_same_state({name.removeprefix("model.proj."): t for name, t in after.items()}, before)
    assert is_prepacked(module), "looking at the state changes nothing"
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), before)


def test_buffers_answer_to_their_portable_names(layer: Layer) -> None:
    x, packed, module = layer
    before = copy_of_state(module)
    module(x)
    for name, tensor in before.items():
        assert torch.equal(getattr(module, name), tensor), name
        assert hasattr(module, name)
    for name in ("weight", "V_packed_R7", "u3", "prepacked_"):
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(module, name)
    assert module.packed.shares == packed.shares
    assert torch.equal(dense_weight(module.packed), dense_weight(packed))
    assert torch.equal(module.dequantize(torch.float64), dense_weight(packed))
    assert "stored_bpw=" in repr(module)


def test_a_replaced_buffer_is_computed_with(layer: Layer) -> None:
    """Assigning to a portable name works whether the layer is prepacked or not."""
    x, packed, module = layer
    before = module(x)
    module.u1 = torch.zeros_like(module.u1)
    assert not torch.equal(module(x), before)
    assert not module.state_dict()["u1"].any()
    if packed.bias is not None:
        module.bias = torch.full((70,), 1e6)
        assert float(module(x).mean()) > 9e5
        assert torch.equal(module.state_dict()["bias"], torch.full((70,), 1e6))


# --- loading, copying, moving ----------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_after_prepacking(layer: Layer, assign: bool, rng: torch.Generator) -> None:
    x, packed, module = layer
    module(x)
    ranks = packed.ranks
    source = make_packed(
        100, 70, ranks, bias=packed.bias is not None, share_v=packed.shares == (0, 0), generator=rng
    )
    other = LittleBitLinear.from_packed(source)
    expected = other(x)
    assert not torch.equal(module(x), expected)
    assert module.load_state_dict(other.state_dict(), assign=assign).missing_keys == []
    assert_same_state(module.state_dict(), other.state_dict())
    assert torch.equal(module(x), expected)
    assert is_prepacked(module)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)


def test_assigned_tensors_are_not_changed_by_prepacking(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 100, 70, [40], bias=True, generator=rng)
    state = {name: t.clone() for name, t in LittleBitLinear.from_packed(packed).state_dict().items()}
    before = {name: t.clone() for name, t in state.items()}
    module = LittleBitLinear(100, 70, [40], device="meta")
    module.load_state_dict(state, assign=True)
    assert torch.equal(module(x), littlebit_linear(x, prepack(packed)))
    assert is_prepacked(module)
    assert_same_state(state, before)


def test_part_of_a_state_keeps_the_rest(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 100, 70, [40, 16], bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed)
    module(x)
    before = copy_of_state(module)
    part = {"u1_R": torch.ones(1, 70), "bias": torch.zeros(70)}
    with pytest.raises(RuntimeError, match=r'Missing key.*"V_packed"'):
        module.load_state_dict(part)
    keys = module.load_state_dict(part, strict=False)
    assert sorted(keys.missing_keys) == sorted(before.keys() - part.keys())
    assert_same_state(module.state_dict(), before | part)
    assert relative_error(module(x), linear_reference(x, module.packed)) <= 2e-6


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"u1": torch.ones(1, 71)}, "does not agree|must have|must equal"),
        ({"u1": torch.full((1, 70), float("nan"))}, "out_scale must be finite, got nan"),
        ({"V_packed": torch.zeros(40, 4)}, "v must be int32 words"),
        ({"extra": torch.ones(1)}, 'Unexpected key.*"extra"'),
    ],
)
def test_a_bad_state_leaves_the_layer_as_it_was(
    spoilt: dict[str, torch.Tensor], message: str, rng: torch.Generator
) -> None:
    x, packed = make_problem(3, 100, 70, [40, 16], generator=rng)
    module = LittleBitLinear.from_packed(packed)
    expected, before = module(x), copy_of_state(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(before | spoilt)
    assert_same_state(module.state_dict(), before)
    assert torch.equal(module(x), expected)


def test_pickles_are_portable(layer: Layer) -> None:
    x, _, module = layer
    before, y = copy_of_state(module), module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert is_prepacked(module)
        assert not is_prepacked(other)
        assert_same_state(other.state_dict(), before)
        assert torch.equal(other(x), y)
        assert is_prepacked(other)
        assert_same_state(pickle.loads(pickle.dumps(other)).state_dict(), before)


def test_deep_copies_keep_the_layout_and_are_independent(layer: Layer) -> None:
    x, _, module = layer
    module.activation = "int16"
    y = module(x)
    model = nn.Sequential(module, nn.Identity())
    other = copy.deepcopy(model)[0]
    assert is_prepacked(other)
    assert torch.equal(other(x), y)
    assert other.activation == "int16"
    assert other._buffers["prepacked"].data_ptr() != module._buffers["prepacked"].data_ptr()
    other._buffers["prepacked"].zero_()
    assert torch.equal(module(x), y)
    twice = nn.Sequential(module, module)
    copied = copy.deepcopy(twice)
    assert copied[0] is copied[1]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "cpu", "float"])
def test_casts_leave_values_alone(layer: Layer, cast: str) -> None:
    x, _, module = layer
    before, y = copy_of_state(module), module(x)
    changed = module.to(torch.float16) if cast == "to" else getattr(module, cast)()
    assert changed is module
    assert_same_state(module.state_dict(), before)
    assert torch.equal(module(x), y)
    assert module(x.half()).dtype == torch.float16


def test_moving_to_the_meta_device_and_back(layer: Layer) -> None:
    x, _, module = layer
    before, y = copy_of_state(module), module(x)
    module.to("meta")
    assert not is_prepacked(module)
    assert all(buffer.is_meta for buffer in module.buffers())
    assert module(x.to("meta")).shape == (5, 70)
    assert not is_prepacked(module)
    with pytest.raises(ValueError, match="must be on the CPU"):
        module.prepack_()
    module.to_empty(device="cpu").load_state_dict(before)
    assert torch.equal(module(x), y)


# --- calls -----------------------------------------------------------------------------------------------


def test_activation_is_an_attribute(layer: Layer) -> None:
    x, packed, _ = layer
    module = LittleBitLinear.from_packed(packed, activation="int8")
    prepacked = prepack(packed)
    for activation in ("int8", "sign", "int16", "exact", "auto"):
        module.activation = activation
        assert torch.equal(module(x), littlebit_linear(x, prepacked, activation=activation))
    module.activation = "int8"
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_activations_that_cannot_be_served(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 40, 30, [8], generator=rng)
    with pytest.raises(ValueError, match=r"activation must be one of auto, .* int8x2, got 'int4'"):
        LittleBitLinear(40, 30, [8], activation="int4")
    with pytest.raises(ValueError, match="activation='int8' needs a prepacked layer"):
        LittleBitLinear.from_packed(packed, activation="int8", auto_prepack=False)(x)
    with pytest.raises(ValueError, match="backend='reference' computes exact sums only"):
        LittleBitLinear.from_packed(packed, activation="int8", backend="reference")(x)
    module = LittleBitLinear.from_packed(packed)
    for _ in range(2):  # before and after the layer is prepacked
        for wrong in ("int4", None, 3):
            module.activation = wrong
            with pytest.raises(ValueError, match=r"activation must be one of auto, .* int8x2, got "):
                module(x)
        module.activation = "auto"
        module(x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 31), ValueError, r"x.size\(-1\) must equal K=32, got shape \[2, 31\]"),
        (torch.ones(2, 0), ValueError, r"x.size\(-1\) must equal K=32, got shape \[2, 0\]"),
        (torch.tensor(1.0), ValueError, r"x.size\(-1\) must equal K=32, got shape \[\]"),
        (torch.ones(2, 32).double(), TypeError, "x must be float32, float16 or bfloat16, got torch.float64"),
        (torch.ones(2, 32).long(), TypeError, "x must be float32, float16 or bfloat16, got torch.int64"),
        (torch.ones(2, 32).to_sparse(), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 32, device="meta"), ValueError, "x must be on cpu like the packed layer, got meta"),
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
    ],
    ids=["K", "empty", "0-d", "float64", "int64", "sparse", "device", "list"],
)
@pytest.mark.parametrize("where", ["plain", "no_grad", "autocast"])
def test_forward_refuses_bad_input(x: Any, error: type[Exception], message: str, where: str) -> None:
    """The short way of prepacked layers refuses what the long one does."""
    module = LittleBitLinear(32, 16, [8]).prepack_()
    contexts = {
        "plain": torch.enable_grad(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with contexts[where], pytest.raises(error, match=message):
        module(x)


def test_autocast(layer: Layer) -> None:
    x, packed, module = layer
    expected = littlebit_linear(x.bfloat16(), prepack(packed))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
    assert module(x).dtype == torch.float32


def test_training(layer: Layer, rng: torch.Generator) -> None:
    x, packed, module = layer
    module.train()
    weight = torch.randn(5, 70, generator=rng)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(weight)
        assert relative_error(leaf.grad, weight.double() @ dense_weight(packed)) <= 2e-6
    assert is_prepacked(module)
    with torch.inference_mode():
        assert module(x).is_inference()


def test_a_first_call_in_inference_mode_serves_training_later(layer: Layer) -> None:
    x, packed, module = layer
    with torch.inference_mode():
        module(x)
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert relative_error(leaf.grad, torch.ones(5, 70).double() @ dense_weight(packed)) <= 2e-6
    assert_same_state(module.unpack_().state_dict(), LittleBitLinear.from_packed(packed).state_dict())


def test_first_calls_from_many_threads(rng: torch.Generator) -> None:
    x, packed = make_problem(24, 300, 200, [72, 40], bias=True, generator=rng)
    expected = littlebit_linear(x, prepack(packed))
    failures: list[object] = []

    def work(module: LittleBitLinear, barrier: threading.Barrier, tokens: int) -> None:
        barrier.wait()
        try:
            if not torch.equal(module(x[:tokens]), expected[:tokens]):
                failures.append(tokens)
        except Exception as error:
            failures.append(error)

    for _ in range(20):
        module, barrier = LittleBitLinear.from_packed(packed), threading.Barrier(8)
        threads = [
            threading.Thread(target=work, args=(module, barrier, tokens))
            for tokens in (1, 2, 3, 5, 8, 13, 21, 24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_prepacked(module)
    assert not failures


@pytest.mark.parametrize("step", ["check_x", "choose_for"])
def test_another_thread_may_prepack_in_the_middle_of_a_call(
    step: str, layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from littlebit2_kernels import linear

    x, packed, module = layer
    original = getattr(linear, step)

    def interrupted(*arguments: Any) -> Any:
        module.prepack_()
        return original(*arguments)

    monkeypatch.setattr(linear, step, interrupted)
    assert torch.equal(module(x), littlebit_linear(x, prepack(packed)))


@pytest.mark.parametrize("first", ["eager", "compiled"])
def test_compiled_calls_before_and_after_prepacking(first: str, rng: torch.Generator) -> None:
    x, packed = make_problem(5, 100, 70, [40, 16], bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    if first == "compiled":
        # What is traced is left as it is.
        assert torch.equal(compiled(x), littlebit_linear(x, packed))
        assert not is_prepacked(module)
    eager = module(x)
    assert is_prepacked(module)
    for tokens in (5, 3, 1):
        assert torch.equal(compiled(x[:tokens]), eager[:tokens])
    assert torch.equal(compiled(x.bfloat16()), module(x.bfloat16()))
    module.unpack_()
    assert torch.equal(compiled(x), littlebit_linear(x, packed))


def test_exported_modules(rng: torch.Generator) -> None:
    """An exported program holds what the module held, and runs in this process."""
    x, packed = make_problem(5, 100, 70, [40, 16], bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed)
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    for expected in (littlebit_linear(x, packed), littlebit_linear(x, prepack(packed))):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
        assert torch.equal(program.module()(x[:3]), expected[:3])
        module.prepack_()
