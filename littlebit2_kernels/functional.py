"""``littlebit_linear``: a packed or prepacked layer applied to activations."""

from __future__ import annotations

import torch

from .dispatch import ACTIVATIONS, check_activation, check_activation_mode, choose_backend
from .format import PackedLinear
from .ops.calls import blas_linear, linear_from_operands, linear_from_prepacked, triton_linear
from .ops.operands import Operands
from .prepacked import PrepackedLinear
from .prompts import prompt_backend
from .reference import linear_reference

__all__ = ["apply_operands", "littlebit_linear"]


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
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"blas"`` (signs unpacked for each call,
            then torch's matrix products; float16 if the layer fits) or ``"reference"`` (plain PyTorch in
            float32).
            ``auto`` takes the kernels that were compiled for the device, Triton's on a GPU where there are
            none, and for many tokens whichever of these and ``blas`` should be the fastest on the GPU
            (:func:`littlebit2_kernels.prompts.prompt_backend`). A backend asked for by name that cannot run
            raises.
        activation: how activations enter the sums (docs/kernels.md): ``"exact"`` in float32, ``"int16"``
            (error about 3e-4), ``"int8"`` (about 1e-2), ``"sign"`` (binarised), ``"float16"`` (CUDA only,
            about 2e-4), or ``"auto"``: exact for float32, and on the CPU for layers that are not
            prepacked; else int16, or float16 on GPUs for more than 16 tokens, on those without 1-bit tensor
            cores, and with Triton, which has no int16. On the CPU, int16, int8 and sign need a prepacked
            layer. ``blas``, which ``auto`` may take on GPUs for many 16-bit tokens, computes in the dtype
            of x (:func:`littlebit2_kernels.ops.calls.blas_linear`).
            Gradients are those of exact sums, but those
            of ``blas``, and on CUDA all, by torch's products: in bfloat16 for bfloat16, else in float32 with
            torch's setting of TF32.

    Returns:
        ``[..., N]`` in the dtype of ``x``; accumulation is in float32 or exact, of ``blas`` torch's.

    Raises:
        TypeError: ``x`` is not a tensor of a supported dtype, or ``packed`` not a layer.
        ValueError: the last dimension of ``x`` is not K, devices differ, ``backend`` or ``activation`` is
            unknown, or this layer or backend cannot serve ``activation`` or the dtype of ``x`` (float16 by
            ``blas`` where factors do not fit).
        BackendUnavailableError: the backend cannot run here.
        NativeLibraryError: the compiled library is missing.
        RuntimeError: ``backend="blas"``, and the first float16 call of a layer is captured into a CUDA graph.
    """
    if not isinstance(packed, PackedLinear | PrepackedLinear):
        raise TypeError(f"packed must be a PackedLinear or a PrepackedLinear, got {type(packed).__name__}")
    check_activation(x, packed.in_features, packed.device)
    prepacked = isinstance(packed, PrepackedLinear)
    tokens = x.numel() // packed.in_features
    chosen = choose_backend(
        backend,
        x.device.type,
        tokens,
        activation,
        lambda: prompt_backend(tokens, x.dtype, *shape_of(packed), x.device, _operands_of(packed)),
    )
    check_activation_mode(activation, chosen, prepacked)
    if chosen == "reference":
        layer = packed.unpack() if isinstance(packed, PrepackedLinear) else packed
        return linear_reference(x, layer, torch.float32).to(x.dtype)
    if chosen == "triton" and isinstance(packed, PrepackedLinear):
        raise ValueError("packed must be a PackedLinear for backend='triton': prepacked layers are the CPU's")
    if chosen == "blas" and isinstance(packed, PrepackedLinear):
        return blas_linear(x, packed.unpack().operands, packed.bias)
    if isinstance(packed, PrepackedLinear):
        return linear_from_prepacked(
            x, packed.layer, packed.bias, packed.out_features, ACTIVATIONS[activation]
        )
    return apply_operands(x, packed.operands, packed.bias, chosen, activation)


def shape_of(
    packed: PackedLinear | PrepackedLinear,
) -> tuple[int, int, tuple[int, ...] | None, tuple[int, ...]]:
    """K, N, the ranks (``None`` of a single stage), and for each path whose first stage it uses."""
    shares = packed.shares if isinstance(packed, PrepackedLinear) else packed.leaders
    ranks = None if packed.single_stage else packed.ranks
    return packed.in_features, packed.out_features, ranks, shares


def _operands_of(packed: PackedLinear | PrepackedLinear) -> Operands | None:
    # Prepacked layers are on the CPU, where nobody asks.
    return packed.operands if isinstance(packed, PackedLinear) else None


def apply_operands(
    x: torch.Tensor, operands: Operands, bias: torch.Tensor | None, backend: str, activation: str
) -> torch.Tensor:
    """Run a layer that is not prepacked by the chosen ``backend``, in a mode that this has."""
    if backend == "triton":
        return triton_linear(x, operands, bias, activation)
    if backend == "blas":
        return blas_linear(x, operands, bias)
    return linear_from_operands(x, operands, bias, ACTIVATIONS[activation])
