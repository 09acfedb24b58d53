"""The only place that executes a choice: :func:`run` and its siblings; and ``littlebit_linear``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd import forward_ad

from .dispatch import (
    ACTIVATIONS,
    PREPACKED,
    Choice,
    check_activation_mode,
    choose_for,
    has_many_tokens,
)
from .format import MAX_PATHS, LayerShape, PackedLinear
from .fused.norm import RMSNorm
from .ops import calls
from .ops.autograd import requires_grad
from .ops.operands import ACTIVATION_DTYPES, Operands, flatten
from .prepacked import PrepackedLinear
from .reference import reference_from_operands

__all__ = [
    "Layer",
    "check_norm",
    "check_residual",
    "check_x",
    "differentiates",
    "littlebit_linear",
    "may_prepack",
    "run",
    "run_fused",
    "run_group",
    "run_mlp",
    "run_prepacked",
]

#: The tensors of a layer: operands, or the bytes of a prepacked one.
Layer = Operands | torch.Tensor

_LAYERS = (PackedLinear, PrepackedLinear)


def littlebit_linear(
    x: torch.Tensor,
    packed: PackedLinear | PrepackedLinear,
    backend: str = "auto",
    activation: str = "auto",
) -> torch.Tensor:
    """Apply a packed layer to ``x``.

    ``y = sum_p out_scale * (sign(U) @ (latent_scale * (sign(V) @ (in_scale * x)))) + bias``, the forward of
    LittleBit (arXiv 2506.13771) with its residual paths, on packed signs. Differentiable
    in ``x`` and ``bias``; the packed weights and the scales are frozen.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16; any strides, any number of tokens (also none).
        packed: the layer, on the device of ``x``; prepacked (:func:`littlebit2_kernels.prepack`) for speed on
            the CPU, as it is on CUDA.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"blas"`` (dequantizes in each call, then
            calls torch.matmul) or ``"reference"`` (plain PyTorch in float32). docs/dispatch.md tells what
            ``auto`` chooses. A backend that is asked for by name and cannot run raises.
        activation: how activations enter the sums (docs/kernels.md): ``"exact"`` in float32, ``"int16"``
            (error about 3e-4), ``"int8"`` (about 1e-2), ``"sign"`` (binarized), ``"float16"`` (CUDA and
            Triton, about 2e-4), or ``"auto"`` (docs/dispatch.md). On the CPU, int16, int8 and sign need a
            prepacked layer. ``blas`` has no modes: it computes in the dtype of x, or in float32 where a CPU
            does not multiply that (:func:`littlebit2_kernels.ops.calls.dense_linear`).

    Returns:
        ``[..., N]`` in the dtype of ``x``. Sums are exact or accumulate in float32; those of ``blas`` are
        torch's. grad_x uses exact fp32 sums; ``blas``, and every backend but Triton on CUDA, dequantizes and
        calls torch.matmul: in bfloat16 for bfloat16, else in float32 with torch's setting of TF32.

    Raises:
        TypeError: ``x`` is not a tensor of a supported dtype, or ``packed`` not a layer.
        ValueError: the last dimension of ``x`` is not K, devices differ, ``backend`` or ``activation`` is
            unknown, or this layer or backend cannot serve ``activation``.
        BackendUnavailableError: the backend cannot run here.
        NativeLibraryError: the compiled library is missing.
    """
    if not isinstance(packed, _LAYERS):
        raise TypeError(f"packed must be a PackedLinear or a PrepackedLinear, got {type(packed).__name__}")
    shape = packed.shape
    check_x(x, shape, packed.device)
    if isinstance(packed, PackedLinear):
        choice = choose_for(x, shape, backend, activation, prepacked=False)
        return run(x, packed.operands, packed.bias, shape, choice)
    choice = choose_for(x, shape, backend, activation, prepacked=True)
    if choice.backend == "triton":
        raise ValueError("packed must be a PackedLinear for backend='triton': prepacked layers are the CPU's")
    return run(x, packed.layer, packed.bias, shape, choice)


def run(
    x: torch.Tensor, layer: Layer, bias: torch.Tensor | None, shape: LayerShape, choice: Choice
) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]`` as chosen. All backends but the CPU's unpack a prepacked layer."""
    backend, activation = choice.backend, choice.activation
    if choice.prepack and not isinstance(layer, torch.Tensor) and may_prepack(x, flatten(layer)):
        layer = calls.prepack(layer)
    if isinstance(layer, torch.Tensor):
        if backend == "cpu":
            return calls.linear_prepacked(x, layer, bias, shape.out_features, ACTIVATIONS[activation])
        layer = PrepackedLinear(layer, bias, shape).unpack().operands
    if backend in ("cpu", "cuda"):
        return calls.linear(x, layer, bias, ACTIVATIONS[activation])
    if backend == "triton":
        return calls.triton_linear(x, layer, bias, activation)
    if backend == "blas":
        return calls.dense_linear(x, layer, bias)
    return reference_from_operands(x, layer, bias, torch.float32).to(x.dtype)


