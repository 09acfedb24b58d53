"""The operators ``littlebit2::triton_linear`` and ``triton_linear_backward_x``, and a call around them.

Operands are lists with a tensor for each path, as ``littlebit2::linear`` has them; but a single-stage layer
passes empty lists for ``u`` and ``latent_scale``, as ``triton_op`` knows no optional ones.
"""

from __future__ import annotations

from typing import Any

import torch

from ..format import RANK_MULTIPLE, words_per_row
from ..ops.autograd import call_operator
from ..ops.operands import ACTIVATION_DTYPES, bias_gradient, no_gradients, save_operands, saved_operands
from .forward import Layer, backward_x, forward
from .launch import direct_launches, on_device
from .plan import choose_method

__all__ = ["linear", "triton_linear", "triton_linear_backward_x"]

_Operand = list[torch.Tensor]
_Operands = tuple[_Operand, _Operand, _Operand, _Operand, _Operand]


def linear(x: torch.Tensor, operands: _Operands, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]``, without the operator where neither autograd nor tracing needs it.

    Args:
        x: float32, float16 or bfloat16, any strides.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.
        activation: a name of :data:`~littlebit2_kernels.triton.plan.ACTIVATIONS`.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
        ValueError: ``activation`` is unknown.
    """
    watched = type(x) is not torch.Tensor or x.is_meta or torch._C._len_torch_dispatch_stack() > 0
    kernel = None if watched else _launch
    return call_operator(triton_linear, x, (*operands, bias), (activation,), ("exact",), kernel)


def _launch(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    with direct_launches():
        return _linear(x, *arguments)


def _linear(
    x: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor],
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor],
    out_scale: list[torch.Tensor],
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    _check("x", x, in_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), bias)
    flat = _flat(x)
    out = x.new_empty((flat.shape[0], int(out_scale[0].shape[-1])))
    method = choose_method(flat.shape[0], activation, x.dtype == torch.float32)
    if out.numel() > 0:
        # Torch calls operators on whichever device is the current one.
        with on_device(x.device):
            forward(flat, Layer(v, u, in_scale, latent_scale, out_scale), bias, out, method)
    return out.reshape(*x.shape[:-1], out.shape[1])


def _linear_backward_x(
    grad: torch.Tensor,
    v: list[torch.Tensor],
    u: list[torch.Tensor],
    in_scale: list[torch.Tensor],
    latent_scale: list[torch.Tensor],
    out_scale: list[torch.Tensor],
) -> torch.Tensor:
    _check("grad", grad, out_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), None)
    flat = _flat(grad)
    out = grad.new_empty((flat.shape[0], int(in_scale[0].shape[-1])))
    if out.numel() > 0:
        with on_device(grad.device):
            backward_x(flat, Layer(v, u, in_scale, latent_scale, out_scale), out)
    return out.reshape(*grad.shape[:-1], out.shape[1])


def _flat(x: torch.Tensor) -> torch.Tensor:
    """``[M, columns]`` with adjacent columns, a view of ``x`` where it can be one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _check(name: str, x: torch.Tensor, size: int, operands: _Operands, bias: torch.Tensor | None) -> None:
    """Raise unless the arguments are a layer and activations that fit it: anyone may call the operators."""
    v, u, in_scale, latent_scale, out_scale = operands
    if x.dtype not in ACTIVATION_DTYPES:
        raise RuntimeError(f"littlebit2: {name} must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != size:
        raise RuntimeError(f"littlebit2: {name}.size(-1) must equal {size}, got shape {list(x.shape)}")
    lists = {"in_scale": in_scale, "out_scale": out_scale}
    if u or latent_scale:
        lists |= {"u": u, "latent_scale": latent_scale}
    for list_name, tensors in lists.items():
        if len(tensors) != len(v):
            raise RuntimeError(
                f"littlebit2: {list_name} must hold one tensor per path ({len(v)}), got {len(tensors)}"
            )
    k, n = in_scale[0].shape[-1], out_scale[0].shape[-1]
    for p in range(len(v)):
        rank = v[p].shape[0] if u else n
        if u and rank % RANK_MULTIPLE:
            raise RuntimeError(
                f"littlebit2: v[{p}].size(0) must be a multiple of {RANK_MULTIPLE}, got {rank}"
            )
        _expect(f"v[{p}]", v[p], name, x, torch.int32, (rank, words_per_row(k)))
        _expect(f"in_scale[{p}]", in_scale[p], name, x, torch.float32, (k,))
        _expect(f"out_scale[{p}]", out_scale[p], name, x, torch.float32, (n,))
        if u:
            _expect(f"u[{p}]", u[p], name, x, torch.int32, (n, words_per_row(rank)))
            _expect(f"latent_scale[{p}]", latent_scale[p], name, x, torch.float32, (rank,))
    if bias is not None:
        _expect("bias", bias, name, x, torch.float32, (n,))


def _expect(
    name: str, tensor: torch.Tensor, of: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"littlebit2: {name} must be on {x.device} like {of}, got {tensor.device}")
    # Scales may be [1, size], as state_dicts have them.
    got = tensor.shape[1:] if len(shape) == 1 and tensor.dim() == 2 and tensor.shape[0] == 1 else tensor.shape
    if tensor.dtype != dtype or tuple(got) != shape:
        raise RuntimeError(
            f"littlebit2: {name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise RuntimeError(
            f"littlebit2: {name} must have stride 1 within a row, got strides {tensor.stride()}"
        )


triton_linear: Any = torch.library.triton_op("littlebit2::triton_linear", _linear, mutates_args=())
triton_linear_backward_x: Any = torch.library.triton_op(
    "littlebit2::triton_linear_backward_x", _linear_backward_x, mutates_args=()
)


def _fake(x: torch.Tensor, *operands: Any) -> torch.Tensor:
    v, u, in_scale, latent_scale, out_scale, bias, _ = operands
    _check("x", x, in_scale[0].shape[-1], (v, u, in_scale, latent_scale, out_scale), bias)
    return x.new_empty((*x.shape[:-1], out_scale[0].shape[-1]))


def _backward_fake(grad: torch.Tensor, *operands: Any) -> torch.Tensor:
    in_scale, out_scale = operands[2], operands[4]
    _check("grad", grad, out_scale[0].shape[-1], operands, None)
    return grad.new_empty((*grad.shape[:-1], in_scale[0].shape[-1]))


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = triton_linear_backward_x(grad, *saved_operands(ctx)) if ctx.needs_input_grad[0] else None
    grad_bias = bias_gradient(ctx, grad) if ctx.needs_input_grad[6] else None
    return (grad_x, *no_gradients(ctx), grad_bias, None)


def _backward_of_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias, with exact sums as the gradient assumes.
    grad_grad = triton_linear(grad, *saved_operands(ctx), None, "exact") if ctx.needs_input_grad[0] else None
    return (grad_grad, *no_gradients(ctx))


# The fakes that triton_op makes would launch kernels on fake tensors; shapes are all they need to tell.
triton_linear.register_fake(_fake)
triton_linear_backward_x.register_fake(_backward_fake)
triton_linear.register_autograd(_backward, setup_context=save_operands)
triton_linear_backward_x.register_autograd(_backward_of_backward, setup_context=save_operands)
