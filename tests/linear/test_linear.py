"""``LittleBitLinear`` as a module: construction, state, devices, dtypes, copies."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from littlebit2_kernels import (
    LittleBitLinear,
    PackedLinear,
    PackedPath,
    packed_from_state,
    packed_to_state,
)
from littlebit2_kernels.reference import dense_weight, linear_reference
from littlebit2_kernels.testing import make_packed, make_problem, relative_error

LAYERS: dict[str, dict[str, Any]] = {
    "one-path": {"ranks": [40]},
    "two-paths": {"ranks": [40, 16], "bias": True},
    "three-paths": {"ranks": [8, 72, 24]},
    "shared-v": {"ranks": [24, 24], "share_v": True, "bias": True},
    "single-stage": {"ranks": None, "bias": True},
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(
    request: pytest.FixtureRequest, rng: torch.Generator
) -> tuple[torch.Tensor, PackedLinear, LittleBitLinear]:
    options = dict(LAYERS[request.param])
    x, packed = make_problem(5, 100, 70, options.pop("ranks"), generator=rng, **options)
    return x, packed, LittleBitLinear.from_packed(packed)


Layer = tuple[torch.Tensor, PackedLinear, LittleBitLinear]


def twin(module: LittleBitLinear, **options: Any) -> LittleBitLinear:
    """An empty layer of the same structure."""
    return LittleBitLinear(
        module.in_features,
        module.out_features,
        module.shape.ranks,
        module.bias is not None,
        shares=module.shape.shares,
        **options,
    )


def test_forward(layer: Layer) -> None:
    x, packed, module = layer
    assert relative_error(module(x), linear_reference(x, packed)) <= 2e-6
    assert module(x.reshape(5, 1, 100)).shape == (5, 1, 70)
    assert relative_error(twin(module, backend="reference")(x), torch.zeros(5, 70)) == 0.0


def test_packed_views_the_buffers(layer: Layer) -> None:
    _, packed, module = layer
    view = module.packed
    assert view.shape == packed.shape == module.shape
    assert torch.equal(dense_weight(view), dense_weight(packed))
    assert view.paths[0].v.data_ptr() == packed.paths[0].v.data_ptr()


def test_state_dict_round_trip(layer: Layer) -> None:
    x, _, module = layer
    other = twin(module)
    assert not other(x).any()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))


def test_meta_construction_and_assignment(layer: Layer) -> None:
    x, _, module = layer
    other = twin(module, device="meta")
    assert all(b.is_meta for b in other.buffers())
    assert other(x.to("meta")).shape == (5, 70)
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_scales_stay_float32(layer: Layer, cast: str) -> None:
    x, _, module = layer
    expected = module(x)
    changed = module.to(torch.float16) if cast == "to" else getattr(module, cast)()
    assert changed is module
    assert {t.dtype for t in module.state_dict().values()} == {torch.float32, torch.int32, torch.int64}
    assert torch.equal(module(x), expected)
    assert module(x.half()).dtype == torch.float16


def test_a_model_moves_to_half_with_its_dense_layers(layer: Layer) -> None:
    x, _, module = layer
    model = nn.Sequential(nn.Linear(100, 100), module).to("cpu", torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert model.to("meta")[1].u1.is_meta


def test_copies_are_equal_and_independent(layer: Layer) -> None:
    x, _, module = layer
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        other.u1.zero_()
        assert torch.equal(module(x), expected)


def test_resident_memory_is_the_packed_size() -> None:
    """Of the process: no unpacked copy may live anywhere, during the call or after it."""
    script = """
import resource, torch
from littlebit2_kernels import LittleBitLinear
from littlebit2_kernels.testing import make_problem
LittleBitLinear(64, 64, [8])(torch.ones(1, 64))  # what the first call brings in for good
x = torch.ones(4, 4096)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, resident_before = peak(), resident()
module = LittleBitLinear(4096, 16384, [1024, 1024])
portable = module.nbytes
for _ in range(3):
    module(x)
