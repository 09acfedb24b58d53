"""Calls of the operators, which load them first; everything here is traceable by ``torch.compile``.

The operators check their arguments themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .._native import no_cuda_reason
from ..fused.norm import RMSNorm
from . import attention as attention_operator
from . import dense, int8
from . import rotary as rotary_operator
from .autograd import call_operator, requires_grad
from .library import eager_operators, load_for, load_operator
from .operands import Operands

__all__ = [
    "attention",
    "attention_step",
    "dense_linear",
    "fused_linear",
    "fused_linear_prepacked",
    "grouped_linear",
    "grouped_linear_prepacked",
    "int8_linear",
    "joined_linear",
    "joined_linear_prepacked",
    "linear",
    "linear_prepacked",
    "mlp",
    "mlp_prepacked",
    "prepack",
    "rotary",
    "triton_linear",
    "unpack",
]

#: The lb2_activation (littlebit2.h) of exact sums, which derivatives use.
_EXACT = 1

#: Most tokens of a call that the native int8 kernel is faster for than widening and torch.matmul.
_INT8_TOKENS = {torch.float32: 64, torch.float16: 16, torch.bfloat16: 16}
#: The same on CUDA: the tokens that one pass over the weights serves. Not measured.
_INT8_CUDA_TOKENS = 16


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.attention``: few queries on the CPU.

    Args: as :func:`littlebit2_kernels.attention`, which checks the last three; 0 stands for none.

    Returns:
        ``[B, M, H, E]`` in the dtype of ``query``.
    """
    if torch.compiler.is_compiling():
        load_for(query)
        return torch.ops.littlebit2.attention(query, key, value, mask, scale, softcap, causal, window)
    if forward_ad._current_level >= 0:
        # Torch has no forward derivative of registered operators.
        return attention_operator.attention_by_torch(query, key, value, mask, scale, softcap, causal, window)
    operator = eager_operators.get("attention") or load_operator("attention", query)
    if torch.is_grad_enabled() and requires_grad((query, key, value, mask)):
        return operator(query, key, value, mask, scale, softcap, causal, window)
    # Stepping over autograd saves a call of its Python kernel.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(query, key, value, mask, scale, softcap, causal, window)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``torch.ops.littlebit2.rotary``: the rotation of queries and keys on the CPU.

    Args: as :func:`littlebit2_kernels.rotary`.

    Returns:
        ``[B, M, H, D]`` and ``[B, M, G, D]``.
    """
    if torch.compiler.is_compiling():
        load_for(query)
        return torch.ops.littlebit2.rotary(query, key, cos, sin, interleaved)
    if forward_ad._current_level >= 0:
        # Torch has no forward derivative of registered operators.
        return rotary_operator.rotary_by_torch(query, key, cos, sin, interleaved)
    operator = eager_operators.get("rotary") or load_operator("rotary", query)
    if torch.is_grad_enabled() and requires_grad((query, key, cos, sin)):
        return operator(query, key, cos, sin, interleaved)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(query, key, cos, sin, interleaved)


def attention_step(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.attention_step``: rotation, cache and attention of a step on the CPU.

    Args: as :func:`littlebit2_kernels.attention_step`, which checks ``softcap`` and ``window``; 0 stands for
        none.

    Returns:
        ``[B, M, H, E]`` in the dtype of ``query``.
    """
    tensors = (query, new_key, new_value, cos, sin, key, value)
    more = (position, mask, scale, softcap, causal, window, interleaved)
    if torch.compiler.is_compiling():
        load_for(query)
        return torch.ops.littlebit2.attention_step(*tensors, *more)
    if torch.is_grad_enabled() and requires_grad((*tensors, mask)):
        raise RuntimeError("littlebit2: attention_step has no gradient, got a tensor that requires one")
    operator = eager_operators.get("attention_step") or load_operator("attention_step", query)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*tensors, *more)


