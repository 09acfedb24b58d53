"""The C++ client in examples/cpp: its results are Python's, bit by bit, and bad files do it no harm."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from littlebit2_kernels import PackedLinear, littlebit_linear, packed_from_state, packed_to_state, prepack
from littlebit2_kernels.testing import make_packed
from tests.project.clients.example import build_client, copy_prefix

LAYER = "model.layers.0.mlp.up_proj"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    # The prefix is where nobody installed it, in a path that needs quotes.
    return build_client(folder, copy_prefix(folder / "moved here"))


def write(path: Path, state: State, layer: str = LAYER) -> Path:
    """Save a layer beside tensors of other layers, one of which has a name that begins like it."""
    named = {f"{layer}.{name}": tensor.contiguous() for name, tensor in state.items()}
    others = {
        "model.embed_tokens.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        f"{layer}_norm.weight": torch.zeros(7),
        "model.norm.scale": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    }
    save_file({**named, **others}, path, {"format": "pt", "note": 'quoted "text" \\ \u00e9 \U0001f600'})
    return path


def run(client: Path, file: Path, x: Path, y: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [client, file, LAYER, x, y, *options],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=120,
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def compute(
    client: Path, folder: Path, file: Path, x: torch.Tensor, packed: PackedLinear, *options: str
) -> torch.Tensor:
    """y of the client."""
    (name,) = [name for name, dtype in DTYPES.items() if dtype == x.dtype]
    (folder / "x").write_bytes(raw(x))
    done = run(client, file, folder / "x", folder / "y", "--dtype", name, *options)
    assert done.returncode == 0, done.stderr
    bytes_read = bytearray((folder / "y").read_bytes())
    return torch.frombuffer(bytes_read, dtype=x.dtype).reshape(len(x), packed.out_features)


def upstream(state: State) -> State:
    """The layer as the authors write it: 16-bit scales, latent scales as two factors, other names."""
    written: State = {}
    for name, tensor in state.items():
        if name.startswith("latent_scale"):
            suffix = name.removeprefix("latent_scale")
            written[f"v1{suffix}"] = tensor.bfloat16()
            written[f"u2{suffix}"] = torch.full_like(tensor, 0.75).half()
        elif name.endswith("_R") and name[:2] in ("U_", "V_"):
            written[f"{name[0]}_R_{name[2:-2]}"] = tensor
        else:
            written[name] = tensor.bfloat16() if name[:2] in ("u1", "v2") else tensor
    return {**written, "_split_dim_final": torch.tensor(8)}


LAYERS: dict[str, Callable[[torch.Generator], State]] = {
    "one path": lambda rng: packed_to_state(make_packed(100, 75, [40], generator=rng)),
    "two paths, bias": lambda rng: packed_to_state(make_packed(97, 130, [40, 8], bias=True, generator=rng)),
    "shared V": lambda rng: packed_to_state(make_packed(64, 33, [24, 24], share_v=True, generator=rng)),
    "single stage": lambda rng: packed_to_state(make_packed(70, 45, None, bias=True, generator=rng)),
    "authors": lambda rng: upstream(packed_to_state(make_packed(96, 50, [16, 8], generator=rng))),
    "16 paths": lambda rng: packed_to_state(make_packed(40, 20, [8] * 16, generator=rng)),
}


def test_an_unknown_layer_is_named_with_near_ones(client: Path, tmp_path: Path, rng: torch.Generator) -> None:
    state = packed_to_state(make_packed(32, 32, [8], generator=rng))
    names = [LAYER.replace("0", "11"), "model.layers.7.self_attn.q_proj"]
    tensors = {f"{name}.{leaf}": one.clone() for name in names for leaf, one in state.items()}
    save_file(tensors, tmp_path / "file")
    done = run(client, tmp_path / "file", tmp_path / "x", tmp_path / "y")
    assert done.returncode != 0
    assert f"holds no layer {LAYER}; it has 2 layers, such as {', '.join(names)}" in done.stderr


@pytest.mark.parametrize("layer", LAYERS)
def test_results_are_those_of_python(client: Path, tmp_path: Path, rng: torch.Generator, layer: str) -> None:
    state = LAYERS[layer](rng)
    packed = packed_from_state({f"{LAYER}.{name}": tensor for name, tensor in state.items()}, f"{LAYER}.")
    file = write(tmp_path / "model.safetensors", state)
    fast = prepack(packed)
    x = torch.randn(9, packed.in_features, generator=rng)
    for dtype in DTYPES.values():
        expected = littlebit_linear(x.to(dtype), fast)
        for options in ((), ("--threads", "3", "--requests", "4"), ("--threads", "2", "--requests", "16")):
            y = compute(client, tmp_path, file, x.to(dtype), packed, *options)
            assert torch.equal(y, expected), (dtype, options)


def test_many_requests_share_the_threads(client: Path, tmp_path: Path, rng: torch.Generator) -> None:
    packed = make_packed(512, 768, [64, 32], bias=True, generator=rng)
    file = write(tmp_path / "model.safetensors", packed_to_state(packed))
    x = torch.randn(257, 512, generator=rng)
    y = compute(client, tmp_path, file, x, packed, "--threads", "4", "--requests", "64")
    assert torch.equal(y, littlebit_linear(x, prepack(packed)))


def test_no_tokens(client: Path, tmp_path: Path, rng: torch.Generator) -> None:
    file = write(tmp_path / "model.safetensors", LAYERS["one path"](rng))
    (tmp_path / "x").write_bytes(b"")
    done = run(client, file, tmp_path / "x", tmp_path / "y")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "y").read_bytes() == b""


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda state: {key: change(t) if key == name else t for key, t in state.items()}


def with_pad_bit(words: torch.Tensor) -> torch.Tensor:
    changed = words.clone()
    changed[5, -1] |= 1 << 20
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("V_packed"), f"{LAYER}.V_packed is missing"),
        (without("U_shape_R"), f"{LAYER}.U_shape_R is missing"),
        (without("u1_R"), f"{LAYER}.U_packed_R is unexpected"),
        (without("latent_scale"), f"{LAYER}.v1 is missing"),
        (lambda state: {**state, "qweight": torch.zeros(2)}, f"{LAYER}.qweight is unexpected"),
        (replaced("V_packed", with_pad_bit), f"{LAYER}.V_packed has a pad bit set in row 5"),
        (replaced("V_packed", lambda t: t[:-1]), "must be I32 of shape [40, 4], got I32 of shape [39, 4]"),
        (replaced("V_packed", lambda t: t.long()), "got I64 of shape [40, 4]"),
        (replaced("V_shape", lambda t: t * 0), "must be between 1 and 2^31 - 1, got 0"),
        (replaced("V_shape", lambda t: t - t - 5), "must be between 1 and 2^31 - 1, got -5"),
        (replaced("V_shape", lambda t: t.repeat(2)), "V_shape must hold 2 of I64"),
        (replaced("u1", lambda t: t / 0), "u1 holds a value that is not finite"),
        (replaced("v2", lambda t: t[:, 1:]), "v2 must be F32, F16 or BF16 with 97 entries"),
        (replaced("bias", lambda t: t.int()), "bias must be F32, F16 or BF16 with 130 entries, got I32"),
        (lambda state: {**state, "V_shared_R": torch.tensor([1])}, "V_shared_R must name an earlier path"),
        (lambda state: {**state, "V_shared_R": torch.tensor([-1])}, "V_shared_R must name an earlier path"),
        (lambda state: {**state, "v1": state["latent_scale"].clone()}, "must not be stored together with"),
    ],
)  # fmt: skip
def test_wrong_layers_are_refused(
    client: Path,
    tmp_path: Path,
    rng: torch.Generator,
    change: Callable[[State], State],
    message: str,
) -> None:
    state = change(LAYERS["two paths, bias"](rng))
    file = write(tmp_path / "model.safetensors", state)
    (tmp_path / "x").write_bytes(bytes(4 * 97))
    done = run(client, file, tmp_path / "x", tmp_path / "y")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "y").exists()


def file_of(header: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: object) -> str:
    return json.dumps({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have at least 8 bytes, got 0"),
        (b"1234567", "must have at least 8 bytes, got 7"),
        (file_of("{}", length=3), "says that its header has 3 bytes, but the file has 10"),
        (file_of("{}", length=2**64 - 1), "says that its header has 18446744073709551615 bytes"),
        (file_of("{}", length=2**63), "says that its header has 9223372036854775808 bytes"),
        (file_of(""), "expected '{' at byte 0"),
        (file_of("{} x"), "text after the end at byte 3"),
        (file_of("[]"), "expected '{'"),
        (file_of('{"a"'), "expected ':'"),
        (file_of('{"a'), "an unfinished string"),
        (file_of(b'{"a\x00'), "a control character in a string"),
        (file_of('{"\\u12'), "an unfinished escape"),
        (file_of('{"\\ud800x'), "half of a surrogate pair"),
        (file_of('{"\\udc00"'), "half of a surrogate pair"),
        (file_of('{"\\x"'), "an unknown escape"),
        (file_of('{"a": 1}'), "expected '{'"),
        (file_of('{"a": {}}'), "tensor a lacks dtype, shape or data_offsets"),
        (file_of(f'{{"a": {entry(extra=[1])}}}', bytes(8)), "tensor a has an entry extra"),
        (file_of(f'{{"a": {entry(shape=[-2])}}}', bytes(8)), "expected a number that is not negative"),
        (file_of(f'{{"a": {entry(shape=[2.5])}}}', bytes(8)), "expected ']'"),
        (file_of(f'{{"a": {entry(shape=[2**63])}}}', bytes(8)), "a number that is too large"),
        (file_of(f'{{"a": {entry(shape=[2**40] * 2)}}}', bytes(8)), "tensor a has a shape that is too large"),
        (file_of(f'{{"a": {entry(shape=[3])}}}', bytes(8)), "tensor a must have 12 bytes, got 8"),
        (file_of(f'{{"a": {entry()}}}', bytes(7)), "do not lie in the file's 7 bytes of data"),
        (file_of(f'{{"a": {entry(data_offsets=[8, 0])}}}', bytes(8)), "do not lie in the file's 8 bytes"),
        (file_of(f'{{"a": {entry(data_offsets=[0, 8, 8])}}}', bytes(8)), "do not lie in the file's 8 bytes"),
        (file_of(f'{{"a": {entry()}}}', bytes(9)), "tensors must fill 9 bytes of data, got 8"),
        (file_of(f'{{"a": {entry()}, "a": {entry()}}}', bytes(8)), "has tensor a twice"),
        (file_of(f'{{"a": {entry()}, "b": {entry(data_offsets=[4, 12])}}}', bytes(12)), "tensors overlap"),
        (file_of('{"__metadata__": {"a": 1}}'), "expected '\"'"),
        (file_of('{"__metadata__": {}, "__metadata__": {}}'), "has __metadata__ twice"),
        (file_of("{}"), "holds no packed layer"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(client: Path, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    (tmp_path / "x").write_bytes(b"")
    done = run(client, file, tmp_path / "x", tmp_path / "y")
    assert done.returncode == 1
    assert message in done.stderr


def test_wrong_arguments_are_refused(client: Path, tmp_path: Path, rng: torch.Generator) -> None:
    file = write(tmp_path / "model.safetensors", LAYERS["one path"](rng))
    x, y = tmp_path / "x", tmp_path / "y"
    x.write_bytes(bytes(399))
    cases = [
        ((file, x, y), "must hold rows of 400 bytes, got 399 bytes"),
        ((file, tmp_path / "none", y), "none cannot be opened"),
        ((tmp_path / "none", x, y), "none cannot be opened"),
        ((tmp_path, x, y), "is not a file"),
        ((file, x, y, "--dtype", "int8"), "--dtype must be float32, float16 or bfloat16, got int8"),
        ((file, x, y, "--threads", "0"), "--threads must be between 1 and 1024, got 0"),
        ((file, x, y, "--threads", "2x"), "--threads must be between 1 and 1024, got 2x"),
        ((file, x, y, "--requests"), "--requests needs a value"),
        ((file, x, y, "--fast", "1"), "unknown option --fast"),
        ((file, x, y, "more"), "usage: layer_client"),
    ]
    for arguments, message in cases:
        done = run(client, *arguments)
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.slow
def test_random_damage_under_sanitizers(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, rng: torch.Generator
) -> None:
    """Whatever bytes of a file change, the client computes or refuses, and touches no other memory."""
    folder = tmp_path_factory.mktemp("sanitized")
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    client = build_client(
        folder, copy_prefix(folder / "prefix"), f"-DCMAKE_CXX_FLAGS=-g {sanitize}", "-DCMAKE_BUILD_TYPE=Debug"
    )
    whole = write(tmp_path / "model.safetensors", LAYERS["two paths, bias"](rng)).read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", whole)
    (tmp_path / "x").write_bytes(raw(torch.randn(3, 97, generator=rng)))
    choose = random.Random(int(torch.randint(2**31, (1,), generator=rng)))
    outcomes = {0: 0, 1: 0}
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(choose.choice((1, 1, 2, 8))):
            where = (
                choose.randrange(8 + header_bytes) if choose.random() < 0.8 else choose.randrange(len(whole))
            )
            damaged[where] = choose.choice((choose.randrange(256), *b'0129{}[]",:\\u'))
        if choose.random() < 0.1:
            del damaged[choose.randrange(len(damaged)) :]
        (tmp_path / "damaged").write_bytes(damaged)
        done = run(client, tmp_path / "damaged", tmp_path / "x", tmp_path / "y", "--threads", "2")
        assert done.returncode in outcomes, (damaged[: 8 + header_bytes], done.stderr)
        assert "Sanitizer" not in done.stderr
        assert "runtime error" not in done.stderr
        outcomes[done.returncode] += 1
    assert outcomes[1] > 100
    assert outcomes[0] > 0
