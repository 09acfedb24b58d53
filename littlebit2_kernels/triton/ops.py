"""The operators ``littlebit2::triton_linear`` and ``triton_linear_backward_x``, and a call around them.

Operands are lists with a tensor for each path, as ``littlebit2::linear`` has them; but a single-stage layer
passes empty lists for ``u`` and ``latent_scale``, as ``triton_op`` knows no optional ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.autograd import forward_ad

from ..format import RANK_MULTIPLE, words_per_row
from .forward import Layer, backward_x, forward
from .launch import direct_launches, on_device
from .plan import choose_method

__all__ = ["linear", "triton_linear", "triton_linear_backward_x"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_Operand = list[torch.Tensor]
_Operands = tuple[_Operand, _Operand, _Operand, _Operand, _Operand]


def linear(x: torch.Tensor, operands: _Operands, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Apply a layer to ``x`` ``[..., K]``: by the operator where something watches, else by launches alone.

    Args:
        x: float32, float16 or bfloat16, any strides.
        operands: ``(v, u, in_scale, latent_scale, out_scale)``.
        bias: float32 ``[N]`` or ``None``.
        activation: a name of :data:`~littlebit2_kernels.triton.plan.ACTIVATIONS`.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
        ValueError: ``activation`` is unknown.
    """
    if forward_ad._current_level >= 0:
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None:
            # The layer is linear in x. Derivatives are those of exact sums.
            y = linear(primal, operands, bias, activation)
            return forward_ad.make_dual(y, linear(tangent, operands, None, "exact"))
    watched = type(x) is not torch.Tensor or x.is_meta or torch._C._len_torch_dispatch_stack() > 0
    if watched or (torch.is_grad_enabled() and _wants_gradient(x, operands, bias)):
        return triton_linear(x, *operands, bias, activation)
    with torch._C._AutoDispatchBelowAutograd(), direct_launches():
        return _linear(x, *operands, bias, activation)


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
    """Raise unless the arguments are a layer and something to apply it to: the operators are public doors."""
    v, u, in_scale, latent_scale, out_scale = operands
    if x.dtype not in _DTYPES:
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


def _wants_gradient(x: torch.Tensor, operands: _Operands, bias: torch.Tensor | None) -> bool:
    if x.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return any(tensor.requires_grad for tensors in operands for tensor in tensors)


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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    names = ("v", "u", "in_scale", "latent_scale", "out_scale")
    operands = inputs[1:6]
    for name, tensors in zip(names, operands, strict=True):
        for p, tensor in enumerate(tensors):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"littlebit2: {name}[{p}] requires a gradient, but packed layers are frozen"
                )
    # Saved, not kept: autograd then notices when they are changed in place before the backward call.
    ctx.save_for_backward(*(tensor for tensors in operands for tensor in tensors))
    ctx.lengths = [len(tensors) for tensors in operands]
    bias = inputs[6] if len(inputs) > 6 else None
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _saved(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [list(itertools.islice(saved, length)) for length in ctx.lengths]


def _no_gradients(ctx: Any) -> list[Any]:
    # Autograd wants a gradient, here none, for every element of every list.
    return [[None] * length for length in ctx.lengths]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grad_x = triton_linear_backward_x(grad, *_saved(ctx)) if ctx.needs_input_grad[0] else None
    grad_bias = None
    if ctx.needs_input_grad[6]:
        shape, dtype = ctx.bias_like
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype).reshape(shape)
    return (grad_x, *_no_gradients(ctx), grad_bias, None)


def _backward_of_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # The transpose of the transpose: the layer without its bias, with exact sums as the gradient assumes.
    grad_grad = triton_linear(grad, *_saved(ctx), None, "exact") if ctx.needs_input_grad[0] else None
    return (grad_grad, *_no_gradients(ctx))


# The fakes that triton_op makes would launch kernels on fake tensors; shapes are all they need to tell.
triton_linear.register_fake(_fake)
triton_linear_backward_x.register_fake(_backward_fake)
triton_linear.register_autograd(_backward, setup_context=_setup)
triton_linear_backward_x.register_autograd(_backward_of_backward, setup_context=_setup)