def linear(
    x: torch.Tensor, operands: Operands, bias: torch.Tensor | None, activation: int = 0
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear``: a packed layer by the native kernels of its device.

    Args:
        x: ``[..., K]``.
        operands: the lists of :data:`Operands`.
        bias: float32 ``[N]`` or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS` that the device serves.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    return call_operator("linear", x, (*operands, bias), (activation,), (_EXACT,))


def linear_prepacked(
    x: torch.Tensor, layer: torch.Tensor, bias: torch.Tensor | None, out_features: int, activation: int
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.linear_prepacked``: a prepacked layer on the CPU.

    Args:
        x: ``[..., K]``.
        layer: uint8 ``[bytes]`` of a :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None``.
        out_features: N.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.
    """
    return call_operator(
        "linear_prepacked", x, (layer, bias), (out_features, activation), (out_features, _EXACT)
    )


def prepack(operands: Operands) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.prepack``: the layer of :func:`linear_prepacked`, uint8 ``[bytes]``."""
    load_for(operands[0][0])
    return torch.ops.littlebit2.prepack(*operands)


def dense_linear(x: torch.Tensor, operands: Operands, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize a layer and apply it to ``x`` ``[..., K]`` by one or two calls of torch.matmul.

    Everything is rounded to the dtype of ``x``: the factors (which hold the scales), the latents and the
    bias. Products of ``latent_scale`` and ``out_scale`` must fit this dtype. Sums are torch's, with its
    settings of TF32 and of reduced precision. In float16, scales are normalized first
    (:mod:`littlebit2_kernels.ops.balance` has the accuracy); what overflows is infinite.

    Args:
        x: float32, float16 or bfloat16.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``; gradients are computed in
        bfloat16 for bfloat16, else in float32. The backward call dequantizes the factors again.
    """
    # Below autograd the kernel itself, without the dispatch to it.
    return call_operator("blas_linear", x, (*operands, bias), (), (), dense.dense_kernel)


def unpack(operands: Operands, dtype: torch.dtype) -> list[torch.Tensor]:
    """Dequantize a layer to dense matrices of ``dtype``, contiguous, on the layer's device.

    Returns:
        ``[first, last]`` with ``y = (x @ first.T) @ last.T``: ``sign(V) * in_scale`` of all paths,
        ``[R, K]``, and ``out_scale * sign(U) * latent_scale`` of all paths, ``[N, R]``. For a single-stage
        layer ``[last]``, ``[N, K]``, the sum of its paths.

    Raises:
        RuntimeError: an operand does not fit.
    """
    load_for(operands[0][0])
    return dense.unpack(operands, dtype)


def grouped_linear(
    x: torch.Tensor,
    layers: Sequence[Operands],
    bias: Sequence[torch.Tensor | None],
    activation: int = 0,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.grouped_linear``: several packed layers on one ``x``.

    Args:
        x: ``[..., K]``.
        layers: the operands of each layer, all single-stage or all two-stage.
        bias: float32 ``[N]`` or ``None`` of each layer.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS` that the device serves.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``.
    """
    if torch.is_grad_enabled() and requires_grad(bias):  # the grouped operator has no gradient of biases
        return [linear(x, *layer, activation) for layer in zip(layers, bias, strict=True)]
    lists, paths = _listed(layers)
    return call_operator("grouped_linear", x, (*lists, list(bias)), (paths, activation), (paths, _EXACT))


def joined_linear(
    x: torch.Tensor,
    layers: Sequence[Operands],
    bias: Sequence[torch.Tensor | None],
    activation: int = 0,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.joined_linear``: :func:`grouped_linear` into one output.

    Returns:
        ``[..., sum N_i]`` in the dtype of ``x``. Differentiable in ``x`` only.
    """
    lists, paths = _listed(layers)
    return call_operator("joined_linear", x, (*lists, list(bias)), (paths, activation), (paths, _EXACT))


def _listed(layers: Sequence[Operands]) -> tuple[list[Any], list[int]]:
    """The operands of all layers as the lists of one call, and how many paths each layer has."""
    lists = [
        None if layers[0][i] is None else [tensor for operands in layers for tensor in operands[i] or ()]
        for i in range(5)
    ]
    return lists, [len(operands[0]) for operands in layers]


def grouped_linear_prepacked(
    x: torch.Tensor,
    layers: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    out_features: Sequence[int],
    activation: int,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.grouped_linear_prepacked``: several prepacked layers on one ``x``.

    Args:
        x: ``[..., K]``.
        layers: uint8 ``[bytes]`` of each :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None`` of each layer.
        out_features: N of each layer.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``.
    """
    if torch.is_grad_enabled() and requires_grad(bias):
        return [
            linear_prepacked(x, *layer, activation) for layer in zip(layers, bias, out_features, strict=True)
        ]
    sizes = list(out_features)
    return call_operator(
        "grouped_linear_prepacked", x, (list(layers), list(bias)), (sizes, activation), (sizes, _EXACT)
    )


def fused_linear(
    x: torch.Tensor,
    layers: Sequence[Operands],
    bias: Sequence[torch.Tensor | None],
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.fused_linear``: a norm, packed layers, a residual sum, on CUDA.

    Args:
        x: ``[..., K]``.
        layers: the operands of each layer, all single-stage or all two-stage, at most 16 paths together.
        bias: float32 ``[N]`` or ``None`` of each layer.
        norm: of ``x``, or ``None``. Its result is not rounded.
        residual: ``[..., N]`` in the dtype of ``x``, added to the output of one layer: before it is rounded
            up to 16 tokens, after it for more; or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``. Not differentiable.
    """
    lists, paths = _listed(layers)
    weight, eps, offset = _norm_arguments(norm)
    return _call_fused(
        "fused_linear", x, (*lists, list(bias), paths, weight, eps, offset, residual, activation)
    )


def mlp(
    x: torch.Tensor,
    layers: Sequence[Operands],
    bias: Sequence[torch.Tensor | None],
    function: int,
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
    activation: int = 0,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.mlp``: an MLP of packed layers, on CUDA.

    Args:
        x: ``[..., K]``.
        layers: the operands of gate, up and down, or of up and down; all single-stage or all two-stage. At
            most 16 paths in those before down, and in down.
        bias: float32 ``[N]`` or ``None`` of each layer.
        function: a value of :data:`littlebit2_kernels.fused.mlp.FUNCTIONS`.
        norm: as for :func:`fused_linear`.
        residual: as for :func:`fused_linear`.
        activation: as for :func:`fused_linear`.

    Returns:
        ``[..., N]`` in the dtype of ``x``. The outputs of the first layers are rounded to it, ``function``
        included. Not differentiable.
    """
    lists, paths = _listed(layers)
    weight, eps, offset = _norm_arguments(norm)
    return _call_fused(
        "mlp", x, (*lists, list(bias), paths, function, weight, eps, offset, residual, activation)
    )


def fused_linear_prepacked(
    x: torch.Tensor,
    layers: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    out_features: Sequence[int],
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
    activation: int,
) -> list[torch.Tensor]:
    """Call ``torch.ops.littlebit2.fused_linear_prepacked``: a norm, prepacked layers, a residual sum.

    Args:
        x: ``[..., K]``.
        layers: uint8 ``[bytes]`` of each :class:`PrepackedLinear`.
        bias: float32 ``[N]`` or ``None`` of each layer.
        out_features: N of each layer.
        norm: of ``x``, or ``None``.
        residual: ``[..., N]`` in the dtype of ``x``, added to the output of one layer; or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N_i]`` of each layer, in the dtype of ``x``. Not differentiable.
    """
    weight, eps, offset = _norm_arguments(norm)
    return _call_fused(
        "fused_linear_prepacked",
        x,
        (list(layers), list(bias), list(out_features), weight, eps, offset, residual, activation),
    )


def mlp_prepacked(
    x: torch.Tensor,
    layers: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    out_features: int,
    function: int,
    norm: RMSNorm | None,
    residual: torch.Tensor | None,
    activation: int,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.mlp_prepacked``: an MLP of prepacked layers.

    Args:
        x: ``[..., K]``.
        layers: uint8 ``[bytes]`` of gate, up and down, or of up and down.
        bias: float32 ``[N]`` or ``None`` of each layer.
        out_features: N of down.
        function: a value of :data:`littlebit2_kernels.fused.mlp.FUNCTIONS`.
        norm: of ``x``, or ``None``.
        residual: ``[..., N]`` in the dtype of ``x``, added to the output; or ``None``.
        activation: a value of :data:`littlebit2_kernels.dispatch.ACTIVATIONS`.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Not differentiable.
    """
    weight, eps, offset = _norm_arguments(norm)
    return _call_fused(
        "mlp_prepacked",
        x,
        (list(layers), list(bias), out_features, function, weight, eps, offset, residual, activation),
    )


def _norm_arguments(norm: RMSNorm | None) -> tuple[torch.Tensor | None, float, float]:
    return (None, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)


def _call_fused(name: str, x: torch.Tensor, arguments: tuple[Any, ...]) -> Any:
    """Call an operator that is not differentiable, for arguments that need no gradient."""
    if torch.compiler.is_compiling():
        load_for(x)
        return getattr(torch.ops.littlebit2, name)(x, *arguments)
    operator = None if x.is_cuda else eager_operators.get(name)
    if operator is None:
        operator = load_operator(name, x)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(x, *arguments)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply dense int8 rows: ``y = scale * (x @ weight.T) + bias``.

    On the CPU few tokens, and calls that need a gradient, go to the native kernel, which reads the int8
    weights and sums in float32; on a GPU with the CUDA kernels, few tokens without a gradient do. All others
    go to torch.matmul on widened rows.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``.
        bias: float32 ``[N]`` or ``None``.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Differentiable in ``x`` and ``bias``.
    """
    # Autograd would keep the widened rows.
    differentiates = torch.is_grad_enabled() and requires_grad((x, bias))
    if x.device.type in ("cpu", "meta"):
        native = (
            torch.compiler.is_compiling()
            or differentiates
            or x.numel() <= _INT8_TOKENS[x.dtype] * x.shape[-1]
        )
    else:
        # The kernel reads all weights once for every 16 tokens.
        few = x.is_cuda and not differentiates and x.numel() <= _INT8_CUDA_TOKENS * x.shape[-1]
        native = few and no_cuda_reason() is None
    if native:
        return call_operator("int8_linear", x, (weight, scale, bias), (), ())
    return int8.dequantized_linear(x, weight, scale, bias)


def joined_linear_prepacked(
    x: torch.Tensor,
    layers: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    out_features: Sequence[int],
    activation: int,
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.joined_linear_prepacked``: prepacked layers into one output.

    Args: as :func:`grouped_linear_prepacked`.

    Returns:
        ``[..., sum N_i]`` in the dtype of ``x``. Differentiable in ``x`` only.
    """
    sizes = list(out_features)
    return call_operator(
        "joined_linear_prepacked", x, (list(layers), list(bias)), (sizes, activation), (sizes, _EXACT)
    )


def triton_linear(
    x: torch.Tensor, operands: Operands, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """Call ``torch.ops.littlebit2.triton_linear``: a packed layer by the Triton kernels.

    Args:
        x: ``[..., K]``.
        operands: ``(v, u, in_scale, latent_scale, out_scale)`` of :attr:`PackedLinear.operands`.
        bias: float32 ``[N]`` or ``None``.
        activation: a name that the backend serves.
    """
    v, u, in_scale, latent_scale, out_scale = operands
    lists = (v, u or [], in_scale, latent_scale or [], out_scale)
    if torch.compiler.is_compiling():
        _load_triton_while_tracing()
        return torch.ops.littlebit2.triton_linear(x, *lists, bias, activation)
    return _triton_operators().linear(x, lists, bias, activation)


def _triton_operators() -> Any:
    from ..triton import ops  # noqa: PLC0415  # Triton is imported once a call is to run there

    return ops


def _load_triton_while_tracing() -> bool:
    _triton_operators()
    return True


# torch.compile runs it while tracing and keeps nothing of it in the graph (see library.py).
_load_triton_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
