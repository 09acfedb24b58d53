"""Heads and embeddings: int8 rows, and packed heads. Ranks hold slices of the vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.functional import embedding, pad

from littlebit2.checkpoint import CheckpointError
from littlebit2_kernels import JoinedLinear, slice_rows, warmup
from littlebit2_kernels.int8 import int8_rows_linear

from .linear import PackedLinearBase

__all__ = ["Int8RowsBase", "PackedHeadBase", "check_no_added_tokens"]

_TENSORS = {"weight_int8": torch.int8, "weight_scale": torch.float32}


class Int8RowsBase:
    """How a head or an embedding in int8 rows is made, loaded and run.

    Args:
        name: of the module in the checkpoint.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded: set[str] = set()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register this rank's rows and scales; rows that pad the vocabulary are zero.

        Raises:
            ValueError: the module has more tokens than the checkpoint.
        """
        check_no_added_tokens(self.name, layer)
        self.dtype = params_dtype
        rows = sum(output_partition_sizes)
        for name, shape in (("weight_int8", (rows, input_size)), ("weight_scale", (rows,))):
            parameter = Parameter(torch.zeros(shape, dtype=_TENSORS[name]), requires_grad=False)
            parameter.weight_loader = functools.partial(self._load, layer, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _load(self, layer: Any, name: str, parameter: Parameter, tensor: torch.Tensor) -> None:
        expected = [layer.org_vocab_size, *parameter.shape[1:]]
        if list(tensor.shape) != expected or tensor.dtype != _TENSORS[name]:
            raise CheckpointError(
                f"{self.name}.{name} must be {_TENSORS[name]} of shape {expected}, got {tensor.dtype} of "
                f"shape {list(tensor.shape)}"
            )
        begin, end = _bounds(layer)
        parameter.data[: end - begin].copy_(tensor[begin:end])
        self.loaded.add(name)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded.

        Raises:
            CheckpointError: rows or scales are missing, or scales are not finite.
        """
        for name in _TENSORS:
            if name not in self.loaded:
                raise CheckpointError(f"{self.name}.{name} is missing")
        if not bool(torch.isfinite(layer.weight_scale).all()):
            raise CheckpointError(f"{self.name}.weight_scale must be finite, got NaN or infinity")

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to the logits of this rank's tokens."""
        y = int8_rows_linear(x, layer.weight_int8, layer.weight_scale)
        return y if bias is None else y + bias

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """Look up ``ids`` ``[...]`` of this rank: ``[..., K]`` in the dtype of activations."""
        scale = embedding(ids, layer.weight_scale[:, None])
        return (embedding(ids, layer.weight_int8) * scale).to(self.dtype)


class PackedHeadBase(PackedLinearBase):
    """A packed layer as the head of a model."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """As that of linear modules.

        Raises:
            ValueError: the module has more tokens than the checkpoint.
        """
        check_no_added_tokens(self.parts[0].name, layer)
        super().create_weights(layer, *sizes, **more)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the rows of this rank's tokens.

        Raises:
            CheckpointError: a tensor is missing, unexpected or malformed; the message names it.
            ValueError: the layer is not that of the module.
        """
        device, packed = self._take()
        self._check_biases(layer, packed)
        expected = layer.embedding_dim, layer.org_vocab_size
        got = packed[0].in_features, packed[0].out_features
        if expected != got:
            raise ValueError(
                f"{self.parts[0].name}: (in_features, out_features) must be {expected}, got {got}"
            )
        begin, end = _bounds(layer)
        layer.packed = None
        if end > begin:
            own = packed[0] if end - begin == got[1] else slice_rows(packed[0], begin, end)
            layer.packed = JoinedLinear([own.to(device)], **self.settings)
            if device.type != "cpu":
                warmup(layer.packed, self.params_dtype)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to the logits of this rank's tokens, zero for those that only pad."""
        width = sum(self.sizes)
        if layer.packed is None:
            return x.new_zeros((*x.shape[:-1], width))
        y = layer.packed(x)
        return y if y.shape[-1] == width else pad(y, (0, width - y.shape[-1]))


def check_no_added_tokens(name: str, layer: Any) -> None:
    """Raise ``ValueError`` if a module has tokens that its checkpoint does not have."""
    if layer.num_embeddings != layer.org_vocab_size:
        raise ValueError(
            f"{name}: tokens beside those of the checkpoint are not served with packed or int8 rows, got "
            f"{layer.num_embeddings} of {layer.org_vocab_size}"
        )


def _bounds(layer: Any) -> tuple[int, int]:
    indices = layer.shard_indices
    return indices.org_vocab_start_index, indices.org_vocab_end_index
