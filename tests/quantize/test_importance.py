"""Errors weighted by activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from littlebit2 import quantize_
from littlebit2.quantize import (
    Importance,
    QuantConfig,
    collect_importance,
    load_importance,
    quantize_weight,
    save_importance,
)
from littlebit2_kernels.reference import dense_weight

CONFIG = QuantConfig(ranks=(16,), method="refine")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.unused = nn.Linear(3, 3)
        self.second = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def weighted(error: torch.Tensor, importance: Importance) -> float:
    squares = error.double().square()
    if importance.inputs is not None:
        squares = squares * importance.inputs
    if importance.outputs is not None:
        squares = squares * importance.outputs[:, None]
    return float(squares.sum())


@pytest.mark.parametrize("sides", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("method", ["dual-svid", "joint-itq", "refine", "admm"])
def test_the_weighted_error_falls_and_is_reported(method: str, sides: str, rng: torch.Generator) -> None:
    weight = torch.randn(60, 72, generator=rng)
    outputs, inputs = (torch.rand(size, generator=rng).pow(8) for size in (60, 72))
    importance = Importance(inputs if sides != "outputs" else None, outputs if sides != "inputs" else None)
    config = QuantConfig(ranks=(16,), method=method, admm_iterations=30)  # type: ignore[arg-type]
    plain = quantize_weight(weight, config=config)
    aware = quantize_weight(weight, config=config, importance=importance)
    total = weighted(weight, importance)
    errors = [weighted(weight - dense_weight(layer.packed), importance) / total for layer in (plain, aware)]
    assert errors[1] < 0.9 * errors[0]
    assert aware.report.weighted_error == pytest.approx(errors[1], rel=0.02, abs=1e-3)
    unweighted = float((weight - dense_weight(aware.packed)).square().sum() / weight.square().sum())
    assert aware.report.error == pytest.approx(unweighted, rel=1e-4)
    assert plain.report.weighted_error is None


def test_equal_weights_are_no_weights(rng: torch.Generator) -> None:
    weight = torch.randn(20, 30, generator=rng)
    plain = quantize_weight(weight, config=CONFIG).report
    equal = quantize_weight(weight, config=CONFIG, importance=Importance(torch.full((30,), 5.0))).report
    assert equal.error == pytest.approx(plain.error, rel=1e-5)
    assert equal.weighted_error == pytest.approx(plain.error, rel=1e-5)


def test_channels_that_were_never_active_stay_finite(rng: torch.Generator) -> None:
    inputs = torch.zeros(30)
    inputs[4] = 1
    layer = quantize_weight(torch.randn(20, 30, generator=rng), config=CONFIG, importance=Importance(inputs))
    assert torch.isfinite(dense_weight(layer.packed)).all()


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        (Importance(torch.ones(3)), ValueError, r"importance.inputs must have shape \[30\], got \[3\]"),
        (
            Importance(None, -torch.ones(20)),
            ValueError,
            "importance.outputs must be non-negative and not all",
        ),
        (Importance(torch.zeros(30)), ValueError, "importance.inputs must be non-negative and not all zero"),
        (Importance(torch.full((30,), torch.nan)), ValueError, "importance.inputs must be finite, got nan"),
        (Importance(torch.ones(30, dtype=torch.int64)), TypeError, "importance.inputs must be a real float"),
    ],
    ids=["shape", "negative", "zero", "nan", "dtype"],
)
def test_bad_weights_are_named(importance: Importance, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(torch.ones(20, 30), config=CONFIG, importance=importance)


def test_collected_inputs_are_mean_squares_over_all_tokens(net: Net, rng: torch.Generator) -> None:
    batches = [torch.randn(2, 5, 24, generator=rng), torch.randn(7, 24, generator=rng)]
    found = collect_importance(net, batches)
    assert set(found) == {"first", "second"}
    tokens = torch.cat([batch.reshape(-1, 24) for batch in batches])
    torch.testing.assert_close(found["first"].inputs, tokens.square().mean(0))
    hidden = torch.relu(net.first(tokens)).detach()
    torch.testing.assert_close(found["second"].inputs, hidden.square().mean(0))
    assert found["first"].outputs is None
    assert not net.first._forward_hooks


def test_collected_outputs_are_mean_squared_gradients(net: Net, rng: torch.Generator) -> None:
    x = torch.randn(6, 24, generator=rng)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return y.square().sum()

    each = collect_importance(net, [x], loss=loss, per_output=True)
    gradient = 2 * net(x).detach()
    torch.testing.assert_close(each["second"].outputs, gradient.square().mean(0))
    one = collect_importance(net, [x], loss=loss)
    torch.testing.assert_close(one["second"].outputs, gradient.square().mean().expand(8))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_batches_may_be_mappings_and_tuples(net: Net) -> None:
    x = torch.ones(2, 24)
    direct = collect_importance(net, [x])["first"].inputs
    for batch in ({"x": x}, (x,), [x]):
        assert torch.equal(collect_importance(net, [batch])["first"].inputs, direct)  # type: ignore[arg-type]
    assert torch.equal(
        collect_importance(net, [3.0], run=lambda model, b: model(torch.full((2, 24), b)))["first"].inputs,  # type: ignore[arg-type]
        torch.full((24,), 9.0),
    )


def test_nothing_to_measure_is_an_error(net: Net) -> None:
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        collect_importance(net, [])
    with pytest.raises(ValueError, match=r"model must call at least one nn\.Linear, got none"):
        collect_importance(nn.ReLU(), [torch.ones(2)])
    with pytest.raises(ValueError, match="model must have parameters that require gradients where loss"):
        collect_importance(net.requires_grad_(False), [torch.ones(2, 24)], loss=torch.sum)


def test_models_take_importance_and_bits_follow_the_stakes(net: Net, rng: torch.Generator) -> None:
    importance = collect_importance(
        net, [torch.randn(20, 24, generator=rng)], loss=lambda y: y.square().sum()
    )
    config = QuantConfig(bpw=4.0, budget="spectral", method="joint-itq", paths=1, itq_iterations=2)
    reports = quantize_(net, config, importance=importance, exclude="unused", progress=False).layers
    assert all(report.weighted_error is not None for report in reports)


def test_files_hold_importance(tmp_path: Path, rng: torch.Generator) -> None:
    path = tmp_path / "importance.safetensors"
    given = {
        "a.b": Importance(torch.rand(3, generator=rng), torch.rand(2, generator=rng)),
        "c": Importance(torch.rand(4, generator=rng)),
    }
    save_importance(path, given)
    found = load_importance(path)
    assert set(found) == {"a.b", "c"}
    assert torch.equal(found["a.b"].outputs, given["a.b"].outputs)  # type: ignore[arg-type]
    assert found["c"].outputs is None
    with pytest.raises(IsADirectoryError, match=r"importance must be a safetensors file, got .*a directory"):
        load_importance(tmp_path)
    save_file({"a.weight": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match=r"tensors must be named NAME\.inputs or NAME\.outputs, got 'a\.weight'"
    ):
        load_importance(path)
    with pytest.raises(FileNotFoundError):
        save_importance(tmp_path / "missing" / "x", given)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_importance(path)
