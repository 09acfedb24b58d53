"""Quantising the linear modules of a model in place."""

from __future__ import annotations

import gc
import io
import sys
import weakref

import pytest
import torch
from torch import nn

from littlebit2.quantize import QuantConfig, quantize_linears, quantize_weight
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.reference import linear_reference

CONFIG = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=3)


class Packed(nn.Module):
    """The simplest module that can stand for a quantised linear."""

    def __init__(self, linear: nn.Linear, packed: PackedLinear) -> None:
        super().__init__()
        assert (packed.in_features, packed.out_features) == (linear.in_features, linear.out_features)
        self.packed = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_reference(x, self.packed, x.dtype)


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
        self.tied = self.layers[0].q_proj
        self.lm_head = nn.Linear(32, 40)


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def same(first: PackedLinear, second: PackedLinear) -> bool:
    pairs = zip(first.unique_tensors(), second.unique_tensors(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


def test_all_but_the_head_and_subclasses_are_replaced(model: Model) -> None:
    bias = model.layers[0].q_proj.bias.detach().clone()
    reports = quantize_linears(model, CONFIG, Packed, progress=False)
    assert [report.name for report in reports] == [
        "layers.0.q_proj",
        "layers.0.k_proj",
        "layers.1.q_proj",
        "layers.1.k_proj",
    ]
    assert isinstance(model.layers[1].k_proj, Packed)
    assert type(model.layers[0].odd) is Subclass
    assert type(model.lm_head) is nn.Linear
    # A module under two names stays one module.
    assert model.tied is model.layers[0].q_proj
    assert isinstance(model.tied, Packed)
    assert torch.equal(model.tied.packed.bias, bias)  # type: ignore[arg-type]
    assert all(0 < report.error < 1 for report in reports)


def test_patterns_select_and_the_result_does_not_depend_on_the_selection(model: Model) -> None:
    twin = Model()
    twin.load_state_dict(model.state_dict())
    quantize_linears(model, CONFIG, Packed, progress=False)
    (report,) = quantize_linears(
        twin, CONFIG, Packed, include=("*.1.*", "lm_head"), exclude=("*q_proj", "lm_*"), progress=False
    )
    assert report.name == "layers.1.k_proj"
    assert type(twin.layers[1].q_proj) is nn.Linear
    assert same(twin.layers[1].k_proj.packed, model.layers[1].k_proj.packed)  # type: ignore[arg-type]


def test_layers_of_equal_shape_get_different_seeds(model: Model) -> None:
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    quantize_linears(model, CONFIG, Packed, include=("*.q_proj",), progress=False)
    assert not same(model.layers[0].q_proj.packed, model.layers[1].q_proj.packed)  # type: ignore[arg-type]


def test_kv_factor_reaches_key_projections_only() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(256, 256), "k_proj": nn.Linear(256, 256)})
    config = QuantConfig(bpw=1.0, paths=1, method="joint-itq", kv_factor=0.5, itq_iterations=0)
    ranks = [report.ranks for report in quantize_linears(model, config, Packed, progress=False)]
    assert ranks == [(104,), (48,)]


def test_dense_weights_are_freed_one_by_one(model: Model) -> None:
    first = weakref.ref(model.layers[0].q_proj)
    alive: list[bool] = []

    def replace(linear: nn.Linear, packed: PackedLinear) -> nn.Module:
        gc.collect()
        alive.append(first() is not None)
        return Packed(linear, packed)

    quantize_linears(model, CONFIG, replace, progress=False)
    assert alive == [True, False, False, False]


def test_computing_device_is_left_again(model: Model) -> None:
    quantize_linears(model, CONFIG, Packed, device="cpu", progress=False)
    assert model.tied.packed.device == torch.device("cpu")  # type: ignore[union-attr]


