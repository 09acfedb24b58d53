"""Prepacked layers: every refusal names the argument, and no damaged layer is read out of its bounds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import littlebit2_kernels
from littlebit2_kernels import PackedLinear, littlebit_linear, prepack
from littlebit2_kernels.testing import make_packed, make_problem
from tests.problems import with_equal_in_scales


@pytest.fixture(autouse=True)
def _loaded() -> None:
    littlebit2_kernels.load()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(2, 40).double(), TypeError, "x must be float32, float16 or bfloat16, got torch.float64"),
        (torch.ones(2, 40).int(), TypeError, "x must be float32, float16 or bfloat16, got torch.int32"),
        (torch.ones(2, 40).to_sparse(), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 39), ValueError, r"x.size\(-1\) must equal K=40, got shape \[2, 39\]"),
        (torch.tensor(1.0), ValueError, r"x.size\(-1\) must equal K=40, got shape \[\]"),
        (torch.ones(2, 40, device="meta"), ValueError, "x must be on cpu like the packed layer, got meta"),
    ],
    ids=["list", "float64", "int32", "sparse", "K", "0-d", "device"],
)
def test_bad_x(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        littlebit_linear(x, prepack(make_packed(40, 30, [8])))


@pytest.mark.parametrize("activation", ["exat", "", "EXACT", None, 3, ["exact"]])
def test_unknown_activation(activation: Any) -> None:
    x, packed = make_problem(2, 40, 30, [8])
    message = "activation must be one of auto, exact, int16, int8, sign, float16, int8x2, got "
    for layer in (packed, prepack(packed)):
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match=message):
                littlebit_linear(x, layer, backend=backend, activation=activation)


@pytest.mark.parametrize("activation", ["int16", "int8", "sign"])
def test_activation_that_the_layer_or_backend_cannot_serve(activation: str) -> None:
    x, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(
        ValueError, match=f"activation='{activation}' needs a prepacked layer on the CPU: pass .*prepack"
    ):
        littlebit_linear(x, packed, activation=activation)
    for layer in (packed, prepack(packed)):
        with pytest.raises(ValueError, match=f"'reference' computes exact sums only, got .*'{activation}'"):
            littlebit_linear(x, layer, backend="reference", activation=activation)


def test_bad_layer_and_backend() -> None:
    x, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(TypeError, match="packed must be a PackedLinear or a PrepackedLinear, got Tensor"):
        littlebit_linear(x, prepack(packed).layer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        littlebit_linear(x, prepack(packed), backend="tpu")
    with pytest.raises(littlebit2_kernels.BackendUnavailableError, match="backend='cuda' cannot run"):
        littlebit_linear(x, prepack(packed), backend="cuda")


def test_prepack_refuses() -> None:
    packed = make_packed(40, 30, [8])
    for wrong in (prepack(packed), packed.paths[0], None):
        with pytest.raises(TypeError, match="packed must be a PackedLinear, got "):
            prepack(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed must be on the CPU to be prepacked, got meta"):
        prepack(packed.to("meta"))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, [], "v must hold between 1 and 16 tensors, got 0"),
        (0, [torch.zeros(8, 3, dtype=torch.int32)], r"v\[0\] must have shape \[8, 2\] .* got \[8, 3\]"),
        (0, [torch.zeros(8, 2)], r"v\[0\] must be int32 words, got Float"),
        (
            0,
            [torch.zeros(12, 2, dtype=torch.int32)],
            r"u\[0\]|rank must be a multiple of 8|latent_scale\[0\]",
        ),
        (1, None, "latent_scale must be given exactly when u is"),
        (1, [torch.zeros(29, 1, dtype=torch.int32)], r"u\[0\] must have shape \[30, 1\]"),
        (2, [torch.ones(40).half()], r"in_scale\[0\] must be float32, got Half"),
        (3, [torch.ones(9)], r"latent_scale\[0\] must have shape \[8\]"),
        (4, [torch.ones(60)[::2]], r"out_scale\[0\] must be contiguous"),
        (4, [torch.ones(0)], r"out_scale\[0\] must not be empty"),
    ],
)
def test_the_prepacking_operator_refuses(index: int, value: Any, message: str) -> None:
    operands = list(make_packed(40, 30, [8]).operands)
    operands[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.prepack(*operands)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.ones(2, 40).double(), "x must be float32, float16 or bfloat16, got Double"),
        ("x", torch.ones(2, 41), r"x.size\(-1\) must equal 40, got shape \[2, 41\]"),
        ("x", torch.ones(2, 0), r"x must have a last dimension of size K, got shape \[2, 0\]"),
        ("x", torch.tensor(1.0), r"x must have a last dimension of size K, got shape \[\]"),
        ("layer", torch.zeros(1000), r"layer must be contiguous uint8 \[bytes\] .*, got Float \[1000\]"),
        ("layer", torch.zeros(1000, dtype=torch.int8), "layer must be contiguous uint8 .*, got Char"),
        ("layer", torch.zeros(10, 10, dtype=torch.uint8), r"layer must be contiguous uint8 .* \[10, 10\]"),
        ("layer", torch.zeros(1000, dtype=torch.uint8)[::2], "layer must be contiguous uint8"),
        ("layer", torch.zeros(0, dtype=torch.uint8), "layer must "),
        ("layer", torch.zeros(1000, dtype=torch.uint8), "layer must be made by lb2_prepack_cpu.*1000 bytes"),
        ("bias", torch.ones(30).bfloat16(), "bias must be float32, got BFloat16"),
        ("bias", torch.ones(31), r"bias must have shape \[30\] or \[1, 30\], got \[31\]"),
        ("out_features", 31, "out_features must be 30 as the layer says, got 31"),
        ("out_features", -1, "out_features must be 30 as the layer says, got -1"),
        ("activation", 5, "activation must be between 0 and 4, or 6, got 5"),
        ("activation", -1, "activation must be between 0 and 4, or 6, got -1"),
        ("activation", 2**32 + 1, "activation must be between 0 and 4, or 6, got 4294967297"),
    ],
)
def test_the_operator_refuses(name: str, value: Any, message: str) -> None:
    x, packed = make_problem(2, 40, 30, [8], bias=True)
    arguments = {
        "x": x,
        "layer": prepack(packed).layer,
        "bias": packed.bias,
        "out_features": 30,
        "activation": 0,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.linear_prepacked(**{**arguments, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grad", torch.ones(2, 31), r"grad.size\(-1\) must equal 30, got shape \[2, 31\]"),
        ("grad", torch.ones(2, 30).double(), "grad must be float32, float16 or bfloat16, got Double"),
        ("layer", torch.zeros(9, dtype=torch.uint8), "layer must be made by lb2_prepack_cpu"),
        ("in_features", 41, "in_features must be 40 as the layer says, got 41"),
    ],
)
def test_the_backward_operator_refuses(name: str, value: Any, message: str) -> None:
    layer = prepack(make_packed(40, 30, [8])).layer
    arguments = {"grad": torch.ones(2, 30), "layer": layer, "in_features": 40}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.littlebit2.linear_prepacked_backward_x(**{**arguments, name: value})


def test_tensors_on_different_devices_are_refused() -> None:
    """One tensor on the meta device is enough to reach the fakes, which must not make results of nothing."""
    x, packed = make_problem(2, 40, 30, [8], bias=True)
    layer = prepack(packed).layer
    linear, backward = torch.ops.littlebit2.linear_prepacked, torch.ops.littlebit2.linear_prepacked_backward_x
    with pytest.raises(RuntimeError, match="x and the layer must be on one device, got cpu and meta"):
        linear(x, layer.to("meta"), None, 30, 0)
    with pytest.raises(RuntimeError, match="x and the layer must be on one device, got meta and cpu"):
        linear(x.to("meta"), layer, None, 30, 0)
    with pytest.raises(RuntimeError, match="x and the layer must be on one device, got cpu and meta"):
        linear(x, layer, packed.bias.to("meta"), 30, 0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="grad and the layer must be on one device, got cpu and meta"):
        backward(torch.ones(2, 30), layer.to("meta"), 40)


def test_too_many_tokens() -> None:
    prepacked = prepack(make_packed(1, 30, [8]))
    with pytest.raises(RuntimeError, match="m must be between 0 and 2147483647, got 2147483648"):
        littlebit_linear(torch.ones(1, 1).expand(2**31, 1), prepacked)


# --- damaged layers --------------------------------------------------------------------------------------

HEADER_BYTES = 24  # magic, k, n, num_paths, single_stage; 12 more for each path


def damageable() -> list[PackedLinear]:
    generator = torch.Generator().manual_seed(1)
    stacked = with_equal_in_scales(make_packed(800, 60, [24, 8, 16], generator=generator))
    return [
        make_packed(40, 30, [8], generator=generator),
        make_packed(1500, 130, [40, 40], share_v=True, generator=generator),
        make_packed(33, 200, None, generator=generator),
        stacked,
    ]


def use(layer: torch.Tensor, in_features: int, out_features: int) -> list[str]:
    """Errors of everything that reads a layer."""
    errors: list[str] = []
    linear, backward = torch.ops.littlebit2.linear_prepacked, torch.ops.littlebit2.linear_prepacked_backward_x
    for call in (
        lambda: linear(torch.ones(3, in_features), layer, None, out_features, 1),
        lambda: linear(torch.ones(3, in_features), layer, None, out_features, 4),
        lambda: backward(torch.ones(3, out_features), layer, in_features),
        lambda: torch.ops.littlebit2.unprepack(layer),
    ):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("which", range(4))
def test_a_layer_of_any_other_length_is_refused(which: int) -> None:
    packed = damageable()[which]
    layer = prepack(packed).layer
    lengths = {*range(200), *range(layer.numel() - 70, layer.numel()), layer.numel() // 2}
    for length in sorted(n for n in lengths if 0 <= n < layer.numel()):
        errors = use(layer[:length].clone(), packed.in_features, packed.out_features)
        assert len(errors) == 4, f"{length} bytes"
        assert all("layer" in error for error in errors)
    longer = torch.cat([layer, layer.new_zeros(64)])
    assert len(use(longer, packed.in_features, packed.out_features)) == 4


@pytest.mark.parametrize("which", range(4))
def test_no_damaged_header_is_read_out_of_bounds(which: int) -> None:
    """Some damage is another layer of the same size, and is served as that; the rest is refused."""
    packed = damageable()[which]
    layer = prepack(packed).layer
    refused = 0
    header = HEADER_BYTES + 12 * len(packed.paths)
    for index in range(header):
        for value in {0, 1, 127, 128, 255, *(int(layer[index]) ^ (1 << bit) for bit in range(8))}:
            damaged = layer.clone()
            damaged[index] = value
            errors = use(damaged, packed.in_features, packed.out_features)
            refused += bool(errors)
            if index < 8 and value != layer[index]:
                assert len(errors) == 4, "the magic must be whole"
    assert refused > header * 8


@pytest.mark.parametrize("which", range(4))
def test_no_random_header_is_read_out_of_bounds(which: int) -> None:
    packed = damageable()[which]
    layer, draw = prepack(packed).layer, random.Random(which)
    interesting = (0, 1, 2, 8, 15, 16, 17, 31, 32, 255, 2**15, 2**30, 2**31 - 1, 2**31 - 8, -1, -8, -(2**31))
    for _ in range(400):
        damaged = layer.clone()
        fields = damaged[8 : HEADER_BYTES + 12 * len(packed.paths)].clone().view(torch.int32)
        for _ in range(draw.randint(1, 4)):
            fields[draw.randrange(len(fields))] = draw.choice(interesting)
        damaged[8 : 8 + 4 * len(fields)] = fields.view(torch.uint8)
        use(damaged, packed.in_features, packed.out_features)


def test_random_bytes_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    magic = prepack(make_packed(40, 30, [8])).layer[:8]
    for length in (8, 24, 36, 64, 640, 5000):
        noise = torch.randint(0, 256, (length,), generator=generator).to(torch.uint8)
        assert len(use(noise, 40, 30)) == 4
        noise[:8] = magic
        assert len(use(noise, 40, 30)) == 4


@pytest.mark.parametrize("every_byte", [255, 127, 0])
def test_damaged_signs_and_scales_are_computed_with(every_byte: int) -> None:
    """Whatever the bytes behind the header are, nothing but the result changes."""
    for packed in damageable():
        layer = prepack(packed).layer.clone()
        layer[HEADER_BYTES + 12 * len(packed.paths) :] = every_byte
        assert not use(layer, packed.in_features, packed.out_features)


def test_a_header_whose_size_overflows_is_refused() -> None:
    """Sixteen stacked first stages of the largest size are more than 2^63 bytes."""
    fields = [2**31 - 1, 1, 16, 0]
    for path in range(16):
        fields += [2**31 - 8, path, 0]
    magic = prepack(make_packed(40, 30, [8])).layer[:8]
    header = torch.tensor(fields, dtype=torch.int32).view(torch.uint8)
    layer = torch.cat([magic, header, torch.zeros(1000, dtype=torch.uint8)])
    with pytest.raises(
        RuntimeError, match=r"the layer must fit 72057594037927936 bytes|an impossible header"
    ):
        torch.ops.littlebit2.unprepack(layer)
