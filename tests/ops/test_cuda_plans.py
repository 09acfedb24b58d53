"""The CUDA backend without a GPU: which backend runs, why not, and plans for GPUs that are elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from littlebit2_kernels import (
    BackendUnavailableError,
    GpuProperties,
    LittleBitLinear,
    NativeLibraryError,
    _native,
    dispatch,
    explain,
    littlebit_linear,
    prepack,
)
from littlebit2_kernels.dispatch import (
    ACTIVATIONS,
    BLAS_TOKENS,
    CUDA_ACTIVATIONS,
    CUDA_TOKENS,
    Call,
    Choice,
    check_activation_mode,
    choose,
    prefill_backend,
    unavailable_reason,
)
from littlebit2_kernels.format import LayerShape
from littlebit2_kernels.gpu import GPUS, gpu_properties
from littlebit2_kernels.testing import make_packed, make_problem

SHAPE = LayerShape(512, 512, (64,))


def backend_of(backend: str, device_type: str) -> str:
    return choose(Call(SHAPE, 1, torch.float16, torch.device(device_type), backend)).backend


def pretend(monkeypatch: pytest.MonkeyPatch, *, toolkit: str | None, archs: str | None, gpu: bool) -> None:
    """A torch, a build of this package, and a machine."""
    monkeypatch.setattr(_native, "_cuda_ops_loaded", False)
    monkeypatch.setattr(torch.version, "cuda", toolkit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(_native, "core", lambda: SimpleNamespace(cuda_archs=archs))


@pytest.mark.parametrize(
    ("toolkit", "archs", "gpu", "reason"),
    [
        (None, "90-real", False, r"this torch \(.*\) was built without CUDA; install a CUDA build of torch"),
        ("13.0", None, True, "this package was built without its CUDA kernels; reinstall it with nvcc"),
        ("13.0", "90-real", False, "torch finds no usable GPU or driver"),
    ],
    ids=["torch", "package", "gpu"],
)
def test_reasons(
    monkeypatch: pytest.MonkeyPatch, toolkit: str | None, archs: str | None, gpu: bool, reason: str
) -> None:
    pretend(monkeypatch, toolkit=toolkit, archs=archs, gpu=gpu)
    monkeypatch.setattr(dispatch, "no_triton_reason", lambda device_type: "no triton")
    with pytest.raises(BackendUnavailableError, match=f"backend='cuda' cannot run: {reason}"):
        backend_of("cuda", "cuda")
    with pytest.raises(BackendUnavailableError, match=f"no kernels for tensors on cuda: cuda: {reason}"):
        backend_of("auto", "cuda")
    with pytest.raises(NativeLibraryError, match=f"the CUDA kernels cannot be loaded: {reason}"):
        _native.load_cuda_ops()


def test_where_cuda_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, toolkit="13.0", archs="90-real", gpu=True)
    assert unavailable_reason("cuda", "cuda") is None
    assert backend_of("auto", "cuda") == backend_of("cuda", "cuda") == "cuda"
    assert backend_of("auto", "cpu") == backend_of("auto", "meta") == "cpu"
    for device_type in ("cpu", "meta", "mps"):
        assert unavailable_reason("cuda", device_type) == f"it runs on CUDA tensors, not on {device_type}"


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, toolkit="13.0", archs="90-real", gpu=True)
    monkeypatch.setattr(_native, "cuda_ops_library_path", lambda: tmp_path / "lib.so")
    with pytest.raises(NativeLibraryError, match=r"the CUDA operator library .*lib.so does not exist"):
        _native.load_cuda_ops()
    (tmp_path / "lib.so").write_text("no library")
    with pytest.raises(NativeLibraryError, match=r"the CUDA operator library .*lib.so cannot be loaded"):
        _native.load_cuda_ops()


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise NativeLibraryError("no module here")

    pretend(monkeypatch, toolkit="13.0", archs="90-real", gpu=True)
    monkeypatch.setattr(_native, "core", broken)
    assert unavailable_reason("cuda", "cuda") == "no module here"


def test_activation_modes_by_backend() -> None:
    for activation in ACTIVATIONS:
        check_activation_mode(activation, "auto", prepacked=True)  # of a module, which may move
    for activation in CUDA_ACTIVATIONS:
        check_activation_mode(activation, "cuda", prepacked=False)
    for backend in ("cuda", "triton"):
        with pytest.raises(ValueError, match="activation='int8x2' is served on CPUs with AMX only"):
            check_activation_mode("int8x2", backend, prepacked=False)
    for activation in ("auto", "exact", "int16", "int8", "sign", "int8x2"):
        check_activation_mode(activation, "cpu", prepacked=True)
    for activation in ("int16", "int8", "sign", "int8x2"):
        with pytest.raises(ValueError, match=f"activation='{activation}' needs a prepacked layer"):
            check_activation_mode(activation, "cpu", prepacked=False)
    for prepacked in (False, True):
        with pytest.raises(ValueError, match="activation='float16' is served on CUDA only"):
            check_activation_mode("float16", "cpu", prepacked=prepacked)
    with pytest.raises(ValueError, match="backend='reference' computes exact sums only"):
        check_activation_mode("float16", "reference", prepacked=False)


def test_float16_activations_on_the_cpu() -> None:
    x, packed = make_problem(2, 40, 30, [8])
    with pytest.raises(ValueError, match="is served on CUDA only"):
        LittleBitLinear.from_packed(packed, backend="cpu", activation="float16")
    module = LittleBitLinear.from_packed(packed, activation="float16")
    for _ in range(2):  # before and after it has prepacked itself
        with pytest.raises(ValueError, match="activation='float16' is served on CUDA only"):
            module(x)
        module.prepack_()
    for layer in (packed, prepack(packed)):
        with pytest.raises(ValueError, match="activation='float16' is served on CUDA only"):
            littlebit_linear(x, layer, activation="float16")


def test_modules_and_functions_pass_the_activation_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the operator on CUDA, seen on the CPU with the choice of backend replaced."""
    from littlebit2_kernels import functional, linear
    from littlebit2_kernels.ops import calls

    x, packed = make_problem(2, 40, 30, [8], bias=True)
    seen: list[int] = []

    def on_cuda(x: torch.Tensor, shape: LayerShape, backend: str, activation: str, prepacked: bool) -> Choice:
        return choose(Call(shape, 2, x.dtype, x.device, backend, activation, gpu="H200"))

    def record(x: torch.Tensor, operands: object, bias: object, activation: int = 0) -> torch.Tensor:
        assert bias is packed.bias
        seen.append(activation)
        return x

    for module in (functional, linear):
        monkeypatch.setattr(module, "choose_for", on_cuda)
    monkeypatch.setattr(calls, "linear", record)
    layer = LittleBitLinear.from_packed(packed, auto_prepack=False)
    for name in CUDA_ACTIVATIONS:
        littlebit_linear(x, packed, activation=name)
        layer.activation = name
        layer(x)
    assert seen == [ACTIVATIONS[name] for name in CUDA_ACTIVATIONS for _ in range(2)]
    layer.activation = "int4"
    with pytest.raises(ValueError, match=r"activation must be one of auto, exact, .* got 'int4'"):
        layer(x)