def may_prepack(x: torch.Tensor, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a call may bring a layer into the kernels' own layout.

    A trace keeps the tensors that it was given, fake tensors have no values to move, and scales that require
    a gradient are the operator's to refuse.
    """
    return (
        x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and type(x) is torch.Tensor
        and all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in tensors)
    )


def run_prepacked(
    x: torch.Tensor,
    layer: torch.Tensor,
    bias: torch.Tensor | None,
    shape: LayerShape,
    backend: str,
    activation: str,
) -> torch.Tensor | None:
    """The short path of a prepacked module on the CPU: :func:`choose` and :func:`run` without their overhead.

    Follows autocast. The operator checks ``x``; if it refuses, the checks of the general path say why.

    Returns:
        ``[..., N]``, or ``None`` if the choice takes more than a look at the names.
    """
    try:
        code = PREPACKED.get((backend, activation))
        if code is None or (code == 0 and backend == "auto" and _compares(x, shape)):
            return None
        if torch.is_autocast_enabled("cpu"):
            check_x(x, shape, layer.device)
            x = x.to(torch.get_autocast_dtype("cpu"))
        return calls.linear_prepacked(x, layer, bias, shape.out_features, code)
    except (AttributeError, RuntimeError, TypeError):
        check_x(x, shape, layer.device)
        check_activation_mode(activation, backend, prepacked=True)
        raise


def _compares(x: torch.Tensor, shape: LayerShape) -> bool:
    """Whether ``auto`` compares estimates on the CPU for so many tokens."""
    return not torch.compiler.is_compiling() and has_many_tokens(x, shape)


def run_group(
    x: torch.Tensor,
    layers: Sequence[Layer],
    bias: Sequence[torch.Tensor | None],
    shapes: Sequence[LayerShape],
    choice: Choice,
) -> list[torch.Tensor]:
    """Apply several layers, all prepacked or none, to one ``x``: in one call if an operator takes them."""
    activation = ACTIVATIONS[choice.activation]
    if choice.prepack:
        return [run(x, *layer, choice) for layer in zip(layers, bias, shapes, strict=True)]
    if choice.backend == "cpu" and isinstance(layers[0], torch.Tensor):
        sizes = [shape.out_features for shape in shapes]
        return calls.grouped_linear_prepacked(x, layers, bias, sizes, activation)  # type: ignore[arg-type]
    one_kind = len({shape.single_stage for shape in shapes}) == 1
    if choice.backend in ("cpu", "cuda") and one_kind:
        return calls.grouped_linear(x, layers, bias, activation)  # type: ignore[arg-type]
    return [run(x, *layer, choice) for layer in zip(layers, bias, shapes, strict=True)]


def run_fused(
    x: torch.Tensor,
    layers: Sequence[Layer],
    bias: Sequence[torch.Tensor | None],
    shapes: Sequence[LayerShape],
    choice: Choice,
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
) -> list[torch.Tensor] | None:
    """:func:`run_group` with a norm before and a residual sum after, without gradients.

    Returns:
        ``[..., N_i]`` of each layer, or ``None`` where no operator takes such a call.
    """
    code = ACTIVATIONS[choice.activation]
    if choice.backend == "cuda" and _one_cuda_call(layers, shapes, shapes):
        return calls.fused_linear(x, layers, bias, norm, residual, code)  # type: ignore[arg-type]
    if choice.backend != "cpu" or not isinstance(layers[0], torch.Tensor):
        return None
    sizes = [shape.out_features for shape in shapes]
    return calls.fused_linear_prepacked(x, layers, bias, sizes, norm, residual, code)  # type: ignore[arg-type]


def run_mlp(
    x: torch.Tensor,
    layers: Sequence[Layer],
    bias: Sequence[torch.Tensor | None],
    shapes: Sequence[LayerShape],
    function: int,
    choice: Choice,
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """Apply an MLP, without gradients; ``None`` where no operator takes such a call."""
    code = ACTIVATIONS[choice.activation]
    # Gate and up share launches; down has its own.
    if choice.backend == "cuda" and _one_cuda_call(layers, shapes, shapes[:-1]):
        return calls.mlp(x, layers, bias, function, norm, residual, code)  # type: ignore[arg-type]
    if choice.backend != "cpu" or not isinstance(layers[0], torch.Tensor):
        return None
    size = shapes[-1].out_features
    return calls.mlp_prepacked(x, layers, bias, size, function, norm, residual, code)  # type: ignore[arg-type]


def _one_cuda_call(
    layers: Sequence[Layer], shapes: Sequence[LayerShape], together: Sequence[LayerShape]
) -> bool:
    """Whether one call of the CUDA kernels takes such layers; ``together``: those that share launches."""
    one_kind = len({shape.single_stage for shape in shapes}) == 1
    paths = sum(shape.num_paths for shape in together)
    return not isinstance(layers[0], torch.Tensor) and one_kind and paths <= MAX_PATHS


def differentiates(
    x: torch.Tensor,
    bias: Sequence[torch.Tensor | None],
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
) -> bool:
    """Whether a call must be composed of operators that torch differentiates or casts."""
    if forward_ad._current_level >= 0 or torch.is_autocast_enabled(x.device.type):
        return True
    if not torch.is_grad_enabled():
        return False
    return requires_grad((x, list(bias), residual, None if norm is None else norm.weight))


def check_norm(norm: RMSNorm | None, x: torch.Tensor, shape: LayerShape) -> None:
    """Raise unless ``norm`` is ``None`` or normalizes ``x`` for a layer of ``shape``."""
    if norm is None:
        return
    if not isinstance(norm, RMSNorm):
        raise TypeError(f"norm must be a littlebit2_kernels.RMSNorm or None, got {type(norm).__name__}")
    if norm.weight.shape[0] != shape.in_features:
        raise ValueError(
            f"norm.weight must have shape [K={shape.in_features}], got {list(norm.weight.shape)}"
        )
    if norm.weight.device != x.device:
        raise ValueError(f"norm.weight must be on {x.device} like x, got {norm.weight.device}")


def check_residual(residual: torch.Tensor | None, x: torch.Tensor, shape: LayerShape) -> None:
    """Raise unless ``residual`` is ``None`` or can be added to the output of a layer of ``shape``."""
    if residual is None:
        return
    if not isinstance(residual, torch.Tensor):
        raise TypeError(f"residual must be a torch.Tensor or None, got {type(residual).__name__}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if residual.shape != (*x.shape[:-1], shape.out_features):
        expected = [*x.shape[:-1], shape.out_features]
        raise ValueError(
            f"residual must have the shape of the output, {expected}, got {list(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")


def check_x(x: torch.Tensor, shape: LayerShape, device: torch.device) -> None:
    """Raise unless ``x`` is ``[..., K]`` of a supported dtype on ``device``; see ``littlebit_linear``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")
    if x.dim() == 0 or x.shape[-1] != shape.in_features:
        raise ValueError(f"x.size(-1) must equal K={shape.in_features}, got shape {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on {device} like the packed layer, got {x.device}")