print(peak() - before, resident() - resident_before, portable, module.nbytes)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    growth, resident, packed_bytes, prepacked_bytes = map(int, result.stdout.split())
    assert packed_bytes == 4 * (2 * (1024 * 128 + 16384 * 32) + 2 * (4096 + 1024 + 16384) + 16384) + 4 * 16
    assert prepacked_bytes <= 1.1 * packed_bytes
    # The unpacked factors would be 168 MB in float32 and 42 MB in int8. While the first call brings the
    # layer to the layout of the CPU it is there twice, afterwards once.
    assert growth <= 2.2 * packed_bytes + 8 * 2**20
    assert resident <= 1.1 * packed_bytes + 8 * 2**20


def test_extra_repr() -> None:
    text = repr(LittleBitLinear(64, 32, [16, 8], bias=False))
    assert text.startswith(
        "LittleBitLinear(in_features=64, out_features=32, ranks=[16, 8], bias=False, "
        "counted_bpw=2.81, stored_bpw="
    )
    assert "single_stage=True" in repr(LittleBitLinear(64, 32, None))


# --- loading what others wrote -------------------------------------------------------------------------


def as_upstream(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same layer under the authors' names: v1 and u2 instead of latent_scale, 16-bit scales, extras."""
    upstream: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("latent_scale"):
            suffix = name.removeprefix("latent_scale")
            upstream[f"v1{suffix}"] = torch.full_like(tensor, 0.5).to(dtype)
            upstream[f"u2{suffix}"] = (tensor * 2).to(dtype)
        else:
            upstream[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    extras = {
        "_eff_bit_target": torch.tensor(1.0),
        "_split_dim_final": torch.tensor(40),
        "_eff_bit_actual": torch.tensor(0.9),
    }
    return upstream | extras


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_loads_the_authors_names(layer: Layer, dtype: torch.dtype, assign: bool) -> None:
    _, _, module = layer
    other = twin(module)
    model = nn.ModuleDict({"proj": other})
    state = as_upstream(module.state_dict(), dtype)
    model.load_state_dict({f"proj.{name}": tensor for name, tensor in state.items()}, assign=assign)
    expected = {
        name: tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def flip_a_pad_bit(state: dict[str, torch.Tensor]) -> None:
    state["V_packed"] = state["V_packed"].clone()
    state["V_packed"][3, -1] |= -(2**31)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("m.q_proj.", "m.q_proj.u1 is missing: layer 'm.q_proj' has U_packed, U_packed_R, U_shape, "),
        ("m.q_proj", "prefix must end with a dot to name a layer, got 'm.q_proj'"),
        (
            "m.k_proj.",
            "state must hold tensors of layer 'm.k_proj' under prefix='m.k_proj.', got m.q_proj.U_",
        ),
        ("", "V_packed is missing; there are m.q_proj.U_packed, m.q_proj.U_packed_R, "),
    ],
)
def test_a_missing_tensor_is_named_with_its_layer(prefix: str, message: str, rng: torch.Generator) -> None:
    state = packed_to_state(make_packed(64, 32, [16, 8], generator=rng))
    del state["u1"]
    named = {f"m.q_proj.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(KeyError) as caught:
        packed_from_state(named, prefix)
    assert message in caught.value.args[0]
    assert " is missing" in caught.value.args[0]


BAD_STATES: dict[str, tuple[Any, str]] = {
    "half-pair": (
        lambda s: s.update(v1_R=s.pop("latent_scale_R")),
        "u2_R is missing",
    ),
    "pair-and-product": (
        lambda s: s.update(v1=s["latent_scale"], u2=s["latent_scale"]),
        "latent_scale must not be stored together with v1 and u2",
    ),
    "unequal-pair": (
        lambda s: s.update(v1=s.pop("latent_scale"), u2=torch.ones(1, 41)),
        r"u2 must have as many entries as v1 \(40\), got 41",
    ),
    "truncated": (
        lambda s: s.update(U_packed=s["U_packed"][:-1]),
        "U_shape = .* does not agree with U_packed",
    ),
    "float-words": (
        lambda s: s.update(V_packed=s["V_packed"].float()),
        "v must be int32 words",
    ),
    "V_shape": (lambda s: s.update(V_shape=torch.tensor([40, 99])), r"V_shape = \[40, 99\] does not agree"),
    "U_shape": (lambda s: s.update(U_shape=torch.tensor([70, 48])), r"U_shape = \[70, 48\] does not agree"),
    "int32-shape": (
        lambda s: s.update(V_shape=s["V_shape"].int()),
        "V_shape must hold 2 int64",
    ),
    "nan": (
        lambda s: s.update(u1=torch.full((1, 70), math.nan)),
        "out_scale must be finite, got nan",
    ),
    "infinite": (lambda s: s.update(v2_R=torch.full((1, 100), math.inf)), "in_scale must be finite, got inf"),
    "v2": (lambda s: s.update(v2=torch.ones(1, 101)), r"V_shape = \[40, 100\] does not agree"),
    "pad-bits": (flip_a_pad_bit, r"v has non-zero pad bits past column 100 \(first in row 3\)"),
    "int-scale": (
        lambda s: s.update(u1=s["u1"].long()),
        "u1 must be .*, got torch.int64",
    ),
    "double-scale": (lambda s: s.update(u1=s["u1"].double()), "u1 must be .*, got torch.float64"),
    "complex-scale": (
        lambda s: s.update(u1=s["u1"].to(torch.complex64)),
        "u1 must be .* torch.complex64",
    ),
    "folded-scale": (lambda s: s.update(u1=s["u1"].view(7, 10)), r"u1 must have shape .*, got \[7, 10\]"),
    "text": (lambda s: s.update(u1="text"), "u1 must be a torch.Tensor, got str"),
    "text-words": (lambda s: s.update(V_packed="text"), "V_packed must be a torch.Tensor, got str"),
}


@pytest.mark.parametrize("lacking", [None, "bias"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_is_refused_and_changes_nothing(
    name: str, lacking: str | None, rng: torch.Generator
) -> None:
    spoil, message = BAD_STATES[name]
    module = LittleBitLinear.from_packed(make_packed(100, 70, [40, 16], bias=True, generator=rng))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = LittleBitLinear.from_packed(make_packed(100, 70, [40, 16], bias=True, generator=rng)).state_dict()
    spoil(state)
    # A tensor that is not there must not keep the others from being looked at.
    state.pop(lacking, None)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=lacking is None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["U_packed_R", "V_shape", "latent_scale"])
def test_missing_and_unexpected_keys_are_reported(name: str, rng: torch.Generator) -> None:
    module = LittleBitLinear.from_packed(make_packed(100, 70, [40, 16], generator=rng))
    state = LittleBitLinear.from_packed(make_packed(100, 70, [40, 16], generator=rng)).state_dict()
    kept = module.state_dict()[name].clone()
    del state[name]
    state["extra"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        module.load_state_dict(state)
    keys = module.load_state_dict(state, strict=False)
    assert keys.missing_keys == [name]
    assert torch.equal(module.state_dict()[name], kept)
    assert torch.equal(module.u1, state["u1"])


def test_part_of_a_layer_loads_onto_the_meta_device(rng: torch.Generator) -> None:
    module = LittleBitLinear(64, 48, [16], device="meta")
    state = LittleBitLinear(64, 48, [16], device="cpu").state_dict()
    del state["bias"]
    assert module.load_state_dict(state, strict=False, assign=True).missing_keys == ["bias"]
    assert module.bias.is_meta
    assert not module.u1.is_meta


def test_fake_tensors() -> None:
    with torch._subclasses.FakeTensorMode():
        module = LittleBitLinear(64, 48, [16, 16])
        assert module(torch.ones(3, 64)).shape == (3, 48)
        assert module.packed.ranks == (16, 16)
    real = LittleBitLinear(64, 48, [16, 16])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert real.packed.ranks == (16, 16)


def test_strided_entries_are_assigned_dense(rng: torch.Generator) -> None:
    x, packed = make_problem(3, 64, 48, [16], generator=rng)
    source = LittleBitLinear.from_packed(packed)
    state = {name: torch.stack([t, t], -1)[..., 0] for name, t in source.state_dict().items()}
    assert not state["u1"].is_contiguous()
    module = LittleBitLinear(64, 48, [16], bias=False, device="meta")
    module.load_state_dict(state, assign=True)
    assert torch.equal(module(x), source(x))


def test_structures_must_agree(rng: torch.Generator) -> None:
    module = LittleBitLinear(100, 70, [16], bias=False)
    other = LittleBitLinear.from_packed(make_packed(100, 70, [24], generator=rng))
    # Ranks 16 and 24 of U occupy the same words; the stored shapes tell them apart.
    with pytest.raises(RuntimeError, match=r"shape K=100, N=70, ranks=\[16\], got K=100, N=70, ranks=\[24\]"):
        module.load_state_dict(other.state_dict())
    shared = LittleBitLinear(100, 70, [8, 8, 8], bias=False, shares=(0, 1, 0))
    state = LittleBitLinear(100, 70, [8, 8, 8], bias=False, shares=(0, 1, 1)).state_dict()
    with pytest.raises(RuntimeError, match=r"shape .*shares=\[0, 1, 0\], got .*shares=\[0, 1, 1\]"):
        shared.load_state_dict(state)


# --- construction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features must be between 1 and 2147483647, got 0"),
        ({"out_features": -3}, "out_features must be between 1 and 2147483647, got -3"),
        ({"ranks": [12]}, r"ranks\[0\] must be between 1 and 2147483647 and a multiple of 8, got 12"),
        ({"ranks": []}, "a layer must have between 1 and 16 paths, got 0"),
        (
            {"ranks": [8, 16], "shares": (0, 0)},
            r"shares\[1\] must name path 1 itself or .* of rank 16, got 0",
        ),
        ({"in_features": 2**31}, "in_features must be between 1 and 2147483647, got 2147483648"),
        ({"ranks": [8] * 17}, "a layer must have between 1 and 16 paths, got 17"),
        ({"backend": "gpu"}, "backend must be one of auto, cpu, cuda, triton, blas, reference, got 'gpu'"),
        ({"ranks": [8], "shares": (0, 0)}, r"shares must name one path per rank \(1\), got 2"),
        ({"ranks": [8, 8], "shares": (1, 1)}, r"shares\[0\] must name path 0"),
        ({"ranks": [8, 8], "shares": (0, -1)}, r"shares\[1\] must name path 1 itself"),
    ],
)
def test_bad_structure(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LittleBitLinear(**{"in_features": 32, "out_features": 16, "ranks": [8], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": "a"}, "in_features must be an integer, got 'a'"),
        ({"out_features": 5.0}, "out_features must be an integer, got 5.0"),
        ({"ranks": 8}, "ranks must be a sequence of integers or None, got int"),
        ({"ranks": [8.0]}, r"ranks\[0\] must be an integer, got 8.0"),
    ],
)
def test_bad_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LittleBitLinear(**{"in_features": 32, "out_features": 16, "ranks": [8], **arguments})


def test_from_packed_refuses() -> None:
    with pytest.raises(TypeError, match="packed must be a PackedLinear, got Linear"):
        LittleBitLinear.from_packed(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 31), ValueError, r"x.size\(-1\) must equal K=32, got shape \[2, 31\]"),
        (torch.ones(2, 32).double(), TypeError, "x must be float32, float16 or bfloat16, got torch.float64"),
        (torch.ones(2, 32).to_sparse(), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, 32, device="meta"), ValueError, "x must be on cpu like the packed layer, got meta"),
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
    ],
    ids=["K", "dtype", "sparse", "device", "list"],
)
def test_forward_refuses_bad_input(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LittleBitLinear(32, 16, [8])(x)


def test_a_layer_without_values_does_not_compute(rng: torch.Generator) -> None:
    module = LittleBitLinear(32, 16, [8], device="meta")
    with pytest.raises(ValueError, match="x must be on meta like the packed layer, got cpu"):
        module(torch.ones(2, 32))
    module.load_state_dict(LittleBitLinear(32, 16, [8]).state_dict(), assign=True)
    module.v2 = module.v2.to("meta")
    with pytest.raises(ValueError, match="in_scale must be on cpu like v, got meta"):
        module(torch.ones(2, 32))
    module.auto_prepack = False
    with pytest.raises(RuntimeError, match="x and the layer must be on one device, got cpu and meta"):
        module(torch.ones(2, 32))


def test_autocast_decides_the_dtype_as_for_a_dense_layer(rng: torch.Generator) -> None:
    x, packed = make_problem(4, 64, 48, [16], generator=rng)
    module = LittleBitLinear.from_packed(packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16()))
    assert module(x).dtype == torch.float32