# --- plans -------------------------------------------------------------------------------------------


def test_plan_without_a_gpu() -> None:
    packed = make_packed(1000, 700, [64, 64], share_v=True, bias=True)
    plan = explain((3, 2, 1000), packed, gpu="H200", dtype=torch.float16)
    assert (plan.backend, plan.tokens, plan.first_stages) == ("cuda", 6, 1)
    assert (plan.activation, plan.kernels, plan.gpu) == ("int16", "bit planes", GPUS["H200"])
    assert plan.macs == 6 * (64 * 1000 + 2 * 64 * 700)
    assert plan.packed_bytes == packed.nbytes
    assert [launch.kind for launch in plan.launches] == ["convert", "decode"] * 2
    assert [launch.stage for launch in plan.launches] == [0, 0, 1, 1]
    text = str(plan)
    assert "launch 1  " in text
    assert "launch 2  " in text
    for launch in plan.launches[1::2]:
        assert launch.threads == 32 * launch.row_warps * launch.split_warps
        assert launch.grid[2] * launch.token_tile >= 6
        assert 0 < launch.shared_bytes <= GPUS["H200"].shared_bytes
    assert plan.launches[-1].grid[0] * 16 * plan.launches[-1].row_warps >= 700
    # A few tokens are converted by the blocks that multiply them.
    few = explain((4, 1000), packed, gpu="H200")
    assert [launch.kind for launch in few.launches] == ["decode", "decode"]
    assert all(launch.chained for launch in few.launches)
    assert not any(launch.chained for launch in explain((4, 1000), packed, gpu="A100").launches)
    single = explain((1, 1000), make_packed(1000, 700, None), gpu="A100")
    assert len(single.launches) == 1


