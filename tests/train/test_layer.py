"""The trainable layer: gradients, memory, and that it packs to the function it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2.train import STEEPNESS, TrainableLittleBitLinear, hard_sign, surrogate_slope
from littlebit2.train.function import binary_path
from littlebit2_kernels import LittleBitLinear, PackedLinear, PackedPath, littlebit_linear, pack_signs
from littlebit2_kernels.testing import make_packed

NAMES = ("x", "v", "in_scale", "u", "latent_scale", "out_scale")


def operands(
    rng: torch.Generator, m: int = 3, k: int = 10, r: int = 8, n: int = 6
) -> dict[str, torch.Tensor]:
    """Random float64 operands whose latents are where SmoothSign is steep."""
    shapes = {
        "x": (m, k),
        "v": (r, k),
        "in_scale": (k,),
        "u": (n, r),
        "latent_scale": (r,),
        "out_scale": (n,),
    }
    made = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }
    with torch.no_grad():
        made["v"].mul_(0.01)
        made["u"].mul_(0.01)
    return made


def smooth_model(o: dict[str, torch.Tensor], at: dict[str, torch.Tensor], surrogate: str) -> torch.Tensor:
    """The function whose derivative at ``at`` the layer's backward is said to be.

    Signs are replaced by a smooth (or, for the clipped estimator, linear) function that has the hard sign's
    value and the surrogate's slope at ``at``.
    """

    def sign(name: str) -> torch.Tensor:
        fixed = hard_sign(at[name], torch.float64)
        if surrogate == "smooth-sign":
            return fixed + torch.tanh(STEEPNESS * o[name]) - torch.tanh(STEEPNESS * at[name])
        return fixed + (o[name] - at[name]) * (at[name].abs() <= 1)

    z = (o["x"] * o["in_scale"]) @ sign("v").T * o["latent_scale"]
    return z @ sign("u").T * o["out_scale"]


@pytest.mark.parametrize("surrogate", ["smooth-sign", "clipped"])
def test_gradients_are_those_of_the_surrogate(rng: torch.Generator, surrogate: Any) -> None:
    o = operands(rng)
    if surrogate == "clipped":
        with torch.no_grad():
            o["v"].mul_(150)  # some past the clip
    at = {name: tensor.detach().clone() for name, tensor in o.items()}
    probe = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    y = binary_path(*(o[name] for name in NAMES), surrogate)
    torch.testing.assert_close(y, smooth_model(at, at, surrogate))
    (y * probe).sum().backward()
    step = 1e-6
    for name in NAMES:
        gradient, flat = o[name].grad, at[name].flatten()
        assert gradient is not None
        for i in range(0, flat.numel(), 3):
            values = []
            for sign in (1, -1):
                moved = {**at, name: at[name].clone()}
                moved[name].view(-1)[i] += sign * step
                values.append(float((smooth_model(moved, at, surrogate) * probe).sum()))
            expected = (values[0] - values[1]) / (2 * step)
            assert float(gradient.flatten()[i]) == pytest.approx(expected, rel=1e-5, abs=1e-6), (name, i)


def test_slopes() -> None:
    x = torch.tensor([0.0, 0.005, -0.02, 0.5, -1.0, 1.01])
    torch.testing.assert_close(
        surrogate_slope(x, "smooth-sign"), STEEPNESS * (1 - torch.tanh(STEEPNESS * x) ** 2)
    )
    assert surrogate_slope(x, "clipped").tolist() == [1, 1, 1, 1, 1, 0]
    assert hard_sign(torch.tensor([0.0, -0.0, -1e-30, 2.0]), torch.bfloat16).tolist() == [1, 1, -1, 1]


def test_only_what_is_needed_is_computed(rng: torch.Generator) -> None:
    o = {name: tensor.detach() for name, tensor in operands(rng).items()}
    o["x"].requires_grad_()
    y = binary_path(*(o[name] for name in NAMES), "smooth-sign")
    y.sum().backward()
    assert o["x"].grad is not None
    assert all(o[name].grad is None for name in NAMES[1:])


def test_signs_are_not_stored_for_backward(rng: torch.Generator) -> None:
    m, k, r, n = 7, 96, 32, 64
    o = {name: t.detach().float().requires_grad_() for name, t in operands(rng, m, k, r, n).items()}
    parameters = {t.data_ptr() for t in o.values()}
    held: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            held.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        binary_path(*(o[name] for name in NAMES), "smooth-sign")
    assert held == [(m, r)]  # z alone


def dense(rng: torch.Generator, n: int = 40, k: int = 72) -> torch.Tensor:
    return torch.randn(n, k, generator=rng) * torch.arange(1, k + 1) ** -0.5


CONFIGS = {
    "dual-svid, two paths": QuantConfig(ranks=(8, 16), method="dual-svid"),
    "joint-itq": QuantConfig(ranks=(16,), method="joint-itq"),
    "refine": QuantConfig(ranks=(24,), method="refine"),
    "admm": QuantConfig(ranks=(40,), method="admm", admm_iterations=20),
    "three paths": QuantConfig(ranks=(8, 8, 16), method="joint-itq"),
}


def assert_same(one: PackedLinear, other: PackedLinear) -> None:
    assert one.shares == other.shares
    for mine, theirs in zip(one.paths, other.paths, strict=True):
        for name, tensor in mine.tensors().items():
            assert torch.equal(tensor, theirs.tensors()[name]), name
    assert (one.bias is None) == (other.bias is None)
    assert one.bias is None or other.bias is None or torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("with_weight", [False, True], ids=["without", "weight"])
@pytest.mark.parametrize("method", CONFIGS)
def test_starts_from_every_method_as_it_is(rng: torch.Generator, method: str, with_weight: bool) -> None:
    weight, bias = dense(rng), torch.randn(40, generator=rng)
    packed = quantize_weight(weight, bias, config=CONFIGS[method]).packed
    layer = TrainableLittleBitLinear(packed, weight if with_weight else None)
    assert_same(layer.packed(), packed)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("ranks", [[8], [24, 40], [16, 8, 8]], ids=str)
def test_trained_layer_packs_to_the_function_it_computes(
    rng: torch.Generator, ranks: list[int], mode: str
) -> None:
    layer = TrainableLittleBitLinear(make_packed(72, 40, ranks, bias=True, generator=rng))
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    x, target = torch.randn(2, 9, 72, generator=rng), torch.randn(2, 9, 40, generator=rng)
    before = layer.packed()
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        next(iter(layer.latents().values()))[0, :2] = torch.tensor([0.0, -0.0])
    packed = layer.train(mode == "train").packed()
    assert not torch.equal(before.paths[0].v, packed.paths[0].v)  # signs did change
    y = layer(x)
    assert torch.equal(y, littlebit_linear(x, packed, backend="reference"))
    kernels = LittleBitLinear.from_packed(packed, activation="exact")(x)
    assert float((y - kernels).detach().abs().max()) <= 1e-5 * float(y.detach().abs().max())


def test_paths_that_share_a_first_stage_stay_one(rng: torch.Generator) -> None:
    first, second = make_packed(64, 32, [16, 16], generator=rng).paths
    shared = PackedPath(first.v, first.in_scale, second.out_scale, second.u, second.latent_scale)
    packed = PackedLinear((first, shared))
    layer = TrainableLittleBitLinear(packed)
    assert_same(layer.packed(), packed)
    assert layer.shape.shares == (0, 0)
    assert sum(name.endswith(".V") for name in layer.state_dict()) == 1
    x = torch.randn(5, 64, generator=rng)
    layer(x).sum().backward()
    both = layer.paths[0].V.grad
    alone = TrainableLittleBitLinear(PackedLinear((first,)))
    alone(x).sum().backward()
    other = TrainableLittleBitLinear(PackedLinear((shared,)))
    other(x).sum().backward()
    torch.testing.assert_close(both, alone.paths[0].V.grad + other.paths[0].V.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["autocast", "input", "cast"])
def test_bfloat16(rng: torch.Generator, how: str) -> None:
    layer = TrainableLittleBitLinear(make_packed(64, 48, [32], bias=True, generator=rng))
    x = torch.randn(6, 64, generator=rng)
    exact = layer(x)
    exact.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    if how == "cast":
        layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = layer(x if how == "autocast" else x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert float((y.float() - exact).detach().norm() / exact.detach().norm()) < 0.02
    y.float().square().mean().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None
        assert p.grad.dtype == p.dtype
        assert float((p.grad.float() - wanted[name]).norm() / wanted[name].norm()) < 0.05, name


def test_activation_checkpointing_gives_the_same_gradients(rng: torch.Generator) -> None:
    layer = TrainableLittleBitLinear(make_packed(64, 48, [16, 24], bias=True, generator=rng))
    x = torch.randn(6, 64, generator=rng, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 11
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_no_tokens(rng: torch.Generator) -> None:
    layer = TrainableLittleBitLinear(make_packed(64, 48, [16], generator=rng))
    y = layer(torch.zeros(0, 64))
    assert y.shape == (0, 48)
    y.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in layer.parameters() if p.grad is not None)


def test_bad_input(rng: torch.Generator) -> None:
    packed = make_packed(64, 48, [16], generator=rng)
    layer = TrainableLittleBitLinear(packed)
    with pytest.raises(ValueError, match=r"x\.size\(-1\) must equal K=64, got shape \[2, 63\]"):
        layer(torch.zeros(2, 63))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        layer(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(TypeError, match="packed must be a PackedLinear, got Linear"):
        TrainableLittleBitLinear(torch.nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="surrogate must be one of smooth-sign, clipped, got 'tanh'"):
        TrainableLittleBitLinear(packed, surrogate="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must have shape \[48, 64\].* got \[64, 48\]"):
        TrainableLittleBitLinear(packed, torch.zeros(64, 48))
    with pytest.raises(ValueError, match="magnitude must be positive, got 0"):
        TrainableLittleBitLinear(packed, magnitude=0)
    single = PackedPath(pack_signs(torch.randn(8, 32, generator=rng)), torch.ones(32), torch.ones(8))
    with pytest.raises(ValueError, match=r"two-stage paths to be trained, got a single-stage"):
        TrainableLittleBitLinear(PackedLinear((single,)))
    with torch.no_grad():
        layer.paths[0].U[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must not contain NaN"):
        layer.packed()