def test_dequantize(layer: Layer) -> None:
    _, packed, module = layer
    assert relative_error(module.dequantize(), dense_weight(packed)) <= 2e-6
    assert module.dequantize(torch.float64).dtype == torch.float64


def test_tensors_that_share_memory_load_apart(rng: torch.Generator) -> None:
    first, second = make_packed(40, 30, [8, 8], generator=rng).paths
    packed = PackedLinear(
        (first, PackedPath(second.v, second.in_scale, first.out_scale, second.u, second.latent_scale))
    )
    module = LittleBitLinear.from_packed(packed)
    other = LittleBitLinear.from_packed(make_packed(40, 30, [8, 8], generator=rng))
    module.load_state_dict(other.state_dict())
    assert not torch.equal(other.u1, other.u1_R)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_authors_names_of_a_residual_path_load(rng: torch.Generator) -> None:
    packed = make_packed(100, 40, [24, 24], generator=rng)
    renamed = {
        name.replace("U_packed_R", "U_R_packed")
        .replace("V_packed_R", "V_R_packed")
        .replace("U_shape_R", "U_R_shape")
        .replace("V_shape_R", "V_R_shape"): tensor
        for name, tensor in packed_to_state(packed).items()
    }
    assert "U_R_packed" in renamed
    layer = LittleBitLinear(100, 40, [24, 24], bias=False)
    layer.load_state_dict(dict(renamed))
    assert torch.equal(layer.packed.paths[1].v, packed.paths[1].v)
    assert torch.equal(packed_from_state(renamed).paths[1].u, packed.paths[1].u)
    both = {**renamed, "U_packed_R": renamed["U_R_packed"]}
    with pytest.raises(ValueError, match="U_packed_R must not be stored twice"):
        packed_from_state(both)
    with pytest.raises(RuntimeError, match="U_packed_R must not be stored twice"):
        layer.load_state_dict(both)


@pytest.mark.parametrize("prepacked", [False, True])
def test_a_bias_may_be_a_parameter(rng: torch.Generator, prepacked: bool) -> None:
    x, packed = make_problem(3, 64, 24, [16], bias=True, generator=rng)
    module = LittleBitLinear.from_packed(packed)
    if prepacked:
        module.prepack_()
    expected = module(x)
    assert module.bias is not None
    module.bias = torch.nn.Parameter(module.bias.clone())
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    y = module(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert module.bias.grad is not None
    assert torch.equal(module.bias.grad, torch.full((24,), 3.0))
    assert torch.equal(module.packed.bias, module.bias)  # type: ignore[arg-type]
    assert "bias=True" in repr(module)
    assert "bias" in module.state_dict()
    assert module.half().bias.dtype == torch.float32