def test_progress_is_shown_only_when_asked(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_linears(model, CONFIG, Packed, include=("*.0.*",), progress=False)
    assert capsys.readouterr() == ("", "")
    quantize_linears(model, CONFIG, Packed, include=("*.1.*",), progress=True)
    assert capsys.readouterr() == ("", "")  # stderr is no terminal here


def test_progress_is_shown_on_a_terminal(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    quantize_linears(model, CONFIG, Packed, include=("*.1.*",), progress=True)
    assert "2/2" in terminal.getvalue()
    shown = terminal.getvalue()
    quantize_linears(model, CONFIG, Packed, include=("*.0.*",), progress=False)
    assert terminal.getvalue() == shown


def test_bits_that_no_layer_can_use_touch_nothing(model: Model) -> None:
    with pytest.raises(ValueError, match=r"bpw must be at most .*min\(K, N\).*, got 50"):
        quantize_linears(model, QuantConfig(bpw=50), Packed, progress=False)
    with pytest.raises(ValueError, match=r"bpw must be at most .*, got 50"):
        quantize_linears(model, QuantConfig(bpw=50, budget="spectral"), Packed, progress=False)
    assert not any(isinstance(module, Packed) for module in model.modules())
    with pytest.raises(ValueError, match=r"bpw must be at most 3\.5, what one path .* costs, got 50"):
        quantize_weight(torch.eye(32), config=QuantConfig(bpw=50))


def test_reports_say_which_layers_cannot_use_more() -> None:
    model = nn.ModuleDict({"square": nn.Linear(64, 64), "flat": nn.Linear(64, 512)})
    config = QuantConfig(bpw=2.0, method="joint-itq", paths=1, itq_iterations=0)
    square, flat = quantize_linears(model, config, Packed, progress=False)
    assert (square.ranks, square.at_largest_rank) == ((40,), False)
    assert (flat.ranks, flat.at_largest_rank) == ((64,), True)
    assert flat.counted_bpw < 2


def test_a_device_that_cannot_be_used_is_named(model: Model) -> None:
    with pytest.raises(ValueError, match=r"device must name one that torch can use here, .* got 'nonsense'"):
        quantize_linears(model, CONFIG, Packed, device="nonsense", progress=False)


def test_a_budget_that_does_not_fit_touches_nothing(model: Model) -> None:
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.q_proj': bpw must be above"):
        quantize_linears(model, QuantConfig(bpw=0.5), Packed, progress=False)
    assert not any(isinstance(module, Packed) for module in model.modules())


def test_errors_name_the_layer(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].k_proj.weight[2, 3] = torch.nan
    message = r"layer 'layers\.1\.k_proj': weight must be finite, got nan at index \[2, 3\]"
    with pytest.raises(ValueError, match=message):
        quantize_linears(model, CONFIG, Packed, progress=False)
    assert isinstance(model.layers[1].q_proj, Packed)
    meta = nn.ModuleDict({"one": nn.Linear(8, 8, device="meta")})
    with pytest.raises(ValueError, match="layer 'one': weight must hold values, got a tensor on the meta"):
        quantize_linears(meta, CONFIG, Packed, progress=False)


def test_a_decomposition_that_fails_names_the_layer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(RuntimeError, match=r"layer 'layers\.0\.q_proj': matrix of shape \[32, 32\]"):
        quantize_linears(model, CONFIG, Packed, progress=False)


def test_an_empty_selection_and_a_bare_linear_are_errors(model: Model) -> None:
    with pytest.raises(ValueError, match=r"include must select at least one nn\.Linear.*'nothing'"):
        quantize_linears(model, CONFIG, Packed, include=("nothing",), progress=False)
    with pytest.raises(ValueError, match="model must hold its linear modules below its root"):
        quantize_linears(nn.Linear(8, 8), CONFIG, Packed, progress=False)


def test_a_single_pattern_may_be_a_string(model: Model) -> None:
    reports = quantize_linears(model, CONFIG, Packed, include="layers.*", exclude="*q_proj", progress=False)
    assert [report.name for report in reports] == ["layers.0.k_proj", "layers.1.k_proj"]


def test_patterns_must_be_strings(model: Model) -> None:
    with pytest.raises(TypeError, match="exclude must hold strings, got 3"):
        quantize_linears(model, CONFIG, Packed, exclude=("a", 3), progress=False)  # type: ignore[arg-type]


def test_every_bit_of_the_seed_counts() -> None:
    layers = []
    for seed in (0, 2**32):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Model()
        config = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=0, seed=seed)
        quantize_linears(model, config, Packed, include="layers.0.k_proj", progress=False)
        layers.append(model.layers[0].k_proj.packed)
    assert not same(*layers)
