"""Layers in the CPU kernels' own layout: made once from a packed layer, then run many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .format import LayerShape, PackedLinear, PackedPath
from .ops.library import load

__all__ = ["PrepackedLinear", "prepack"]


@dataclass(frozen=True, eq=False)
class PrepackedLinear:
    """A packed layer as the CPU kernels read it; made by :func:`prepack`, undone by :meth:`unpack`.

    Signs lie row in lane, 15 columns to a 16-bit word (1/15 more bytes than the portable words), and scales
    beside them, all in one tensor. It is for use in the process that made it, and no file format: store the
    packed layer.

    Attributes:
        layer: uint8 ``[bytes]``, what ``torch.ops.littlebit2.linear_prepacked`` takes.
        bias: float32 ``[N]`` or ``None``.
        shape: sizes and structure of the layer.
    """

    layer: torch.Tensor
    bias: torch.Tensor | None
    shape: LayerShape

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as the packed layer: the layout is for this process.
        return prepack, (self.unpack(),)

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape.out_features

    @property
    def device(self) -> torch.device:
        """Device that holds the layer: the CPU."""
        return self.layer.device

    @property
    def nbytes(self) -> int:
        """Bytes of signs, scales and bias."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.layer.numel() + bias

    def unpack(self) -> PackedLinear:
        """Return the packed layer: the same signs and scales, in new tensors; pad bits are zero."""
        load()
        tensors = torch.ops.littlebit2.unprepack(self.layer)
        per_path = len(tensors) // self.shape.num_paths
        paths: list[PackedPath] = []
        for index, source in enumerate(self.shape.shares):
            own = tensors[index * per_path : (index + 1) * per_path]
            v, u, in_scale, latent_scale, out_scale = (
                (own[0], None, own[1], None, own[2]) if self.shape.single_stage else own
            )
            if source < index:
                v, in_scale = paths[source].v, paths[source].in_scale
            paths.append(PackedPath(v, in_scale, out_scale, u, latent_scale))
        return PackedLinear(tuple(paths), self.bias)


def prepack(packed: PackedLinear) -> PrepackedLinear:
    """Bring a packed layer to the layout that is fastest on the CPU.

    Args:
        packed: the layer, on the CPU. It is not needed afterwards, and its bias is not copied.

    Raises:
        TypeError: ``packed`` is not a :class:`PackedLinear`.
        ValueError: it is not on the CPU, or a scale requires a gradient.
        NativeLibraryError: the compiled library is missing.
    """
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
    if packed.device.type != "cpu":
        raise ValueError(f"packed must be on the CPU to be prepacked, got {packed.device}")
    if any(tensor.requires_grad for tensor in packed.unique_tensors() if tensor is not packed.bias):
        raise ValueError("packed layers are frozen, but a scale of packed requires a gradient")
    load()
    return PrepackedLinear(torch.ops.littlebit2.prepack(*packed.operands), packed.bias, packed.shape)
