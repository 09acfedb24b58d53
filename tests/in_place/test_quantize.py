"""Quantizing the linear modules of a model in place: the result, the settings and all-or-nothing."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from torch import nn

from littlebit2 import Importance, QuantConfig, quantize_, quantize_linear, quantize_weight
from littlebit2.quantize.quantizer import DenseLayer, QuantizedLayer, quantize_together
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.reference import linear_reference
from tests.in_place.builders import FusedExperts

CONFIG = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=3)


class Subclass(nn.Linear):
    """Computes something else than its name says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 16, bias=False)
        self.odd = Subclass(32, 32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.again = self.layers[0].q_proj
        self.lm_head = nn.Linear(32, 40)


def seeded(seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model()


@pytest.fixture
def model() -> Model:
    return seeded()


def same(first: PackedLinear, second: PackedLinear) -> bool:
    pairs = zip(first.unique_tensors(), second.unique_tensors(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Every module and every tensor by name, with the values."""
    modules: dict[str, object] = dict(model.named_modules(remove_duplicate=False))
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {**modules, "tensors": tensors}


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before if name != "tensors")
    for name, (tensor, values) in before["tensors"].items():  # type: ignore[attr-defined]
        now = after["tensors"][name][0]  # type: ignore[index]
        assert now is tensor
        assert torch.equal(now, values) or bool(torch.isnan(values).any())


def test_all_but_the_head_and_subclasses_are_replaced(model: Model, rng: torch.Generator) -> None:
    bias = model.layers[0].q_proj.bias.detach().clone()
    report = quantize_(model, CONFIG, progress=False)
    assert [layer.name for layer in report.layers] == [
        "layers.0.q_proj",
        "layers.0.k_proj",
        "layers.1.q_proj",
        "layers.1.k_proj",
    ]
    assert isinstance(model.layers[1].k_proj, LittleBitLinear)
    assert type(model.layers[0].odd) is Subclass
    assert type(model.lm_head) is nn.Linear
    # A module under two names stays one module.
    assert model.again is model.layers[0].q_proj
    assert isinstance(model.again, LittleBitLinear)
    assert torch.equal(model.again.packed.bias, bias)
    assert all(0 < layer.error < 1 for layer in report.layers)
    x = torch.randn(3, 32, generator=rng)
    expected = linear_reference(x, model.again.packed, torch.float64)
    assert torch.allclose(model.again(x).double(), expected, atol=1e-4)


def test_the_second_argument_may_be_left_out_or_a_number() -> None:
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    reports = [
        quantize_(one, *settings, progress=False)
        for one, settings in zip(models, [(), (1,), (QuantConfig(bpw=1.0),)], strict=True)
    ]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].layers[0].ranks == (8,)


def test_patterns_select_and_the_result_does_not_depend_on_the_selection(model: Model) -> None:
    twin = seeded()
    quantize_(model, CONFIG, progress=False)
    report = quantize_(
        twin, CONFIG, include=("*.1.*", "lm_head"), exclude=("*q_proj", "lm_*"), progress=False
    )
    assert [layer.name for layer in report.layers] == ["layers.1.k_proj"]
    assert type(twin.layers[1].q_proj) is nn.Linear
    assert same(twin.layers[1].k_proj.packed, model.layers[1].k_proj.packed)


def test_any_name_selects_a_module_and_it_is_replaced_under_all(model: Model) -> None:
    report = quantize_(model, CONFIG, include="again", progress=False)
    assert [layer.name for layer in report.layers] == ["layers.0.q_proj"]
    assert model.again is model.layers[0].q_proj
    assert isinstance(model.again, LittleBitLinear)
    other = seeded()
    quantize_(other, CONFIG, exclude="again", progress=False)
    assert other.again is other.layers[0].q_proj
    assert type(other.again) is nn.Linear


def test_a_function_selects_as_in_torchao(model: Model) -> None:
    asked: list[str] = []

    def wanted(module: nn.Module, name: str) -> bool:
        assert model.get_submodule(name) is module
        asked.append(name)
        return name.startswith("layers.1.")

    report = quantize_(model, CONFIG, wanted, progress=False)
    assert [layer.name for layer in report.layers] == ["layers.1.q_proj", "layers.1.k_proj"]
    assert asked == ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"]
    assert type(model.again) is nn.Linear


def test_layers_of_equal_shape_get_different_seeds(model: Model) -> None:
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    quantize_(model, CONFIG, include="*.q_proj", progress=False)
    assert not same(model.layers[0].q_proj.packed, model.layers[1].q_proj.packed)


def test_every_bit_of_the_seed_counts() -> None:
    layers = []
    for seed in (0, 2**32):
        model = seeded()
        config = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=0, seed=seed)
        quantize_(model, config, include="layers.0.k_proj", progress=False)
        layers.append(model.layers[0].k_proj.packed)
    assert not same(*layers)


def test_kv_factor_reaches_key_projections_only() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(256, 256), "k_proj": nn.Linear(256, 256)})
    config = QuantConfig(bpw=1.0, paths=1, method="joint-itq", kv_factor=0.5, itq_iterations=0)
    report = quantize_(model, config, progress=False)
    assert [layer.ranks for layer in report.layers] == [(104,), (48,)]


def test_small_layers_are_batched_and_reported_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(*(nn.Linear(*size) for size in [(24, 24), (24, 16), (16, 24), (24, 24)]))

    sizes: list[int] = []

    def watched(layers: list[DenseLayer]) -> list[QuantizedLayer]:
        sizes.append(len(layers))
        return quantize_together(layers)

    monkeypatch.setattr("littlebit2.in_place.quantize.quantize_together", watched)
    config = QuantConfig(ranks=(8,), admm_iterations=10)
    batched = model()
    report = quantize_(batched, config, progress=False)
    assert sizes == [2, 1, 1]
    assert [layer.name for layer in report.layers] == ["0", "1", "2", "3"]
    monkeypatch.setattr("littlebit2.in_place.quantize.batch_size", lambda *_: 1)
    alone = model()
    assert quantize_(alone, config, progress=False) == report
    assert all(same(one.packed, other.packed) for one, other in zip(batched, alone, strict=True))


def test_settings_reach_the_packed_modules(model: Model) -> None:
    model.layers[1].eval()
    quantize_(model, CONFIG, device="cpu", backend="reference", activation="exact", progress=False)
    assert isinstance(model.again, LittleBitLinear)
    assert (model.again.backend, model.again.activation) == ("reference", "exact")
    assert model.again.training
    assert not model.layers[1].q_proj.training
    assert model.again.packed.device == torch.device("cpu")


def test_progress_is_shown_only_when_asked(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(model, CONFIG, include="*.0.*", progress=False)
    assert capsys.readouterr() == ("", "")
    quantize_(model, CONFIG, include="*.1.*", progress=True)
    assert capsys.readouterr() == ("", "")  # stderr is no terminal here


def test_progress_is_shown_on_a_terminal(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    quantize_(model, CONFIG, include="*.1.*", progress=True)
    assert "2/2" in terminal.getvalue()
    shown = terminal.getvalue()
    quantize_(model, CONFIG, include="*.0.*", progress=False)
    assert terminal.getvalue() == shown


# --- all or nothing ---------------------------------------------------------------------------------


def test_a_bad_weight_is_found_before_any_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> None:
        raise AssertionError("quantized a layer before all were checked")

    monkeypatch.setattr("littlebit2.in_place.quantize.quantize_together", never)
    with torch.no_grad():
        model.layers[1].k_proj.weight[2, 3] = torch.nan
    before = snapshot(model)
    message = r"layer 'layers\.1\.k_proj': weight must be finite, got nan at index \[2, 3\]"
    with pytest.raises(ValueError, match=message):
        quantize_(model, CONFIG, progress=False)
    assert_untouched(model, before)
    with torch.no_grad():
        model.layers[1].k_proj.weight[2, 3] = 0
        model.layers[1].q_proj.bias[5] = torch.inf
    with pytest.raises(ValueError, match=r"layer 'layers\.1\.q_proj': bias must be finite, got inf"):
        quantize_(model, CONFIG, progress=False)
    meta = nn.ModuleDict({"one": nn.Linear(32, 32, device="meta")})
    with pytest.raises(ValueError, match="layer 'one': weight must hold values, got a tensor on the meta"):
        quantize_(meta, CONFIG, progress=False)
    wrong = {"layers.1.q_proj": Importance(torch.ones(31))}
    with torch.no_grad():
        model.layers[1].q_proj.bias[5] = 0
    with pytest.raises(ValueError, match=r"layer 'layers\.1\.q_proj': importance\.inputs must have shape"):
        quantize_(model, CONFIG, importance=wrong, progress=False)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError(), RuntimeError("no convergence")])
def test_a_failure_in_a_later_layer_leaves_the_model_as_it_was(
    failure: BaseException, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fails_at_the_third(layers: list[DenseLayer]) -> list[QuantizedLayer]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise failure
        return quantize_together(layers)

    monkeypatch.setattr("littlebit2.in_place.quantize.quantize_together", fails_at_the_third)
    before = snapshot(model)
    with pytest.raises(type(failure)):
        quantize_(model, CONFIG, progress=False)
    assert calls == 3
    assert_untouched(model, before)


def test_an_interrupt_while_modules_are_replaced_undoes_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = nn.Module.set_submodule
    calls = 0

    def interrupted(self: nn.Module, name: str, module: nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        replace(self, name, module)

    monkeypatch.setattr(nn.Module, "set_submodule", interrupted)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, CONFIG, progress=False)
    assert calls > 3
    assert_untouched(model, before)


def test_a_decomposition_that_fails_names_the_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"layer 'layers\.0\.q_proj': matrix of shape \[32, 32\]"):
        quantize_(model, CONFIG, progress=False)
    assert_untouched(model, before)


def test_bits_that_no_layer_can_use_touch_nothing(model: Model) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"bpw must be at most .*min\(K, N\).*, got 50"):
        quantize_(model, 50, progress=False)
    with pytest.raises(ValueError, match=r"bpw must be at most .*, got 50"):
        quantize_(model, QuantConfig(bpw=50, budget="spectral"), progress=False)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"bpw must be at most 3\.5, what one path .* costs, got 50"):
        quantize_weight(torch.eye(32), config=50)


# --- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "1.0"}, "config must be a QuantConfig, a number of bits per weight or None, got str"),
        ({"config": lambda m, n: True}, "config must be a QuantConfig, .* got function"),
        ({"filter_fn": "layers"}, "filter_fn must be callable or None, got str"),
        ({"include": 3}, "include must be a pattern or a sequence of patterns, got int"),
        ({"exclude": ("a", 3)}, "exclude must hold strings, got 3"),
        ({"importance": [1]}, "importance must map module names to Importance, got list"),
        (
            {"importance": {"lm_head": torch.ones(32)}},
            r"importance\['lm_head'\] must be an Importance, got Tensor",
        ),
    ],
)
def test_wrong_types_are_named(model: Model, arguments: dict[str, object], message: str) -> None:
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        quantize_(model, **{"config": CONFIG, "progress": False, **arguments})  # type: ignore[arg-type]
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": -1}, "config must be a finite positive number, got -1"),
        ({"device": "nonsense"}, "device must name one that torch can use here, .* got 'nonsense'"),
        ({"backend": "magic"}, "backend must be one of .*, got 'magic'"),
        ({"activation": "int3"}, "activation must be one of .*, got 'int3'"),
    ],
)
def test_bad_values_are_named_before_any_work(
    model: Model, arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("quantized a layer before the arguments were checked")

    monkeypatch.setattr("littlebit2.in_place.quantize.quantize_together", never)
    with pytest.raises(ValueError, match=message):
        quantize_(model, **{"config": CONFIG, "progress": False, **arguments})  # type: ignore[arg-type]


def test_a_model_must_be_a_module_that_holds_linears() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        quantize_({}, CONFIG)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must hold its linear modules below .*quantize_linear"):
        quantize_(nn.Linear(8, 8), CONFIG, progress=False)


# --- one layer --------------------------------------------------------------------------------------


def test_one_layer_is_that_of_its_weight_or_of_its_model(model: Model) -> None:
    dense = copy.deepcopy(model.layers[1].q_proj)
    alone = quantize_linear(dense, CONFIG, backend="reference")
    assert type(dense) is nn.Linear
    assert alone.backend == "reference"
    assert same(alone.packed, quantize_weight(dense.weight, dense.bias, config=CONFIG).packed)
    named = quantize_linear(dense, CONFIG, name="layers.1.q_proj")
    quantize_(model, CONFIG, progress=False)
    assert same(named.packed, model.layers[1].q_proj.packed)
    assert not same(named.packed, alone.packed)


def test_importance_weighs_one_layer(rng: torch.Generator) -> None:
    linear = nn.Linear(32, 24)
    importance = Importance(torch.rand(32, generator=rng))
    weighed = quantize_linear(linear, CONFIG, importance=importance)
    expected = quantize_weight(linear.weight, linear.bias, config=CONFIG, importance=importance)
    assert same(weighed.packed, expected.packed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"linear": nn.Conv1d(1, 1, 1)},
            TypeError,
            r"linear must be a torch\.nn\.Linear that computes .* got Conv1d",
        ),
        ({"linear": Subclass(8, 8)}, TypeError, "got Subclass; .*quantize_weight"),
        ({"config": "small"}, TypeError, "config must be a QuantConfig, .* got str"),
        ({"importance": {}}, TypeError, "importance must be an Importance or None, got dict"),
        ({"config": 0.1}, ValueError, "bpw must be above 0.5, what the scales of one path cost"),
        ({"backend": "magic"}, ValueError, "backend must be one of .*, got 'magic'"),
        ({"device": "meta"}, ValueError, "device must hold values, got 'meta'"),
    ],
)
def test_bad_arguments_of_one_layer_are_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_linear(**{"linear": nn.Linear(64, 64), **arguments})  # type: ignore[arg-type]


def test_hooks_stay_with_the_packed_module() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    called: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: called.append("before")),
        model[0].register_forward_hook(lambda *_: called.append("after")),
    ]
    quantize_(model, 1.0, progress=False)
    model(torch.zeros(1, 64))
    assert called == ["before", "after"]
    for handle in handles:
        handle.remove()
    model(torch.zeros(1, 64))
    assert called == ["before", "after"]


class _Clamped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-100, 100)


def test_what_shows_for_large_inputs_only_stays_dense() -> None:
    model = nn.Sequential(_Clamped(64, 64), nn.Linear(64, 64))
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    model.append(nn.Linear(64, 64))
    report = quantize_(model, 1.0, progress=False)
    assert [layer.name for layer in report.layers] == ["2"]
    assert {left.name for left in report.dense} == {"0", "1"}


def test_an_error_in_the_experts_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = pytest.importorskip("littlebit2.architecture.experts")
    made: list[nn.Module] = []

    one = FusedExperts()
    model = nn.ModuleDict({"a": one, "b": one, "c": FusedExperts()})
    inner = experts.LittleBitExperts.__init__

    def second_fails(self: nn.Module, source: nn.Module) -> None:
        if made:
            raise KeyError("an attribute exists")
        made.append(source)
        inner(self, source)

    monkeypatch.setattr(experts.LittleBitExperts, "__init__", second_fails)
    with pytest.raises(KeyError):
        quantize_(model, 1.0, progress=False)
    assert [type(module) for module in model.values()] == [FusedExperts] * 3
    monkeypatch.undo()
    quantize_(model, 1.0, progress=False)
    assert model["a"] is model["b"]
    assert all(type(module) is experts.LittleBitExperts for module in model.values())
