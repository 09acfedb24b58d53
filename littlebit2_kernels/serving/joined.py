"""``JoinedLinear``: layers on one input as one opaque operator with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..dispatch import BACKENDS, PREPACKED, check_activation_mode
from ..format import LayerShape, PackedLinear, pitched_words
from ..ops import calls
from ..ops.operands import ACTIVATION_DTYPES
from ..prepacked import prepack
from .operator import register

__all__ = ["JoinedLinear"]


class JoinedLinear(nn.Module):
    """Several packed layers on one input: ``[..., K]`` to ``[..., N_1 + N_2 + ...]`` in one operator.

    For servers: the layers of a fused projection may have ranks of their own, and nothing is concatenated,
    because each layer writes its slice of the output. A call is one opaque operator that chooses the backend
    when it runs, so one graph of ``torch.compile``, traced for any number of tokens, serves them all. On a
    GPU, run :func:`littlebit2_kernels.warmup` on the module before a CUDA graph is captured.

    The module holds the layers in the layout that its device reads fastest, as buffers that no ``state_dict``
    has. They are frozen and keep their dtypes; the result is differentiable in ``x``.

    Args:
        layers: at least one, of the same K, on one device: all single-stage or all two-stage, unless they
            are prepacked. Their biases may differ in being there.
        out_dtype: dtype of the results, that of ``x`` by default. Where it is not the dtype of ``x``, one of
            the two must be float32, and sums are rounded once, at the end.
        backend: see :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise. ``"auto"`` goes by the shorter of the dtypes of input and output.
        prepacks: whether layers on the CPU are brought to the kernels' own layout
            (:func:`littlebit2_kernels.prepack`).

    Attributes:
        shapes: shapes of the layers.
        in_features: K.
        out_features: the sum of N_i.
        prepacked: whether the layers are held prepacked.

    Raises:
        TypeError: ``layers`` holds something else, or ``out_dtype`` is no dtype of activations.
        ValueError: layers do not go together, or a name is unknown or not served.
        NativeLibraryError: the compiled library is missing.
    """

    def __init__(
        self,
        layers: Sequence[PackedLinear],
        *,
        out_dtype: torch.dtype | None = None,
        backend: str = "auto",
        activation: str = "auto",
        prepacks: bool = True,
    ) -> None:
        super().__init__()
        _check_layers(layers)
        if out_dtype is not None and out_dtype not in ACTIVATION_DTYPES:
            raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        on_cpu = layers[0].device.type == "cpu"
        self.prepacked = prepacks and on_cpu and backend in ("auto", "cpu")
        check_activation_mode(activation, "cpu" if self.prepacked else backend, self.prepacked or not on_cpu)
        kinds = {layer.shape.single_stage for layer in layers}
        if not self.prepacked and len(kinds) > 1:
            raise ValueError(
                "layers must be all single-stage or all two-stage unless they are prepacked, got both"
            )
        self.shapes: tuple[LayerShape, ...] = tuple(layer.shape for layer in layers)
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.out_dtype = out_dtype
        self.backend = backend
        self.activation = activation
        self._sizes = [shape.out_features for shape in self.shapes]
        self._paths = [shape.num_paths for shape in self.shapes]
        self._shares = [source for shape in self.shapes for source in shape.shares]
        #: Names of the buffers of each operand; ``None`` stands for an operand or bias that is not there.
        self._names: list[Any] = []
        register()
        # Inference tensors could not be used by a call that tracks a gradient.
        with torch.inference_mode(False):
            if self.prepacked:
                self._add("layer", [prepack(layer).layer for layer in layers])
            else:
                for index, name in enumerate(("v", "u", "in_scale", "latent_scale", "out_scale")):
                    lists = [layer.operands[index] for layer in layers]
                    self._add(name, None if lists[0] is None else [one for own in lists for one in own])
            self._add("bias", [layer.bias for layer in layers])

    def _add(self, name: str, tensors: list[Any] | None) -> None:
        if tensors is None:
            self._names.append(None)
            return
        names: list[str | None] = []
        known: dict[int, str] = {}
        for index, tensor in enumerate(tensors):
            if tensor is None:
                names.append(None)
                continue
            buffer = known.setdefault(id(tensor), f"{name}_{index}")  # shared first stages stay shared
            if buffer not in self._buffers:
                words = tensor.is_cuda and tensor.dtype == torch.int32
                self.register_buffer(buffer, pitched_words(tensor) if words else tensor, persistent=False)
            names.append(buffer)
        self._names.append(names)

    def _tensors(self, index: int) -> Any:
        names = self._names[index]
        if names is None:
            return None
        return [None if name is None else self._buffers[name] for name in names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N_1 + N_2 + ...]`` of ``out_dtype``.

        Raises:
            ValueError: the last dimension of ``x`` is not K, or the two dtypes do not go together.
            RuntimeError: ``x`` is of another dtype, or on another device than the layers.
            BackendUnavailableError, NativeLibraryError: as :func:`littlebit2_kernels.littlebit_linear`.
        """
        return self.call(x)

    def call(
        self,
        x: torch.Tensor,
        *,
        out_dtype: torch.dtype | None = None,
        backend: str | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """:meth:`forward` with settings of this call in place of the module's."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x.size(-1) must equal K={self.in_features}, got shape {list(x.shape)}")
        out_dtype = out_dtype or self.out_dtype or x.dtype
        backend = backend or self.backend
        activation = activation or self.activation
        if x.dtype != out_dtype:
            if torch.float32 not in (x.dtype, out_dtype):
                raise ValueError(f"x must be {out_dtype} like out_dtype or float32, got {x.dtype}")
            x = x.float()
            if activation == "auto" and self.prepacked:
                activation = self.auto_activation(torch.float16)
        if self.prepacked:
            layers, bias = self._tensors(0), self._tensors(1)
            y = calls.joined_linear_prepacked(x, layers, bias, self._sizes, _code(backend, activation))
        else:
            operands = [self._tensors(index) for index in range(6)]
            y = torch.ops.littlebit2.joined_linear_auto(
                x, *operands, self._paths, self._shares, backend, activation
            )
        return y.to(out_dtype)

    def auto_activation(self, dtype: torch.dtype) -> str:
        """What ``activation`` is for tensors that are float32 but count as of ``dtype``."""
        is_auto = self.activation == "auto" and self.prepacked and dtype != torch.float32
        return "int16" if is_auto else self.activation

    def extra_repr(self) -> str:
        """Sizes of the layers, and how they are held."""
        layers = "; ".join(map(str, self.shapes))
        return f"{layers}, prepacked={self.prepacked}, out_dtype={self.out_dtype}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> JoinedLinear:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if self.prepacked and result.device != tensor.device and tensor.dtype == torch.uint8:
                raise ValueError(f"prepacked layers must stay on the CPU, got {result.device}")
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


def _code(backend: str, activation: str) -> int:
    code = PREPACKED.get((backend, activation))
    if code is None:
        raise ValueError(
            f"prepacked layers are the CPU's, got backend={backend!r}, activation={activation!r}"
        )
    return code


def _check_layers(layers: Sequence[PackedLinear]) -> None:
    if isinstance(layers, PackedLinear) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of PackedLinear, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError("layers must hold at least one layer, got none")
    for index, layer in enumerate(layers):
        if not isinstance(layer, PackedLinear):
            raise TypeError(f"layers[{index}] must be a PackedLinear, got {type(layer).__name__}")
    for name, values in (
        ("in_features", [layer.in_features for layer in layers]),
        ("device", [str(layer.device) for layer in layers]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"layers must have the same {name}, got {values}")