@pytest.mark.parametrize(
    ("gpu", "dtype", "activation"),
    [
        ("H200", torch.float16, "int16"),
        ("4090", torch.bfloat16, "int16"),
        ("A100", torch.float32, "exact"),
        ("B200", torch.float16, "float16"),
        ("5090", torch.bfloat16, "float16"),
    ],
)
def test_what_auto_means(gpu: str, dtype: torch.dtype, activation: str) -> None:
    packed = make_packed(512, 512, [64])
    assert explain((1, 512), packed, gpu=gpu, dtype=dtype).activation == activation
    x = torch.ones(1, 512, dtype=dtype)
    assert explain(x, packed, gpu=gpu).activation == activation
    for name in set(CUDA_ACTIVATIONS) - {"auto"}:
        assert explain(x, packed, "cuda", name, gpu=gpu).activation == name


def test_the_cut_of_sums_does_not_depend_on_the_tokens() -> None:
    packed = make_packed(4096, 14336, [1024, 512])
    for gpu in GPUS:
        for activation in set(CUDA_ACTIVATIONS) - {"auto"}:
            plans = [
                explain((tokens, 4096), packed, activation=activation, gpu=gpu)
                for tokens in (1, 2, 3, 5, 8, 16, 17, 100, 5000)
            ]
            # More tokens than 16 take a GEMM in some modes, whose cuts change no order.
            gemms = [plan.kernels == "gemm" for plan in plans]
            assert gemms == [False] * 6 + [activation not in ("int16", "sign")] * 3
            cuts = {
                tuple((s.grid[:2], s.row_warps, s.split_warps) for s in plan.launches if s.kind == "decode")
                for plan, gemm in zip(plans, gemms, strict=True)
                if not gemm
            }
            assert len(cuts) == 1, (gpu, activation)


def test_plan_of_a_prefill() -> None:
    packed = make_packed(8192, 28672, [296, 296])
    plan = explain((128, 8192), packed, "cuda", gpu="H200", dtype=torch.bfloat16)
    assert (plan.kernels, plan.activation, plan.token_block) == ("gemm", "float16", 128)
    assert [launch.kind for launch in plan.launches] == ["convert", "gemm"] * 2
    for launch in plan.launches[1::2]:
        assert launch.row_tile in (64, 128)
        assert launch.grid[2] * launch.token_tile >= 128
        assert launch.chained
        assert 0 < launch.shared_bytes <= GPUS["4090"].shared_bytes
    assert plan.launches[-1].grid[0] * plan.launches[-1].row_tile >= 28672
    # In clusters of 8 blocks, of 132 SMs.
    plan = explain((512, 8192), packed, "cuda", gpu="H200", dtype=torch.bfloat16)
    assert (plan.kernels, plan.activation, plan.workspace_bytes) == ("fused", "float16", 0)
    (launch,) = plan.launches
    assert (launch.kind, launch.grid, launch.token_tile, launch.row_tile) == ("fused", (1, 8, 16), 32, 0)
    assert explain((512, 8192), packed, "cuda", gpu="H200").activation == "exact"
    assert explain((512, 8192), packed, gpu="H200", activation="int16").kernels == "bit planes"


def test_no_tokens() -> None:
    plan = explain((0, 512), make_packed(512, 512, [64]), gpu="H200")
    assert (plan.tokens, plan.macs) == (0, 0)


def test_when_unpacking_pays() -> None:
    def pays(
        gpu: str, tokens: int, ranks: tuple[int, ...] | None, dtype: torch.dtype = torch.bfloat16
    ) -> bool:
        return prefill_backend(LayerShape(8192, 28672, ranks), tokens, dtype, gpu) == "blas"

    for gpu in GPUS:
        assert not pays(gpu, BLAS_TOKENS - 1, (632, 632))
        assert not pays(gpu, 8192, (632, 632), torch.float32)
    # Where a library's MMAs are faster than mma.sync; and where they are not.
    assert pays("H200", 8192, (632, 632))
    assert pays("B200", 8192, (632, 632))
    assert not pays("4090", 8192, (632, 632))
    # More of factors than a call may take.
    assert not pays("H200", 8192, (3192, 3192))
    assert not pays("H200", 8192, None)
    assert prefill_backend(LayerShape(4096, 11008, None), 8192, torch.bfloat16, "H200") == "blas"
    # What cannot be planned for.
    old = GpuProperties(75, 40, 65536)
    assert prefill_backend(LayerShape(8192, 28672, (632,)), 8192, torch.bfloat16, old) != "blas"


def test_which_backend_takes_a_prefill() -> None:
    def best(gpu: str, tokens: int, rank: int, dtype: torch.dtype = torch.float16) -> str:
        return prefill_backend(LayerShape(8192, 28672, (rank, rank)), tokens, dtype, gpu)

    for gpu in GPUS:
        faster = gpu in ("H100", "H200", "B200")  # by other MMAs than mma.sync
        assert best(gpu, 17, 296) == best(gpu, BLAS_TOKENS - 1, 632) == "cuda"
        # Of more factors than a call may take.
        assert best(gpu, 8192, 3168) == ("triton" if faster else "cuda"), gpu
        assert best(gpu, CUDA_TOKENS, 3168) == "cuda"
        # Sums of float32 have no estimate to compare with.
        assert best(gpu, 8192, 632, torch.float32) == ("triton" if faster else "cuda")
    assert best("H200", 8192, 632) == "blas"
    assert best("4090", 8192, 632) == "cuda"


def test_auto_is_explained_for_any_gpu() -> None:
    packed = make_packed(8192, 28672, [632, 632])
    for gpu, tokens, dtype, backend in (
        ("H200", 16, torch.bfloat16, "cuda"),
        ("H200", 64, torch.bfloat16, "cuda"),
        ("H200", 8192, torch.bfloat16, "blas"),
        ("H200", 8192, torch.float32, "triton"),
        ("4090", 8192, torch.bfloat16, "cuda"),
    ):
        plan = explain((tokens, 8192), packed, dtype=dtype, gpu=gpu)
        assert plan.backend == backend, (gpu, tokens)
        assert plan.reason.startswith(f"planned for gpu={gpu!r}; ")
    named = explain((8192, 8192), packed, activation="float16", dtype=torch.bfloat16, gpu="H200")
    assert named.backend == "cuda"


def test_blas_is_explained() -> None:
    packed = make_packed(4096, 4096, [80, 24])
    plan = explain((600, 4096), packed, "blas", dtype=torch.bfloat16, gpu="H200")
    assert (plan.backend, plan.workspace_bytes, plan.gpu) == ("blas", 104 * 8192 * 2, None)


def test_estimates_are_explained() -> None:
    packed = make_packed(4096, 4096, [80, 80])
    few, many = (explain((tokens, 4096), packed, dtype=torch.bfloat16, gpu="H200") for tokens in (16, 17))
    assert (few.estimated_cycles, few.unpack_cycles) == (None, None)
    assert many.estimated_cycles is not None
    assert many.unpack_cycles is not None
    assert "unpack_cycles" in str(many)


def test_plans_refuse() -> None:
    packed = make_packed(40, 30, [8])
    with pytest.raises(ValueError, match=r"gpu must be GpuProperties or one of A100, .* got 'V100'"):
        explain((2, 40), packed, gpu="V100")
    with pytest.raises(TypeError, match="gpu must be GpuProperties or a name, got int"):
        explain((2, 40), packed, gpu=90)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend must be 'auto', 'blas', 'cuda' or 'triton' where"):
        explain((2, 40), packed, backend="cpu", gpu="H200")
    with pytest.raises(ValueError, match=r"packed must be a PackedLinear where gpu is given"):
        explain((2, 40), prepack(packed), gpu="H200")
    with pytest.raises(TypeError, match=r"dtype must be float32, float16 or bfloat16, got torch.int8"):
        explain((2, 40), packed, dtype=torch.int8, gpu="H200")
    with pytest.raises(ValueError, match=r"dtype must be that of x, torch.float32, or not be given"):
        explain(torch.ones(2, 40), packed, dtype=torch.float16, gpu="H200")
    with pytest.raises(BackendUnavailableError, match=r"cannot run on GpuProperties\(capability=75.*got 7.5"):
        explain((2, 40), packed, backend="cuda", gpu=GpuProperties(75, 40, 65536))
    assert explain((2, 40), packed, gpu=GpuProperties(75, 40, 65536)).backend == "triton"
    # AMD's capability of an MI200 is Hopper's number.
    other = GpuProperties(90, 104, 65536, 64, "amd")
    assert explain((2, 40), packed, gpu=other).backend == "triton"
    assert explain((512, 40), packed, gpu=other).backend == "triton"
    with pytest.raises(BackendUnavailableError, match=r"run on NVIDIA's GPUs, got one of 'amd'"):
        explain((2, 40), packed, backend="cuda", gpu=other)


def test_properties_pass_through() -> None:
    own = GpuProperties(90, 10, 232448)
    assert gpu_properties(own) is own
    assert explain((1, 4096), make_packed(4096, 4096, [512]), gpu=own).gpu == own


def test_dispatch_knows_every_backend() -> None:
    for backend in dispatch.BACKENDS:
        if backend != "auto":
            unavailable_reason(backend, "cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        unavailable_reason("tpu", "cuda")
